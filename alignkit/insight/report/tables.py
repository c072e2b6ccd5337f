"""Facts of several runs as tables."""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.card import outcomes
from alignkit.insight.report import curves, facts
from alignkit.insight.report.read import Run
from alignkit.insight.report.ticks import number

Table = tuple[list[str], list[list[str]]]
"""Columns, and rows of cells."""


def side_by_side(each: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> Table:
    """Return a row for each run and a column for each fact that any of them has."""
    keys = list(dict.fromkeys(name for _, facts_of in each for name, _ in facts_of))
    rows = [[label, *(dict(facts_of).get(key, "-") for key in keys)] for label, facts_of in each]
    return ["run", *keys], rows


def environment(runs: Sequence[Run]) -> Table | None:
    """Return a row for each fact and a column for each run, None where all ran on the same."""
    each = [facts.environment(run) for run in runs]
    if all(one == each[0] for one in each):
        return None
    keys = dict.fromkeys(name for one in each for name, _ in one)
    return ["", *(run.label for run in runs)], [[key, *(dict(one).get(key, "-") for one in each)] for key in keys]


def results(runs: Sequence[Run]) -> Table:
    """Return a row for each metric, with its values before and after; "*" marks those of training rows."""
    each = [{o.name: o for o in outcomes(run.lines)} for run in runs]
    names = dict.fromkeys(name for one in each for name in one)
    rows = []
    for name in names:
        cells = []
        for one in each:
            o = one.get(name)
            mark = "" if o is None or o.held_out else " *"
            cells += ["-", "-"] if o is None else [number(o.before) + mark, number(o.after) + mark]
        rows.append([name, curves.unit(name), *cells])
    if len(runs) == 1:
        return ["metric", "unit", "before", "after"], rows
    return ["metric", "unit", *(f"{run.label}, {when}" for run in runs for when in ("before", "after"))], rows
