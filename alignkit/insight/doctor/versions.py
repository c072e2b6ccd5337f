"""Versions, against what alignkit's distributions require."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version

from alignkit.insight.doctor.probe import Fact, Trouble, first_line

_REPORTED = (
    "alignkit", "alignkit-kernels", "torch", "triton", "transformers", "tokenizers", "huggingface-hub", "accelerate",
    "peft", "bitsandbytes", "datasets", "safetensors", "numpy", "pydantic",
)  # fmt: skip
_OPTIONAL = {"triton": "the GPU's kernels", "bitsandbytes": "`reference: int8`, `quantize: nf4`"}
_IMPORTED = ("torch", "transformers", "accelerate", "peft", "datasets")


def versions() -> Iterator[Fact | Trouble]:
    """Yield what is installed, and what is missing, too old, too new or broken for alignkit and its plugins."""
    yield Fact("python", platform.python_version())
    yield Fact("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    for name in _REPORTED:
        if (found := installed(name)) or name in _OPTIONAL:
            yield Fact(name, found or f"not installed; only {_OPTIONAL[name]} needs it")
    for name in _IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            again = f"pip install --force-reinstall {name}"
            yield Trouble("problem", f"{name} cannot be imported: {type(error).__name__}: {first_line(error)}", again)
    if installed("alignkit") is None:  # run from its sources
        what = "alignkit is not installed: its requirements and its plugins are unknown"
        yield Trouble("warn", what, "pip install alignkit, or pip install -e . in its sources")
    reported = set()  # distributions share requirements
    for trouble in (trouble for owner in _distributions() for trouble in _unmet(owner)):
        if trouble.remedy not in reported:
            reported.add(trouble.remedy)
            yield trouble


def installed(name: str) -> str | None:
    """Return a distribution's version, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _distributions() -> list[str]:
    """Return alignkit's distributions, those whose plugins it finds, and torch."""
    groups = ("alignkit", "alignkit.rewards", "alignkit.judges", "alignkit.listeners")
    # a distribution that an interrupted installation left has no name
    owners = {e.dist.name for group in groups for e in entry_points(group=group) if e.dist and e.dist.name}
    return ["alignkit", "alignkit-kernels", *sorted(owners - {"alignkit"}), "torch"]


def _unmet(owner: str) -> Iterator[Trouble]:
    """Yield the unmet requirements of a distribution, optional ones too; for torch, only its requirement of triton."""
    from packaging.requirements import Requirement

    for text in (distribution(owner).requires or ()) if installed(owner) else ():
        try:
            requirement = Requirement(text)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        except ValueError:
            what = f"{owner} requires '{text}', which cannot be read"
            yield Trouble("warn", what, f"pip install -U {owner}, or pip uninstall {owner}")
            continue
        name, found, specifier = requirement.name, installed(requirement.name), requirement.specifier
        checked = name == "triton" if owner == "torch" else applies or name in _OPTIONAL
        met = specifier.contains(found, prereleases=True) if found else name in _OPTIONAL
        if checked and not met:
            what = f"{name} is {found or 'not installed'}, and {owner} needs {specifier or 'it'}"
            yield Trouble("warn" if name in _OPTIONAL else "problem", what, f"pip install '{name}{specifier}'")
