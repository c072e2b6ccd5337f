"""`alignkit audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.errors import ConfigError

EXAMPLES = """\b
Examples:
  alignkit audit prefs.jsonl
  alignkit audit prefs.jsonl --model MODEL --eval-data held-out.jsonl
  alignkit audit prefs.jsonl --reward runs/reward-001/model --html audit.html"""


def audit(
    data: Annotated[str, typer.Argument(help="Rows, as of a run", metavar="DATA")],
    eval_data: Annotated[str | None, typer.Option(help="Held-out rows: do they share prompts?")] = None,
    columns: Annotated[str | None, typer.Option(help="Names of columns, such as '{prompt: question}'")] = None,
    model: Annotated[str | None, typer.Option(help="Its tokenizer counts tokens: folder or hub name")] = None,
    reward: Annotated[str | None, typer.Option(help="What scores answers, see docs/rewards.md")] = None,
    asked: Annotated[int, typer.Option(min=2, help="Rows that the reward is asked about")] = 500,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="As of a run, with --model  [default: 1024]")
    ] = None,
    max_completion_tokens: Annotated[
        int | None, typer.Option(min=1, help="As of a run, with --model  [default: 1024]")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for all numbers")] = None,
    html: Annotated[Path | None, typer.Option(help="File for a page to read")] = None,
) -> None:
    """Look through preference data: repeats, contradictions, lengths, biases; with --reward, what a reward favours."""
    from alignkit.insight.output_files import check_targets

    check_targets({"--json": json, "--html": html})
    asked_for = {"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens}
    limits = {name: limit for name, limit in asked_for.items() if limit is not None}
    if limits and model is None:
        option = f"--{next(iter(limits)).replace('_', '-')}"
        raise ConfigError(f"{option} is in tokens, which only a tokenizer counts; give --model too, or leave it out")
    named = console.columns_of(columns)
    console.speak()
    from alignkit.insight import audit as room

    found = room.audit(
        data,
        eval_data=eval_data,
        columns=named,
        model=model,
        reward=None if reward is None else console.value_of(reward),
        asked=asked,
        **limits,
    )
    room.print_audit(found)
    if json:
        room.write_json(found, json)
    if html:
        room.write_html(found, html)
