"""`alignkit best-of-n`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.insight import terminal

EXAMPLES = """\b
Examples:
  alignkit best-of-n --model MODEL --data prompts.jsonl --reward runs/reward-001/model --n 16
  alignkit best-of-n --model MODEL --data prompts.jsonl --reward numeric --pairs pairs.jsonl
  alignkit run dpo --model MODEL --data pairs.jsonl"""


def best_of_n(
    model: Annotated[str, typer.Option(help="Folder or hub name of the model, its adapter, or its run")],
    data: Annotated[str, typer.Option(help="Rows with prompts, as in a run")],
    reward: Annotated[str, typer.Option(help="Reward that chooses the best, see docs/rewards.md")],
    gold: Annotated[str | None, typer.Option(help="A second reward, which is reported and chooses nothing")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Samples of each prompt")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this number of prompts, the first ones")] = None,
    output: Annotated[Path, typer.Option(help="Write the best completions to this file")] = Path("best.jsonl"),
    pairs: Annotated[Path | None, typer.Option(help="Write pairs of the best and the worst to this file")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the curve to this file")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the curve to this file; needs matplotlib")] = None,
    columns: console.Columns = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="sampling.temperature, seed, ...: as in a run"),
    ] = None,
) -> None:
    """Sample n answers per prompt and keep the best; show the reward of the best against its KL."""
    from alignkit.insight.output_files import check_targets

    check_targets({"--output": output, "--pairs": pairs, "--json": json, "--png": png})
    named, settings = console.columns_of(columns), console.pairs_of(more or [])
    console.show_log()
    from alignkit.compare import check_matplotlib
    from alignkit.insight import best_of_n as bon

    if png:
        check_matplotlib()
    specs = {"reward": console.value_of(reward), "gold": None if gold is None else console.value_of(gold)}
    found = bon.best_of_n(model, data, n=n, limit=limit, columns=named, settings=settings, **specs)
    bon.write_best(found, output)
    terminal.show(bon.table(found))
    typer.echo(
        f"best: {output}, {sum(not a.ended[a.best] for a in found.asked)} of {len(found.asked)} cut before their end"
    )
    if cut := sum(a.prompt_cut for a in found.asked):
        typer.echo(f"prompts cut before sampling: {cut}; train with the same max_prompt_tokens")
    if pairs:
        counts = bon.write_pairs(found, pairs)
        typer.echo(f"pairs: {pairs}, {counts['written']}; left out: {counts['equal']} equal, {counts['cut']} cut")
    if json:
        bon.write_json(found, json)
    if png:
        bon.draw(found, png)
