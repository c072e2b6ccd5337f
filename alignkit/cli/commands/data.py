"""`alignkit data show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.errors import ConfigError

app = typer.Typer(help="Look at rows as a run reads them.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `show` a command of its own while it is the only one."""


@app.command(no_args_is_help=True)
def show(
    data: Annotated[str, typer.Argument(help="Rows, as in a run", metavar="DATA")],
    model: Annotated[str, typer.Option(help="Its tokenizer and chat template: folder or hub name")],
    row: Annotated[int, typer.Option(min=1, help="The row, counted from 1")] = 1,
    method: Annotated[str | None, typer.Option(help="Read the row as this method does")] = None,
    columns: console.Columns = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of a run, such as train_on=last", metavar="KEY=VALUE")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write it to this file")] = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page to this file")] = None,
) -> None:
    """Show what one row becomes: its text, and which tokens are given, read, learned or cut."""
    from alignkit import registry
    from alignkit.config import RunConfig, gathered, validated
    from alignkit.hints import hint
    from alignkit.insight import inspect as rows
    from alignkit.insight.model_paths import model_folder
    from alignkit.insight.output_files import check_targets

    check_targets({"--json": json, "--html": html})
    given = gathered(console.pairs_of(settings or []))
    if unknown := next((name for name in given if name not in RunConfig.model_fields), None):
        raise ConfigError(f"--set {unknown}: no such setting of a run.{hint(unknown, RunConfig.model_fields, method)}")
    kind = registry.get(method).data if method else None
    named = console.columns_of(columns)
    config = validated(
        RunConfig, {"columns": named, **given, "method": method or "-", "model": model_folder(model), "data": "-"}
    )
    view = rows.row_view(data, row, config, kind)
    rows.print_row(view)
    if json:
        rows.write_row_json(view, json)
    if html:
        rows.write_row_html(view, html)
