"""Checkpoints that are complete or absent: written atomically, verified when read, safetensors and JSON only.

A checkpoint is a folder `step-00000012` with one safetensors file per group of tensors, state.json, and manifest.json,
which lists size and sha256 of the others. It is written under a temporary name, the manifest last, and renamed when
everything is on the disk. So a process killed at any moment leaves the older checkpoints and at most a temporary
folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import CheckpointError, first_line
from alignkit.files import leftovers, remove, sha256, share, sync
from alignkit.runs.runstate import (
    check_finite,
    flatten_optimizer,
    model_state,
    optimizer_state,
    packed,
    rng_state,
    set_model_state,
    set_optimizer_state,
    set_rng_state,
    unflatten_optimizer,
    without_aliases,
)
from alignkit.runs.space import ROOM, and_resume, saving

__all__ = [
    "Loaded",
    "OtherRows",
    "check_finite",
    "flatten_optimizer",
    "load",
    "model_state",
    "optimizer_state",
    "remove_step",
    "rng_state",
    "save",
    "set_model_state",
    "set_optimizer_state",
    "set_rng_state",
    "unflatten_optimizer",
]

VERSION = 1
_NAME = re.compile(r"step-(\d{8,})(\.new)?")
_TEMPORARY = r"\.tmp-step-\d+-(\d+)"


@dataclass(frozen=True)
class Loaded:
    """A complete checkpoint: its step, its groups of tensors (on the CPU), its state, its folder."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` into `folder`, then remove all but the `keep` newest up to this step.

    tensors: groups such as "model", "optimizer", "rng", one file each; tensors that share memory are stored once.
    state: JSON values with text keys. Returns the checkpoint's folder.
    Raises CheckpointError where the disk is full or cannot be written; older checkpoints are not touched.
    """
    unique = {group: without_aliases(named) for group, named in tensors.items()}
    aliases = {group: pair[1] for group, pair in unique.items()}
    text = json.dumps({"step": step, "aliases": aliases, "state": dict(state)})
    needed = sum(t.nbytes for kept, _ in unique.values() for t in kept.values()) + len(text.encode()) + ROOM
    temporary = folder / f".tmp-step-{step:08d}-{os.getpid()}"
    for left in leftovers(folder, _TEMPORARY):
        remove(left)
    then = f"Older checkpoints are whole. {and_resume(folder.parent)}"
    with saving(f"the checkpoint of step {step}", folder, needed, then):
        try:
            temporary.mkdir()
            for group, (kept, _) in unique.items():
                save_file(packed(kept), temporary / f"{group}.safetensors")
            (temporary / "state.json").write_text(text, encoding="utf-8")
            _seal(temporary)
            final = _publish(temporary, folder / f"step-{step:08d}")
        except BaseException:
            remove(temporary)
            raise
    _prune(folder, step, keep)
    return final


class OtherRows(CheckpointError):
    """The rows of a run are not those of its checkpoints, of which then none is tried."""


def load(
    folder: Path, log: Callable[[str], object] = print, take: Callable[[Loaded], object] = lambda one: None
) -> Loaded | None:
    """Return the newest complete checkpoint in `folder`, or None without any checkpoint.

    Every file's sha256 is verified. take: uses the contents, and fails where they do not fit. A damaged checkpoint, or
    one with wrong contents, is reported through `log`, and the one before it is used.
    Raises CheckpointError where no checkpoint can be used.
    """
    problems = []
    for path in _checkpoints(folder):
        try:
            found = _read(path)
            _taken(found, take)
            return found
        except OtherRows:
            raise
        except CheckpointError as error:
            problems.append(str(error))
            log(f"checkpoint {path} is damaged ({error}); trying the one before it")
    if problems:
        raise CheckpointError(
            f"all {len(problems)} checkpoints in {folder} are damaged: {'; '.join(problems)}. Restore one from a "
            f"backup, or start again with an empty folder."
        )
    return None


def newest_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint and its state, neither verified; None where none can be read."""
    for path in _checkpoints(folder):
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            return path, dict(json.loads((path / "state.json").read_text(encoding="utf-8"))["state"])
    return None


