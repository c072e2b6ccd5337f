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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alignkit.errors import CheckpointError, first_line
from alignkit.files import leftovers, remove, sync
from alignkit.models.ranks import SINGLE, Ranks, part_in_row
from alignkit.runs.loaded import Loaded
from alignkit.runs.manifest import described, seal, verify
from alignkit.runs.parts import Groups, any_sharded, n_bytes, write_parts
from alignkit.runs.rng import rng_state, set_rng_state
from alignkit.runs.runstate import (
    check_finite,
    flatten_optimizer,
    model_state,
    optimizer_state,
    packed,
    set_model_state,
    set_optimizer_state,
    unflatten_optimizer,
    weight_like,
    with_aliases,
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
    "weight_like",
]

_NAME = re.compile(r"step-(\d{8,})(\.new)?")
_TEMPORARY = r"\.tmp-step-\d+-(\d+)"


def save(folder: Path, step: int, tensors: Groups, state: Mapping[str, Any], keep: int, ranks: Ranks = SINGLE) -> Path:
    """Write the checkpoint of `step` into `folder`, then remove all but the `keep` newest up to this step.

    tensors: groups such as "model", "optimizer", "rng", one file each; tensors that share memory are stored once. A
    group with sharded tensors is written in parts by all `ranks`, which must then all call it.
    state: JSON values with text keys. Returns the checkpoint's folder.
    Raises CheckpointError where the disk is full or cannot be written; older checkpoints are not touched.
    """
    unique = {group: without_aliases(named) for group, named in tensors.items()}
    aliases = {group: pair[1] for group, pair in unique.items()}
    parts = {group: kept for group, (kept, _) in unique.items() if any_sharded({group: kept})}
    head = {"step": step, "aliases": aliases, "state": dict(state)} | ({"parts": sorted(parts)} if parts else {})
    text = json.dumps(head)
    needed = sum(n_bytes(kept.values()) for kept, _ in unique.values()) + len(text.encode()) + ROOM
    temporary = folder / f".tmp-step-{step:08d}-{ranks.most(os.getpid() if ranks.is_main else 0)}"
    what = f"the checkpoint of step {step}"
    then = f"Older checkpoints are whole. {and_resume(folder.parent)}"

    def begin() -> None:
        if ranks.is_main:
            for left in leftovers(folder, _TEMPORARY):
                remove(left)
            with saving(what, folder, needed, then):
                temporary.mkdir()

    def shards() -> dict[str, Any]:
        with saving(what, folder, needed, then, checked=True):
            write_parts(temporary, parts, ranks.n)
            return described(part_in_row(sorted(temporary.iterdir()), ranks.own, ranks.n))

    def write() -> Path:
        final = folder / f"step-{step:08d}"
        if not ranks.is_main:
            return final
        with saving(what, folder, needed, then, checked=True):
            _write_whole(temporary, {g: kept for g, (kept, _) in unique.items() if g not in parts}, text, sums)
            return _publish(temporary, final)

    try:
        ranks.together(begin, CheckpointError)
        sums = ranks.texts(json.dumps(ranks.together(shards, CheckpointError))) if parts else []
        final = ranks.together(write, CheckpointError)
    except BaseException:
        if ranks.is_main:
            remove(temporary)
        raise
    if ranks.is_main:
        _prune(folder, step, keep)
    return final


def _write_whole(folder: Path, groups: Groups, text: str, sums: Sequence[str]) -> None:
    """Write what no rank has written yet, and the manifest of all files. sums: of the ranks' parts, as JSON."""
    for group, named in groups.items():
        save_file(packed(named), folder / f"{group}.safetensors")
    (folder / "state.json").write_text(text, encoding="utf-8")
    known = {name: entry for one in sums for name, entry in json.loads(one).items()}
    seal(folder, known | described(path for path in sorted(folder.iterdir()) if path.name not in known))


class OtherRows(CheckpointError):
    """The rows of a run are not those of its checkpoints, of which then none is tried."""


def load(
    folder: Path,
    log: Callable[[str], object] = print,
    take: Callable[[Loaded], object] = lambda one: None,
    ranks: Ranks = SINGLE,
) -> Loaded | None:
    """Return the newest complete checkpoint in `folder`, or None without any checkpoint.

    Every file's sha256 is verified. take: uses the contents, and fails where they do not fit. A damaged checkpoint, or
    one with wrong contents, is reported through `log`, and the one before it is used.
    ranks: those that load it together: what one of them cannot use, none does.
    Raises CheckpointError where no checkpoint can be used.
    """
    problems = []
    for path in _checkpoints(folder):
        try:
            found = ranks.together(lambda path=path: _read(path, ranks), CheckpointError)  # type: ignore[misc]
            ranks.together(lambda found=found: _taken(found, take), CheckpointError)  # type: ignore[misc]
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


def _read(path: Path, ranks: Ranks) -> Loaded:
    """Read a checkpoint after verifying each file. Raises CheckpointError naming the file and its problem."""
    try:
        verify(path, ranks.own, ranks.n)
        head = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors, parts = {}, {group: head["aliases"][group] for group in head.get("parts", [])}
        for group, aliases in head["aliases"].items():
            if group not in parts:
                tensors[group] = with_aliases(load_file(path / f"{group}.safetensors"), aliases)
        step, state = head["step"], head["state"]
        if type(step) is not int or f"step-{step:08d}" != path.name.removesuffix(".new"):
            raise CheckpointError(f"state.json has step {step!r:.40}, which is not that of the folder's name")
        if not isinstance(state, dict):
            raise CheckpointError(f"state.json has no object as its state: {state!r:.40}")
        return Loaded(step, tensors, state, path, parts)
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


def _checkpoints(folder: Path) -> list[Path]:
    """Return folders named as checkpoints, newest first; a replacement (.new) before the one of the same step."""
    names = [(m, p) for p in (folder.iterdir() if folder.is_dir() else ()) if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(names, key=lambda mp: (int(mp[0][1]), mp[0][2] is not None), reverse=True)]


def _prune(folder: Path, step: int, keep: int) -> None:
    # later steps stay: they are damaged, or belong to another run
    mine = [p for p in _checkpoints(folder) if int(p.name[5:].removesuffix(".new")) <= step]
    for path in mine[max(keep, 1) :]:
        shutil.rmtree(path, ignore_errors=True)
