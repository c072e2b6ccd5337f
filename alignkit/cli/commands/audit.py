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
    data: Annotated[str, typer.Argument(help="Rows, as in a run", metavar="DATA")],
    eval_data: Annotated[str | None, typer.Option(help="Held-out rows, checked for shared prompts")] = None,
    columns: console.Columns = None,
    model: Annotated[str | None, typer.Option(help="Its tokenizer counts tokens: folder or hub name")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward that scores answers, see docs/rewards.md")] = None,
    asked: Annotated[int, typer.Option(min=2, help="Rows that the reward scores")] = 500,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="As in a run, with --model  [default: 1024]")
    ] = None,
    max_completion_tokens: Annotated[
        int | None, typer.Option(min=1, help="As in a run, with --model  [default: 1024]")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file")] = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page to this file")] = None,
) -> None:
    """Audit preference data: repeats, contradictions, lengths, biases; with --reward, what a reward favours."""
    from alignkit.insight.output_files import check_targets

    check_targets({"--json": json, "--html": html})
    given = {"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens}
    limits = {name: limit for name, limit in given.items() if limit is not None}
    if limits and model is None:
        option = f"--{next(iter(limits)).replace('_', '-')}"
        raise ConfigError(f"{option} counts tokens, which needs a tokenizer; give --model too, or leave it out")
    named = console.columns_of(columns)
    console.show_log()
    from alignkit.insight import audit as audits

    found = audits.audit(
        data,
        eval_data=eval_data,
        columns=named,
        model=model,
        reward=None if reward is None else console.value_of(reward),
        asked=asked,
        **limits,
    )
    audits.print_audit(found)
    if json:
        audits.write_json(found, json)
    if html:
        audits.write_html(found, html)
