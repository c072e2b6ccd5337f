"""Checkpoints that are complete or absent: written atomically, verified when read, safetensors and JSON only.

A checkpoint is a folder `step-00000012` with one safetensors file per group of tensors, state.json, and manifest.json,
which lists size and sha256 of the others. It is written under a temporary name, the manifest last, and renamed when
everything is on the disk. So a process killed at any moment leaves the older checkpoints and at most a temporary
folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import CheckpointError
from alignkit.runs.runstate import (
    flatten_optimizer,
    model_state,
    optimizer_state,
    packed,
    rng_state,
    set_optimizer_state,
    set_rng_state,
    unflatten_optimizer,
    without_aliases,
)

__all__ = [
    "Loaded",
    "flatten_optimizer",
    "load",
    "model_state",
    "optimizer_state",
    "rng_state",
    "save",
    "set_optimizer_state",
    "set_rng_state",
    "unflatten_optimizer",
]

VERSION = 1
_NAME = re.compile(r"step-(\d{8,})(\.new)?")
_TEMPORARY = re.compile(r"\.tmp-step-\d+-(\d+)")
_HEADER_ROOM = 1 << 20  # for file headers, the manifest, and the file system's metadata


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
    needed = sum(t.nbytes for kept, _ in unique.values() for t in kept.values()) + len(text.encode()) + _HEADER_ROOM
    temporary = folder / f".tmp-step-{step:08d}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        if shutil.disk_usage(folder).free < needed:
            raise OSError("not enough space")
        temporary.mkdir()
        for group, (kept, _) in unique.items():
            save_file(packed(kept), temporary / f"{group}.safetensors")
        (temporary / "state.json").write_text(text, encoding="utf-8")
        _seal(temporary)
        final = _publish(temporary, folder / f"step-{step:08d}")
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(_full_message(folder, step, needed, error)) from error
        raise
    _prune(folder, step, keep)
    return final


def load(folder: Path, log: Callable[[str], object] = print) -> Loaded | None:
    """Return the newest complete checkpoint in `folder`, or None without any checkpoint.

    Every file's sha256 is verified. A damaged checkpoint is reported through `log`, and the one before it is used.
    Raises CheckpointError where all checkpoints are damaged.
    """
    problems = []
    for path in _checkpoints(folder):
        try:
            return _read(path)
        except CheckpointError as error:
            problems.append(str(error))
            log(f"checkpoint {path} is damaged ({error}); trying the one before it")
    if problems:
        raise CheckpointError(
            f"all {len(problems)} checkpoints in {folder} are damaged: {'; '.join(problems)}. Restore one from a "
            f"backup, or start again with an empty folder."
        )
    return None


def _seal(temporary: Path) -> None:
    """Sync all files to the disk and write the manifest, which makes the folder a checkpoint."""
    files = {}
    for path in sorted(temporary.iterdir()):
        os.chmod(path, 0o644)  # safetensors creates files that only their owner can read
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    _sync(temporary)
    manifest = temporary / "manifest.json"
    manifest.write_text(json.dumps({"version": VERSION, "files": files}, indent=1), encoding="utf-8")
    os.chmod(manifest, 0o644)
    _sync(manifest)
    _sync(temporary)


def _publish(temporary: Path, final: Path) -> Path:
    """Rename into place; a checkpoint of the same step is removed once the new one has a name that `load` reads."""
    if final.exists():
        spare = final.with_name(final.name + ".new")
        shutil.rmtree(spare, ignore_errors=True)
        os.rename(temporary, spare)
        _sync(final.parent)
        shutil.rmtree(final)
        temporary = spare
    os.rename(temporary, final)
    _sync(final.parent)
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
            if _sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{name} has changed since it was written: its sha256 differs")
        head = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = {}
        for group, aliases in head["aliases"].items():
            named = load_file(path / f"{group}.safetensors")
            tensors[group] = named | {name: named[first] for name, first in aliases.items()}
        return Loaded(head["step"], tensors, head["state"], path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"it cannot be read: {error!r}") from error


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version = manifest["version"]
        files = {str(n): {"size": int(e["size"]), "sha256": str(e["sha256"])} for n, e in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError("manifest.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of finished processes, and of this one."""
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # it may be alive and belong to another user
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _full_message(folder: Path, step: int, needed: int, error: Exception) -> str:
    place = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    return (
        f"the checkpoint of step {step} cannot be written to {folder}: {error}. It needs {needed / 1e6:.1f} MB, "
        f"{free / 1e6:.1f} MB are free. Older checkpoints are intact. Free some space, or choose another output folder."
    )
