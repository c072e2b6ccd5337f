"""`alignkit compare`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from alignkit.cli import console
from alignkit.insight import terminal

Text = str | None


def compare(
    methods: Annotated[str, typer.Option(help="all, or names, comma-separated")] = "all",
    model: Annotated[Text, typer.Option(help="Folder or hub name of the base  [default: the demo's]")] = None,
    data: Annotated[Text, typer.Option(help="Rows; 10 % of the prompts are held out  [default: the demo's]")] = None,
    eval_data: Annotated[Text, typer.Option(help="Held-out rows instead, in the same forms")] = None,
    reward: Annotated[Text, typer.Option(help="Reward that scores answers, see docs/rewards.md")] = None,
    judge: Annotated[Text, typer.Option(help="Judge that compares two answers, see docs/rewards.md")] = None,
    columns: console.Columns = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the runs and the samples")] = 0,
    output: Annotated[Path, typer.Option(help="Folder that holds the runs")] = Path("runs"),
    json: Annotated[Path | None, typer.Option(help="File for all numbers")] = None,
    png: Annotated[Path | None, typer.Option(help="File for a plot of win rate against KL")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, for the methods that have it")
    ] = None,
) -> None:
    """Train a base with every method that the rows can serve, and compare the results."""
    given = {"model": model, "data": data, "eval_data": eval_data, "reward": reward, "judge": judge}
    given = {k: console.value_of(v) if k in ("reward", "judge") else v for k, v in given.items() if v is not None}
    check(given, output, json, png)
    if not given:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for the demo
    console.show_log()
    from alignkit import compare as package

    if png:
        package.check_matplotlib()
    names = None if methods == "all" else [m.strip() for m in methods.split(",") if m.strip()]
    found = package.compare(given, console.named(columns) | console.pairs_of(more or []), names, output, seed)
    terminal.show(package.table(found))
    for note in package.notes(found):
        typer.echo(note)
    for name, reason in found.left_out.items():
        typer.echo(f"left out: {name}: {reason}")
    if json:
        package.write_json(found, json)
    if png:
        package.draw(found, png)
    raise typer.Exit(1 if any(row.failed for row in found.rows) else 0)


def check(given: dict[str, Any], output: Path, json: Path | None, png: Path | None) -> None:
    """Raise ConfigError where a task is incomplete, or an output file cannot be written."""
    from alignkit.errors import ConfigError

    missing = [f"--{name}" for name in ("model", "data") if given and name not in given]
    if missing:
        raise ConfigError(f"no {' and no '.join(missing)} given; leave out all of them to compare on the demo's task")
    for option, file in (("--json", json), ("--png", png)):
        terminal.check_target(option, file, output)
    if png and given and not given.keys() & {"reward", "judge"}:
        raise ConfigError("--png shows win rates, which need a --reward or a --judge")
