"""Free space and permissions where a run writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from alignkit.insight import terminal
from alignkit.insight.doctor.probe import Fact, Trouble, first_line

LOW, EMPTY = 5 * 2**30, 2**30  # bytes free


def disks(runs: Path) -> Iterator[Fact | Trouble]:
    """Yield the free space for runs, the reference cache, downloaded models and temporary files."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from alignkit.reference.cache import default_path

    places: dict[str, tuple[Callable[[], Path], str]] = {
        "runs": (lambda: runs, "choose another `output`"),
        "reference cache": (lambda: default_path().parent, "export ALIGNKIT_CACHE=/another/folder/reference.sqlite"),
        "models of the hub": (lambda: Path(HF_HUB_CACHE), "export HF_HOME=/another/folder"),
        "temporary files": (lambda: Path(tempfile.gettempdir()), "export TMPDIR=/another/folder"),
    }
    for name, (place, otherwise) in places.items():
        remedy = f"fix its permissions, or {otherwise}"
        try:
            yield from _space(name, place(), remedy)
        except (OSError, RuntimeError) as error:  # the latter: no home folder
            yield Trouble("problem", f"{name} cannot be read or written: {first_line(error)}", remedy)


def _space(name: str, path: Path, remedy: str) -> Iterator[Fact | Trouble]:
    existing = _existing(path)
    free = shutil.disk_usage(existing).free
    yield Fact(name, f"{path}, {terminal.size(free)} free")
    if not existing.is_dir():
        yield Trouble("problem", f"{name}: {existing} is not a folder", remedy)
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Trouble("problem", f"{name}: {existing} cannot be written", remedy)
    if free < LOW:
        what = f"{name}: only {terminal.size(free)} is free at {existing}"
        remedy = "remove what is not needed (old checkpoints in runs/*/checkpoints), or use another disk"
        yield Trouble("problem" if free < EMPTY else "warn", what, remedy)


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists. Raises OSError where that cannot be determined."""
    path = path.expanduser().absolute()
    for place in (path, *path.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return place
    return path
