"""`alignkit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.insight import terminal

EXAMPLES = """\b
Examples:
  alignkit report runs/dpo-001
  alignkit report runs/grpo-001 runs/grpo-002 --output sweep.html
  alignkit report runs/pipeline-001"""


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs or pipelines", metavar="RUN ...")],
    output: Annotated[Path, typer.Option(help="The file to write")] = Path("report.html"),
) -> None:
    """Report on runs in one HTML file: curves, alarms, completions, data, settings, environment, cost."""
    terminal.check_target("--output", output)
    from alignkit.insight.report import report as write

    typer.echo(f"report: {write(runs, output)}")
