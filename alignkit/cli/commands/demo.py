"""`alignkit demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console


def demo(
    method: Annotated[
        str | None,
        typer.Argument(
            help="An installed method that trains a policy  [default: the best installed one for pairs]",
            metavar="[METHOD]",
            show_default=False,
        ),
    ] = None,
    named: Annotated[str | None, typer.Option("--method", help="The same, as an option")] = None,
    output: Annotated[Path, typer.Option(help="Folder that holds the runs")] = Path("runs"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the task, the models and the samples")] = 0,
) -> None:
    """Align a small model on a made-up task: no downloads.

    Creates the task, fine-tunes a small model on it, aligns it, and shows what changed.
    """
    # A model this small gains nothing from threads, and slows down a lot where other programs use the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from alignkit import registry
    from alignkit.errors import ConfigError

    if method is not None and named is not None and method != named:
        raise ConfigError(f"two methods given, '{method}' and --method {named}; the demo runs one")
    method = method if method is not None else named
    from alignkit.demo import best, run_demo

    method = best("pairs") if method is None else registry.get(method).name
    console.show_log()
    typer.echo(run_demo(method, output, seed))
