"""Reading from the terminal, printing on it, and checks of output files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def show(*renderables: Any) -> None:
    """Print text and what rich can render, such as tables; lines are not broken where the output is not a terminal."""
    from rich.console import Console

    Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 240).print(*renderables)


def size(n_bytes: int) -> str:
    """Return a number of bytes as text with a unit."""
    value, units = float(n_bytes), ["bytes", "KiB", "MiB", "GiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}" if units[0] != "bytes" else f"{n_bytes} bytes"


def check_target(option: str, file: Path | None, created: Path | None = None) -> None:
    """Raise ConfigError where a file cannot be written; `created`: a folder that will exist by then."""
    from alignkit.errors import ConfigError

    if file and file.is_dir():
        raise ConfigError(f"{option} '{file}' is a folder; give a file")
    if file and file.parent != created and not file.parent.is_dir():
        raise ConfigError(f"{option} '{file}': there is no folder '{file.parent}'")


def typed(prompt: str) -> Iterator[str]:
    """Yield the lines of standard input; on a terminal after a prompt, where Ctrl-C begins the line again."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - gives `input` its editing and history
    while True:
        try:
            yield input(prompt if interactive else "")
        except EOFError:
            return write("\n" if interactive else "")
        except KeyboardInterrupt:
            if not interactive:
                raise
            write("\n")


def write(text: str) -> None:
    """Write a piece of text to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
