"""`alignkit doctor`."""

from __future__ import annotations

import json as js
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.insight import terminal

EXAMPLES = """\b
Examples:
  alignkit doctor
  alignkit doctor config.yaml
  alignkit doctor --json doctor.json"""


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(help="A YAML file of settings: the disk of its `output` is examined", metavar="CONFIG"),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file too")] = None,
) -> None:
    """Report versions, devices, kernels, attention, plugins and disks, and what is wrong; exit code 1 is a problem."""
    terminal.check_target("--json", json)
    from alignkit.insight.doctor import examine

    settings = {}
    if config is not None:
        with suppress(ImportError):  # a broken library is for the examination to report
            settings = console.settings_of(str(config), {}, [], only_file=True)
    found = examine(Path(str(settings.get("output") or "runs")))
    # a character that the terminal cannot show must not end the command
    encoding = sys.stdout.encoding or "utf-8"
    typer.echo(found.text().encode(encoding, "backslashreplace").decode(encoding))
    if json:
        from alignkit.files import write_text

        write_text(json, js.dumps(found.describe(), indent=1) + "\n")
    raise typer.Exit(0 if found.healthy else 1)
