"""The metrics that are shown as curves, their order and their units."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alignkit.alarms import HEALTHY_KL
from alignkit.insight.report.charts import Mark, Series, alarm_sample, chart, sample
from alignkit.insight.report.numbers import Point, finite, number
from alignkit.insight.report.run_files import Run
from alignkit.runs.folder import EVAL
from alignkit.runs.results import RESULTS

_GROUPS = (
    ("Reward and loss", r"wins/.*|rewards?/.*|advantage/.*|loss"),
    ("Distance from the reference", r"kl|kl/.*|entropy|clip_fraction|ratio/max|logps/.*|logratios/.*|rollout/.*"),
    ("Length and variety", r"completion/.*|length/.*"),
    ("Optimiser and speed", r"grad_norm|lr|skipped|tokens_per_second|seconds/.*"),
)
_UNITS = (
    (r"kl", "nats a sequence"),
    (r"entropy", "nats a token"),
    (r"logps/.*", "nats a completion"),
    (r"logratios/.*", "nats a token, policy against reference"),
    (r"wins/mean", "probability"),
    (r"rewards/accuracy", "fraction of pairs"),
    (r"rewards?/.*", "reward"),
    (r"clip_fraction", "fraction of tokens"),
    (r"completion/eos_rate", "fraction that ended"),
    (r"completion/distinct_2", "fraction of pairs of tokens"),
    (r"completion/length|length/.*", "tokens"),
    (r"advantage/zero_variance_groups", "groups of a step"),
    (r"ratio/max", "policy / sampling policy"),
    (r"rollout/kl", "nats a token, sampler against trainer"),
    (r"rollout/ratio_.*", "trainer / sampler"),
    (r"rollout/corrected", "fraction of tokens"),
    (r"grad_norm", "before clipping"),
    (r"lr", "learning rate"),
    (r"skipped", "updates skipped so far"),
    (r"tokens_per_second", "tokens a second"),
    (r"seconds/.*", "seconds a step"),
)
_FEW = 4  # points that are drawn even where they are equal
_NOT_DRAWN = re.compile(r"step|epoch|alarm/.*")


@dataclass(frozen=True)
class Panel:
    """The chart of one metric. same: other metrics with the same numbers, which are not drawn again."""

    name: str
    unit: str
    same: list[str]
    chart: Markup


@dataclass
class Group:
    """Panels under one heading. constant: "name value" of metrics that never change, which are not drawn."""

    title: str
    panels: list[Panel]
    constant: list[str]


def groups(runs: Sequence[Run], marks: Sequence[Mark]) -> list[Group]:
    """Return the curves of all runs, one chart per metric; a metric that no pattern matches is a term of the loss."""
    made = {title: Group(title, [], []) for title, _ in _GROUPS}
    seen: dict[tuple[tuple[Point, ...], ...], Panel] = {}
    for name in names(runs):
        series = list(_series(runs, name))
        group = made[next((t for t, pattern in _GROUPS if re.fullmatch(pattern, name)), _GROUPS[0][0])]
        numbers = tuple(tuple(s.points) for s in series)
        values = [v for s in series for _, v in s.points]
        if len(values) > _FEW and len(set(values)) == 1:
            group.constant.append(f"{name} {number(values[0])}")
        elif numbers in seen:
            seen[numbers].same.append(name)
        else:
            in_units, band = unit(name), HEALTHY_KL if name == "kl" else None
            caption = f"{in_units}; shaded: {band[0]:g} to {band[1]:g}" if band else in_units
            seen[numbers] = Panel(name, caption, [], chart(name, in_units, series, marks, band))
            group.panels.append(seen[numbers])
    return [group for group in made.values() if group.panels or group.constant]


def names(runs: Sequence[Run]) -> list[str]:
    """Return the metrics of all runs without "eval/": RESULTS first, then in the order of the file."""
    found: dict[str, None] = {}
    for run in runs:
        for line in run.lines:
            found |= dict.fromkeys(key.removeprefix(EVAL) for key, v in line.items() if finite(v))
    drawn = [n for n in found if not _NOT_DRAWN.fullmatch(n)]
    return sorted(drawn, key=lambda n: RESULTS.index(n) if n in RESULTS else len(RESULTS))


def unit(name: str) -> str:
    """Return the unit of a metric, as in docs/run.md; empty for unknown metrics."""
    return next((unit for pattern, unit in _UNITS if re.fullmatch(pattern, name)), "")


def legend(runs: Sequence[Run]) -> list[tuple[Markup, str]]:
    """Return a sample of each line with its label: training and held-out rows of one run, else the runs; and alarms."""
    held_out = any(key.startswith(EVAL) for run in runs for line in run.lines for key in line)
    if len(runs) == 1:
        lines = [(sample(0, False), "training"), *([(sample(1, True), "held-out rows")] if held_out else [])]
    else:
        lines = [(sample(i, False), run.label) for i, run in enumerate(runs)]
        lines += [(sample(0, True), "with points: held-out rows")] if held_out else []
    return [*lines, *([(alarm_sample(), "alarm, by its number")] if any(run.alarms for run in runs) else [])]


def _series(runs: Sequence[Run], name: str) -> Iterator[Series]:
    for i, run in enumerate(runs):
        training = _points(run, name)
        held_out = _points(run, EVAL + name)
        if len(runs) == 1:
            labels, styles = ("training", "held-out rows"), (0, 1)
        else:
            labels, styles = (run.label, f"{run.label}, held-out rows"), (i, i)
        if training:
            yield Series(labels[0], training, styles[0])
        if held_out:
            yield Series(labels[1], held_out, styles[1], held_out=True)


def _points(run: Run, name: str) -> list[Point]:
    found = [(float(line["step"]), line[name]) for line in run.lines if name in line]
    return sorted(((x, float(v) if finite(v) else None) for x, v in found), key=lambda point: point[0])
