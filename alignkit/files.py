"""Writing text files atomically."""

from __future__ import annotations

import os
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
