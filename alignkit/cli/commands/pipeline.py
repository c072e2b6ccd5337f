"""`alignkit pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.insight import terminal

Text = str | None


def pipeline(
    file: Annotated[Path, typer.Argument(help="A YAML file with `stages`, see docs/pipeline.md", metavar="PIPELINE")],
    output: Annotated[Text, typer.Option(help="Folder that holds the pipeline's  [default: runs]")] = None,
    name: Annotated[Text, typer.Option(help="Folder of this pipeline in it  [default: pipeline-001, ...]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with it where it stopped")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that came with the model")
    ] = False,
) -> None:
    """Run a chain of methods, such as SFT, reward model, PPO: each begins with what the earlier ones trained."""
    given = {k: v for k, v in locals().items() if k != "file" and v is not None and v is not False}
    console.speak()
    from alignkit.engine import Engine
    from alignkit.runs.pipeline import read_pipeline, table

    settings = read_pipeline(file) | given
    result = Engine().pipeline(settings.pop("stages", None), **settings)
    if console.rank() == 0:
        terminal.show(table(result))
        typer.echo(f"folder: {result.folder}")
