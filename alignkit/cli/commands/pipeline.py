"""`alignkit pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.insight import terminal
from alignkit.runs.terminal import rank

Text = str | None


def pipeline(
    file: Annotated[Path, typer.Argument(help="A YAML file with `stages`, see docs/pipeline.md", metavar="PIPELINE")],
    output: Annotated[Text, typer.Option(help="Folder of all pipelines  [default: runs]")] = None,
    name: Annotated[Text, typer.Option(help="Name of this pipeline's folder  [default: pipeline-001, ...]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where it stopped")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model")
    ] = False,
    allow_changed_models: Annotated[
        bool, typer.Option("--allow-changed-models", help="Resume although a model changed since the start")
    ] = False,
) -> None:
    """Run a chain of methods, such as SFT, reward model, PPO: each starts from earlier models."""
    given = {k: v for k, v in locals().items() if k != "file" and v is not None and v is not False}
    console.show_log()
    from alignkit.engine import Engine
    from alignkit.runs.config_file import located
    from alignkit.runs.pipeline import read_pipeline, table

    settings = read_pipeline(file)
    settings = (located(file, settings) if resume else settings) | given
    result = Engine().pipeline(settings.pop("stages", None), **settings)
    if rank() == 0:
        terminal.show(table(result))
        typer.echo(f"folder: {result.folder}")
