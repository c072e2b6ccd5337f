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
  alignkit doctor --verify --json doctor.json"""


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file of settings: what it needs is looked at too", metavar="CONFIG")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every value of the reference cache")] = False,
    json: Annotated[Path | None, typer.Option(help="File for all of it")] = None,
) -> None:
    """Say what is installed, what computes and why, and what is wrong, for a bug report; exit code 1 is a problem."""
    terminal.check_target("--json", json)
    from alignkit.insight.doctor import Asked, examine

    settings = {}
    if config is not None:
        with suppress(ImportError):  # a broken library is what the examination is for
            settings = console.settings_of(str(config), {}, [], only_file=True)
    runs, int8 = Path(str(settings.get("output") or "runs")), settings.get("reference") == "int8"
    found = examine(Asked(runs, verify, int8))
    # what a terminal cannot show must not end it
    encoding = sys.stdout.encoding or "utf-8"
    typer.echo(found.text().encode(encoding, "backslashreplace").decode(encoding))
    if json:
        from alignkit.files import write_text

        write_text(json, js.dumps(found.describe(), indent=1) + "\n")
    raise typer.Exit(0 if found.healthy else 1)
