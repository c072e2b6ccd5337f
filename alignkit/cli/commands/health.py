"""`alignkit health`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.insight import terminal

EXAMPLES = """\b
Examples:
  alignkit health runs/grpo-001
  alignkit health runs/grpo-001 --set kl_high=20 --set opening=null"""


def health(
    run: Annotated[Path, typer.Argument(help="Folder of a run", metavar="RUN")],
    json: Annotated[Path | None, typer.Option(help="Write the alarms to this file")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--set", metavar="LIMIT=VALUE", help="Another limit, see docs/health.md")
    ] = None,
) -> None:
    """List the alarms of a run from its folder. Works for old runs, and with other limits."""
    terminal.check_target("--json", json)
    from alignkit.insight.health import alarm_output

    found = alarm_output.replay_with(run, console.pairs_of(more or []))
    terminal.show(alarm_output.table(found) if found else f"{run}: no alarms")
    if json:
        alarm_output.write_json(found, json)
