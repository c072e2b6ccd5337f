"""`alignkit init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.cli.commands.plan import bytes_of
from alignkit.insight import terminal

EXAMPLES = """\b
Examples:
  alignkit init --data prefs.jsonl --model MODEL
  alignkit init --method kto --data prefs.jsonl --model MODEL --lora 16 -o kto.yaml
  alignkit init --data prompts.jsonl --model MODEL --reward numeric --gpu-memory 24GB"""


def init(
    data: Annotated[str, typer.Option(help="Rows, as in a run")],
    model: Annotated[str, typer.Option(help="Folder or hub name of the model")],
    method: Annotated[str | None, typer.Option(help="A method's name  [default: the first of `recommend`]")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train adapters of this rank")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory that a run must fit into, such as 24GB")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward that scores samples, see docs/rewards.md")] = None,
    judge: Annotated[str | None, typer.Option(help="Judge that compares two samples, see docs/rewards.md")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out rows, in the same forms")] = None,
    columns: console.Columns = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write")] = Path("config.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file")] = False,
) -> None:
    """Write a file of settings to start from, each with a comment that gives the reason."""
    from alignkit.errors import ConfigError

    terminal.check_target("--output", output)
    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output '{output}': a file of settings must end in .yaml or .yml")
    if output.exists() and not force:
        raise ConfigError(f"'{output}' exists; give another --output, or --force to overwrite it")
    named, memory = console.columns_of(columns), bytes_of(gpu_memory)
    specs = {k: None if v is None else console.value_of(v) for k, v in (("reward", reward), ("judge", judge))}
    console.show_log()
    from alignkit.insight import recommend as package
    from alignkit.insight.model_paths import model_folder

    found = package.recommend(
        data, model=model, method=method, columns=named, eval_data=eval_data, lora=lora, memory=memory, **specs
    )
    method = package.write_config(found, output, model=model_folder(model), data=data, columns=named)
    typer.echo(f"{output}: {method}, with the reason for each setting")
    for caution in found.cautions:
        typer.echo(f"warning: {caution}")
    if found.fit:
        typer.echo(f"memory: {found.fit.sentence}")
    typer.echo(f"next: alignkit validate {shlex.quote(str(output))}")
