"""Files and folders: writing them completely or not at all, what is left of others, and their content's sum."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from alignkit.errors import ConfigError


def replace_text(path: Path, text: str) -> None:
    """Write a file completely or not at all: under a temporary name, then renamed. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # a model's text may hold half a surrogate pair, which UTF-8 cannot encode
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file that a user named, completely or not at all; its folder is created.

    Links and devices are written to, never replaced. Raises ConfigError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout
            path.write_text(text, encoding="utf-8", errors="replace")
        else:
            replace_text(path, text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file") from error


def leftovers(folder: Path, name: str) -> Iterator[Path]:
    """Yield what finished processes, or this one, left in a folder. name: a pattern whose last group is a process."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = re.fullmatch(name, path.name)
        if match and (int(match[1]) == os.getpid() or not alive(int(match[1]))):
            yield path


def share(folder: Path) -> None:
    """Give every file in a folder the mode that its other new files have: safetensors lets only the owner read."""
    probe = folder / ".mode"
    probe.touch()  # 0o666 without the process's umask, which cannot be read without changing it for other threads
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def alive(pid: int) -> bool:
    """Return whether a process of this machine is running."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # it belongs to another user
    return True
