"""`alignkit inspect reward` and `alignkit inspect pair`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console

app = typer.Typer(help="Inspect a model token by token.", no_args_is_help=True)

Json = Annotated[Path | None, typer.Option(help="Write all numbers to this file")]
Html = Annotated[Path | None, typer.Option(help="Write an HTML page to this file")]


@app.command(no_args_is_help=True)
def reward(
    spec: Annotated[
        str, typer.Argument(help="A reward model's folder, or any reward, see docs/rewards.md", metavar="REWARD")
    ],
    text: Annotated[str, typer.Option(help="The answer")],
    prompt: Annotated[str, typer.Option(help="The prompt of the answer")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message, for a chat template")] = False,
    json: Json = None,
    html: Html = None,
) -> None:
    """Show a reward at every prefix of an answer: which tokens raise it, and which lower it."""
    _check(json, html)
    console.show_log()
    from alignkit.insight import inspect as tokens

    given = [{"role": "user", "content": prompt}] if chat else prompt
    found = tokens.reward_prefixes(console.value_of(spec), text, given)
    tokens.print_prefixes(found)
    if json:
        tokens.write_json(found, json)
    if html:
        tokens.write_html(found, html)


@app.command(no_args_is_help=True)
def pair(
    policy: Annotated[str, typer.Option(help="Folder or hub name of the model, its adapter, or its run")],
    reference: Annotated[
        str | None, typer.Option(help="Folder or hub name of the reference  [default: an adapter's base]")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Pairs, as in a run")] = None,
    columns: console.Columns = None,
    row: Annotated[int, typer.Option(min=1, help="The row of the pair")] = 1,
    prompt: Annotated[str, typer.Option(help="Instead of --data")] = "",
    chosen: Annotated[str | None, typer.Option(help="Instead of --data")] = None,
    rejected: Annotated[str | None, typer.Option(help="Instead of --data")] = None,
    beta: Annotated[float, typer.Option(help="DPO's beta, for the margin")] = 0.1,
    json: Json = None,
    html: Html = None,
) -> None:
    """Show log policy - log reference on every token of a chosen and a rejected answer."""
    from alignkit.errors import ConfigError

    _check(json, html)
    given = chosen is not None and rejected is not None
    if given == (data is not None) or (chosen is None) != (rejected is None):
        raise ConfigError("give either --data and --row, or --prompt, --chosen and --rejected")
    console.show_log()
    from alignkit.insight import inspect as tokens

    rows = data if data is not None else [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
    one = tokens.pair_of(rows, row if data is not None else 1, console.columns_of(columns))
    found = tokens.pair_ratios(policy, one, reference)
    tokens.print_pair(found, beta)
    if json:
        tokens.write_json(found, json)
    if html:
        tokens.write_html(found, html)


def _check(json: Path | None, html: Path | None) -> None:
    from alignkit.insight.output_files import check_targets

    check_targets({"--json": json, "--html": html})
