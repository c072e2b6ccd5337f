"""Versions against what alignkit's distributions ask for, and whether the libraries do what they are there for."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from typing import TYPE_CHECKING, Literal

from alignkit.insight.doctor.parts import Asked, Fact, Trouble, first

if TYPE_CHECKING:
    from packaging.requirements import Requirement

SHOWN = (
    "alignkit", "alignkit-kernels", "torch", "triton", "transformers", "tokenizers", "huggingface-hub", "accelerate",
    "peft", "bitsandbytes", "datasets", "safetensors", "numpy", "pydantic",
)  # fmt: skip
# what older versions can be made to do by a file that they read
UNSAFE = {"torch": "CVE-2025-32434, CVE-2026-24747: loading weights ran code", "transformers": "CVE-2026-4372"}
_OPTIONAL = {"triton": "the GPU's kernels", "bitsandbytes": "`reference: int8`"}


def versions(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield what is installed, and what is missing, too old or too new for alignkit and its plugins."""
    yield Fact("python", platform.python_version())
    yield Fact("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    for name in SHOWN:
        if (found := installed(name)) or name in _OPTIONAL:
            yield Fact(name, found or f"not installed; only {_OPTIONAL[name]} needs it")
    yield from _python()
    seen = set()
    for owner in _distributions():
        for needed in _requirements(owner):
            trouble = needed if isinstance(needed, Trouble) else _unmet(owner, needed)
            if trouble and str(needed) not in seen:
                seen.add(str(needed))
                yield trouble
    yield from _triton()


def working(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield whether each library can be imported, LoRA put on a layer, and a layer converted to 8 bits."""
    for name in ("torch", "transformers", "accelerate", "datasets"):
        try:
            importlib.import_module(name)
        except Exception as error:
            again = f"pip install --force-reinstall {name}"
            yield Trouble("problem", f"{name} cannot be imported: {type(error).__name__}: {first(error)}", again)
    yield from _lora()
    yield from _int8(asked)


def installed(name: str) -> str | None:
    """Return a distribution's version, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Iterator[Trouble]:
    from packaging.specifiers import SpecifierSet

    if installed("alignkit") is None:  # run from its sources
        what = "alignkit is not installed: neither what it needs nor its plugins' names can be known"
        yield Trouble("warn", what, "pip install alignkit, or pip install -e . in its sources")
        return
    needs = SpecifierSet(distribution("alignkit").metadata["Requires-Python"])
    running = ".".join(map(str, sys.version_info[:3]))  # platform's may end in a +, which no specifier contains
    if not needs.contains(running):
        yield Trouble("problem", f"Python {running} is not {needs}", f"use a Python {needs}")


def _distributions() -> list[str]:
    """alignkit's distributions, and those that bring something to it."""
    groups = ("alignkit", "alignkit.rewards", "alignkit.judges", "alignkit.listeners")
    # what an interrupted installation left has no name
    owners = {e.dist.name for group in groups for e in entry_points(group=group) if e.dist and e.dist.name}
    return ["alignkit", "alignkit-kernels", *sorted(owners - {"alignkit"})]


def _requirements(owner: str) -> Iterator[Requirement | Trouble]:
    """Yield what a distribution needs here, and what of it cannot be read."""
    from packaging.requirements import Requirement

    if installed(owner) is None:
        return
    for text in distribution(owner).requires or ():
        try:
            found = Requirement(text)
            if found.marker is None or found.marker.evaluate({"extra": ""}) or found.name in _OPTIONAL:
                yield found
        except ValueError as error:
            what = f"{owner} asks for '{text}', which cannot be read: {first(error)}"
            yield Trouble("warn", what, f"pip install -U {owner}, or pip uninstall {owner}")


def _unmet(owner: str, requirement: Requirement) -> Trouble | None:
    from packaging.version import InvalidVersion, Version

    found, name = installed(requirement.name), requirement.name
    if found is None and name in _OPTIONAL:
        return None
    again = f"pip install '{name}{requirement.specifier}'"
    if found is None:
        return Trouble("problem", f"{name} is not installed, and {owner} needs {requirement.specifier or 'it'}", again)
    try:
        Version(found)
    except InvalidVersion:
        what = f"{name} is {found}, which is no version: whether {owner} can use it cannot be told"
        return Trouble("warn", what, again)
    if requirement.specifier.contains(found, prereleases=True):
        return None
    why = f" ({UNSAFE[name]})" if name in UNSAFE else ""
    what = f"{name} is {found}, and {owner} needs {requirement.specifier}{why}"
    return Trouble("warn" if name in _OPTIONAL else "problem", what, again)


def _triton() -> Iterator[Trouble]:
    """Yield where triton is another one than torch was made for."""
    for requirement in _requirements("torch"):
        found = installed("triton")
        if isinstance(requirement, Trouble) or requirement.name != "triton":
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if found and not requirement.specifier.contains(found, prereleases=True):
            what = f"triton is {found}, and this torch was made for {requirement.specifier}"
            yield Trouble("warn", what, f"pip install 'triton{requirement.specifier}'")


def _lora() -> Iterator[Fact | Trouble]:
    try:
        from peft import LoraConfig, get_peft_model
        from torch import nn

        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], r=1))  # type: ignore[arg-type]
        yield Fact("LoRA", "works")
    except Exception as error:
        # peft looks for every quantisation library that there is, and an old one is enough to stop it
        what = f"LoRA cannot be used: peft: {type(error).__name__}: {first(error)}"
        yield Trouble("problem", what, "upgrade or uninstall the library that it names, or pip install -U peft")


def _int8(asked: Asked) -> Iterator[Fact | Trouble]:
    if installed("bitsandbytes") is None:
        if asked.int8:
            what = "the configuration asks for `reference: int8`, and bitsandbytes is not installed"
            yield Trouble("problem", what, "pip install 'alignkit[int8]', or choose another reference")
        return
    try:
        import torch
        from torch import nn

        from alignkit.insight.places import device
        from alignkit.reference.int8 import to_int8

        model = nn.Sequential(nn.Linear(64, 64)).to(device())
        inputs = torch.ones(2, 64, device=device())
        wanted = model(inputs)
        error = (to_int8(model)(inputs) - wanted).abs().max().item()
        if not error <= 0.1:  # 64 weights of at most 1/8, each off by 1/254 of the largest: 0.03
            raise ArithmeticError(f"a layer in 8 bits is {error:.3g} off")
        yield Fact("8-bit reference", "works")
    except Exception as error:
        severity: Literal["warn", "problem"] = "problem" if asked.int8 else "warn"
        what = f"`reference: int8` cannot be used: bitsandbytes: {type(error).__name__}: {first(error)}"
        yield Trouble(severity, what, "pip install -U bitsandbytes, or choose another reference")
