"""`alignkit methods`, `alignkit settings` and `alignkit validate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console


def methods() -> None:
    """List the installed methods, and broken ones with their problem."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from alignkit import registry

    table = Table("method", "data", "roles", "distribution", "version", box=None, pad_edge=False)
    found = registry.plugins()
    for p in found:
        if p.method is None:
            table.add_row(p.name, "broken", "", p.distribution, p.version)
        else:
            table.add_row(p.name, p.method.data, ", ".join(sorted(p.method.uses)), p.distribution, p.version)
    shown = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    shown.print(table if found else "no method is installed; try: pip install alignkit-dpo")
    for p in found:
        if p.problem:
            shown.print(f"broken: {escape(p.problem)}")


def settings(
    method: Annotated[str, typer.Argument(help="A method's name", metavar="METHOD")],
) -> None:
    """List every setting of a run with a method: name, default, values, meaning."""
    from alignkit import registry
    from alignkit.config import RunConfig

    own = registry.get(method).Config
    for title, cls in ((f"settings of {method}", own), ("settings of every run", RunConfig)):
        typer.echo(f"{title}:")
        for name, default, values, meaning in console.described(cls):
            typer.echo(f"  {name:23} {default:12} {meaning} ({values})")
    typer.echo(f"\nIn YAML: `name: value`. As options: `alignkit run {method} ... --set name=value`.")


def validate(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings", metavar="CONFIG")],
    columns: console.Columns = None,
) -> None:
    """Check a YAML file and every row of its data without loading a model."""
    checked, method = console.checked(console.settings_of(str(config), console.named(columns), [], only_file=True))
    console.show_log()
    from alignkit.engine import assemble, reading
    from alignkit.models import loading
    from alignkit.rewards import check_columns
    from alignkit.rollout.checks import check_online
    from alignkit.runs.callbacks import load_callbacks
    from alignkit.unused import check_used

    check_used(checked, method)
    check_online(checked, method)
    load_callbacks(checked.callbacks)
    rows = reading.read(checked, method, loading.load_tokenizer(checked))
    assemble.least_examples(checked, method, rows, n_ranks=1)
    check_columns(checked.reward, checked.judge, {name for e in (*rows.train, *rows.held_out) for name in e.columns})
    typer.echo(f"{config}: valid, ready to run with '{checked.method}'")
