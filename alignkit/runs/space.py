"""Space on the disk of a run: checked before something is written, and named where it runs out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from alignkit.errors import CheckpointError
from alignkit.runs.folder import resume_command

ROOM = 1 << 20  # for file headers, small files, and the file system's metadata
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free(folder: Path) -> int:
    """Return the free bytes on the disk that holds `folder`, which need not exist yet."""
    place = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path("/"))
    return shutil.disk_usage(place).free


@contextmanager
def saving(what: str, folder: Path, needed: int, then: str, checked: bool = False) -> Iterator[None]:
    """Check that `folder`, which is created, has `needed` bytes; inside, a fault of the disk becomes one message.

    checked: the space was checked before. then: what is left and what to type. Raises CheckpointError saying what was
    needed, what is free, and where.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not checked and free(folder) < needed:
            raise OSError(errno.ENOSPC, "not enough space")
        yield
    except Exception as error:
        if not of_the_disk(error):
            raise
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(
            f"{what} cannot be written to {folder}: {why}. It needs {needed / 1e6:.1f} MB, "
            f"{free(folder) / 1e6:.1f} MB are free. {then}"
        ) from error


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Inside, a disk that is full where a run writes its log becomes one message. Raises CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise CheckpointError(
            f"the run's log cannot be written to {folder}: {error.strerror}. {free(folder) / 1e6:.1f} MB are free. "
            f"{and_resume(folder)}"
        ) from error


def and_resume(run: Path) -> str:
    """Return what to do where the disk of the run's folder was full."""
    return f"Free some space there, then type: {resume_command(run)}"


def of_the_disk(error: Exception) -> bool:
    """Return whether writing a file failed; the tokenizers library raises plain exceptions."""
    return isinstance(error, OSError | SafetensorError) or "os error" in str(error)
