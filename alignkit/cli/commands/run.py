"""`alignkit run`."""

from __future__ import annotations

from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.runs.terminal import rank

Text = str | None
EXAMPLES = """\b
Examples:
  alignkit run dpo --model MODEL --data prefs.jsonl --set beta=0.2
  alignkit run dpo --model MODEL --data prefs.jsonl --lora 16 --eval-fraction 0.05
  alignkit run config.yaml --seed 1
  alignkit run runs/dpo-001/config.yaml --resume

Options override the YAML file, --set overrides both."""


def run(
    what: Annotated[str, typer.Argument(help="A method's name, or a YAML file of settings", metavar="METHOD|CONFIG")],
    model: Annotated[Text, typer.Option(help="Folder or hub name of the model")] = None,
    data: Annotated[Text, typer.Option(help="JSONL, JSON, Parquet or CSV file, folder, glob, or hub name")] = None,
    eval_data: Annotated[Text, typer.Option(help="Held-out rows, in the same forms")] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="Fraction of the data to hold out, such as 0.05")] = None,
    columns: console.Columns = None,
    output: Annotated[Text, typer.Option(help="Folder of all runs  [default: runs]")] = None,
    name: Annotated[Text, typer.Option(help="Name of this run's folder  [default: METHOD-001, ...]")] = None,
    reference: Annotated[Text, typer.Option(help="auto, full, int8, adapter-off or cached  [default: auto]")] = None,
    reward: Annotated[Text, typer.Option(help="Reward of samples: a name, module:function, or folder")] = None,
    judge: Annotated[Text, typer.Option(help="Judge of two samples, in the same forms")] = None,
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank instead of all weights")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data  [default: 1]")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; overrides --epochs")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in an optimiser step  [default: 32]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate  [default: the method's]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random  [default: 0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run --name from its last checkpoint")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model")
    ] = False,
    allow_changed_models: Annotated[
        bool, typer.Option("--allow-changed-models", help="Resume although a model changed since the start")
    ] = False,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; see `alignkit settings METHOD`"),
    ] = None,
) -> None:
    """Train a model with a method, or with a YAML file of settings."""
    given = {k: v for k, v in locals().items() if k not in ("what", "more") and v is not None and v is not False}
    given |= {name: console.value_of(given[name]) for name in ("reward", "judge") if name in given}
    settings = console.settings_of(what, given | console.named(columns), more or [])
    console.checked(settings)
    console.show_log()
    from alignkit.engine import Engine

    result = Engine().run(**settings)
    if rank() == 0:
        typer.echo(f"model: {result.folder / 'model'}")
