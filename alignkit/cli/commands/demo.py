"""`alignkit demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console


def demo(
    method: Annotated[str, typer.Option(help="dpo, ipo, kto, orpo, simpo, cpo, ppo, grpo, rloo or nash")] = "dpo",
    output: Annotated[Path, typer.Option(help="Folder that holds the runs")] = Path("runs"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the task, the models and the samples")] = 0,
) -> None:
    """Align a small model on a made-up task: no downloads.

    Makes the task, fine-tunes a small model on it, aligns it, and shows what changed.
    """
    # A model this small gains nothing from threads, and loses much where other programs hold the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from alignkit import registry

    registry.get(method)
    registry.get("sft")
    console.show_log()
    from alignkit.demo import run_demo

    typer.echo(run_demo(method, output, seed))