def remove_step(folder: Path, step: int) -> None:
    """Remove the checkpoint of a step, and `folder` with the last one."""
    for path in _checkpoints(folder):
        if path.name.removesuffix(".new") == f"step-{step:08d}":
            remove(path)
    with suppress(OSError):  # it holds others
        folder.rmdir()


def _seal(temporary: Path) -> None:
    """Sync all files to the disk and write the manifest, which makes the folder a checkpoint."""
    files = {}
    share(temporary)
    for path in sorted(temporary.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    sync(temporary)
    manifest = temporary / "manifest.json"
    manifest.write_text(json.dumps({"version": VERSION, "files": files}, indent=1), encoding="utf-8")
    sync(manifest)
    sync(temporary)


def _publish(temporary: Path, final: Path) -> Path:
    """Rename into place; a checkpoint of the same step is removed once the new one has a name that `load` reads."""
    if final.exists():
        spare = final.with_name(final.name + ".new")
        shutil.rmtree(spare, ignore_errors=True)
        os.rename(temporary, spare)
        sync(final.parent)
        shutil.rmtree(final)
        temporary = spare
    os.rename(temporary, final)
    sync(final.parent)
    return final


def _read(path: Path) -> Loaded:
    """Read a checkpoint after verifying each file. Raises CheckpointError naming the file and its problem."""
    try:
        for name, entry in _manifest(path).items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{name} is missing")
            if file.stat().st_size != entry["size"]:
                raise CheckpointError(f"{name} has {file.stat().st_size} bytes, but {entry['size']} were written")
            if sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{name} has changed since it was written: its sha256 differs")
        head = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = {}
        for group, aliases in head["aliases"].items():
            named = load_file(path / f"{group}.safetensors")
            tensors[group] = named | {name: named[first] for name, first in aliases.items()}
        step, state = head["step"], head["state"]
        if type(step) is not int or f"step-{step:08d}" != path.name.removesuffix(".new"):
            raise CheckpointError(f"state.json has step {step!r:.40}, which is not that of the folder's name")
        if not isinstance(state, dict):
            raise CheckpointError(f"state.json has no object as its state: {state!r:.40}")
        return Loaded(step, tensors, state, path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"it cannot be read: {error!r}") from error


def _taken(found: Loaded, take: Callable[[Loaded], object]) -> None:
    """Call `take`; its errors about the contents become CheckpointErrors."""
    try:
        take(found)
    except (torch.OutOfMemoryError, torch.distributed.DistError):  # not the checkpoint's fault
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"its contents do not fit this run: {first_line(error)}") from error


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version = manifest["version"]
        files = {str(n): {"size": int(e["size"]), "sha256": str(e["sha256"])} for n, e in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError("manifest.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"manifest.json is damaged: {error!r}") from error
    if version != VERSION:
        raise CheckpointError(f"manifest.json has format version {version}, but this alignkit reads version {VERSION}")
    if any(Path(name).name != name for name in files):
        raise CheckpointError("manifest.json names files outside the checkpoint")
    return files


def _checkpoints(folder: Path) -> list[Path]:
    """Return folders named as checkpoints, newest first; a replacement (.new) before the one of the same step."""
    names = [(m, p) for p in (folder.iterdir() if folder.is_dir() else ()) if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(names, key=lambda mp: (int(mp[0][1]), mp[0][2] is not None), reverse=True)]


def _prune(folder: Path, step: int, keep: int) -> None:
    # later steps stay: they are damaged, or belong to another run
    mine = [p for p in _checkpoints(folder) if int(p.name[5:].removesuffix(".new")) <= step]
    for path in mine[max(keep, 1) :]:
        shutil.rmtree(path, ignore_errors=True)
