"""Tables of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.insight.report import curves, run_facts
from alignkit.insight.report.numbers import number
from alignkit.insight.report.run_files import Run
from alignkit.runs.results import in_training, outcomes

Table = tuple[list[str], list[list[str]]]
"""Columns, and rows of cells."""


def side_by_side(each: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> Table:
    """Return one row per run and one column per fact that any of them has."""
    keys = list(dict.fromkeys(name for _, pairs in each for name, _ in pairs))
    rows = [[label, *(dict(pairs).get(key, "-") for key in keys)] for label, pairs in each]
    return ["run", *keys], rows


def environment(runs: Sequence[Run]) -> Table | None:
    """Return one row per fact and one column per run, None where all environments are equal."""
    each = [run_facts.environment(run) for run in runs]
    if all(one == each[0] for one in each):
        return None
    keys = dict.fromkeys(name for one in each for name, _ in one)
    return ["", *(run.label for run in runs)], [[key, *(dict(one).get(key, "-") for one in each)] for key in keys]


@dataclass(frozen=True)
class Results:
    """The main metrics. compared: whether any was measured twice; note: what "*" marks, empty without one."""

    table: Table
    compared: bool
    note: str


def results(runs: Sequence[Run]) -> Results:
    """Return one row per metric, with its values before and after, or its only one; "*" marks training rows."""
    each = [{o.name: o for o in outcomes(run.lines)} for run in runs]
    every = [o for one in each for o in one.values()]
    compared = any(o.compared for o in every)
    rows = []
    for name in dict.fromkeys(o.name for o in every):
        cells = []
        for one in each:
            o = one.get(name)
            values = (None, None) if o is None else (o.before, o.after) if compared else (o.last,)
            mark = "" if o is None or o.held_out else " *"
            cells += ["-" if v is None else number(v) + mark for v in values[: 2 if compared else 1]]
        rows.append([name, curves.unit(name), *cells])
    heads = ["before", "after"] if compared else ["value"]
    if len(runs) > 1:
        heads = [f"{run.label}, {when}" if compared else run.label for run in runs for when in heads]
    note = "" if all(o.held_out for o in every) else in_training(every)
    return Results((["metric", "unit", *heads], rows), compared, note)
