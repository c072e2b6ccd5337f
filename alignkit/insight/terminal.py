"""What insights print on a terminal, and the files that they are asked to write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def show(*shown: Any) -> None:
    """Print what rich can print, tables for one, without breaking lines where nobody reads along."""
    from rich.console import Console

    Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 240).print(*shown)


def size(n_bytes: int) -> str:
    """Return a number of bytes in words."""
    shown, units = float(n_bytes), ["bytes", "KiB", "MiB", "GiB"]
    while abs(shown) >= 1024 and len(units) > 1:
        shown, units = shown / 1024, units[1:]
    return f"{shown:.3g} {units[0]}" if units[0] != "bytes" else f"{n_bytes} bytes"


def check_target(option: str, file: Path | None, made: Path | None = None) -> None:
    """Raise ConfigError where a file cannot be written in the end; `made`: a folder that will be there by then."""
    from alignkit.errors import ConfigError

    if file and file.is_dir():
        raise ConfigError(f"{option} '{file}' is a folder; give a file")
    if file and file.parent != made and not file.parent.is_dir():
        raise ConfigError(f"{option} '{file}': there is no folder '{file.parent}'")
