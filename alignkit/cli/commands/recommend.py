"""`alignkit recommend`."""

from __future__ import annotations

import json as js
import shlex
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.cli.commands.plan import bytes_of
from alignkit.insight import terminal

EXAMPLES = """\b
Examples:
  alignkit recommend --data prefs.jsonl
  alignkit recommend --data prefs.jsonl --model MODEL --gpu-memory 24GB
  alignkit recommend --data prompts.jsonl --reward numeric"""


def recommend(
    data: Annotated[str, typer.Option(help="Rows, as in a run")],
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the model, to count tokens")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory that a run must fit into, such as 24GB")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward that scores samples, see docs/rewards.md")] = None,
    judge: Annotated[str | None, typer.Option(help="Judge that compares two samples, see docs/rewards.md")] = None,
    columns: console.Columns = None,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file")] = None,
) -> None:
    """Show which installed methods the rows can serve, which to start with, and why; loads no model."""
    terminal.check_target("--json", json)
    named, memory = console.columns_of(columns), bytes_of(gpu_memory)
    specs = {k: None if v is None else console.value_of(v) for k, v in (("reward", reward), ("judge", judge))}
    console.show_log()
    from alignkit.insight import recommend as package

    found = package.recommend(data, model=model, columns=named, memory=memory, **specs)
    package.print_recommendation(found)
    if found.first is not None:
        given = {"data": data, "model": model or "MODEL", "gpu-memory": gpu_memory, "reward": reward, "judge": judge}
        words = [f"--{k} {shlex.quote(v)}" for k, v in {**given, "columns": columns}.items() if v is not None]
        typer.echo(f"\nnext: alignkit init {' '.join(words)}")
    if json:
        from alignkit.files import write_text

        write_text(json, js.dumps(found.describe(), indent=1) + "\n")
