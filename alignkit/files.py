"""Writing text files atomically."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from alignkit.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all: under a temporary name, then renamed; its folder is created.

    Links and devices are written to, never replaced. Raises ConfigError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        # never replaces a device such as /dev/stdout
        target = path if path.is_symlink() or (path.exists() and not path.is_file()) else temporary
        path.parent.mkdir(parents=True, exist_ok=True)
        # a model's text may hold half a surrogate pair, which UTF-8 cannot encode
        target.write_text(text, encoding="utf-8", errors="replace")
        if target is temporary:
            os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file") from error
