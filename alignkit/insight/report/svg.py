"""A line chart as inline SVG: axes with units, gaps where a value is missing, values on hover, nothing that runs.

Lines differ in colour and in dashes, points in shape, so that they can be told apart on grey paper too. Colours are the
page's variables, so a chart is light or dark as its page is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from alignkit.insight.report.ticks import domain, finite, labels, number, ticks

WIDTH, HEIGHT = 360, 196
TOP, RIGHT, BOTTOM = 14, 12, 22
POINTS = 600  # of a line; more than that are thinned
STRIPS = 60  # parts of a chart with a hover text of their own
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 3", "12 3 2 3 2 3")
MARKERS = ("circle", "square", "triangle", "diamond")
COLOURS = 7

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """A line, or points joined by a thin one. points: (step, value), steps rising; None, nan and inf make a gap.

    style: chooses colour and dashes. held_out: drawn as points.
    """

    label: str
    points: Sequence[Point]
    style: int = 0
    held_out: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a vertical line with a short label; text: its words on hover."""

    step: float
    label: str
    text: str


@dataclass(frozen=True)
class Frame:
    """The area that values are drawn in: from steps and values to pixels."""

    left: float
    steps: tuple[float, float]
    values: tuple[float, float]

    def x(self, step: float) -> float:
        """Return the distance from the left edge."""
        low, high = self.steps
        return self.left + (step - low) / (high - low) * (WIDTH - RIGHT - self.left)

    def y(self, value: float) -> float:
        """Return the distance from the upper edge."""
        low, high = self.values
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)


def chart(
    name: str, unit: str, series: Sequence[Series], marks: Sequence[Mark] = (), band: tuple[float, float] | None = None
) -> Markup:
    """Return the chart of one metric. series without any finite value are left out; with none the axes stand alone.

    band: values between which the ground is shaded.
    """
    values = [v for s in series for _, v in s.points if finite(v)]
    steps = [x for s in series for x, _ in s.points]
    frame, at = _frame(steps, [v for v in values if v is not None])
    parts = [_band(frame, *band)] if band else []
    parts.append(_axes(frame, at, unit))
    parts += [_mark(frame, m) for m in marks if frame.steps[0] <= m.step <= frame.steps[1]]
    parts += [_line(frame, s) for s in series]
    parts += [_strips(frame, series)]
    parts += [_points(frame, s) for s in series if s.held_out]
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{name}, {unit}" if unit else name, Markup("\n").join(parts)
    )


def sample(style: int, held_out: bool) -> Markup:
    """Return a short piece of a series' line, for a legend."""
    line = Markup('<path class="{} c{}" d="M1 7H31" stroke-dasharray="{}"/>').format(
        "thin" if held_out else "line", style % COLOURS, DASHES[style % len(DASHES)]
    )
    dot = _marker(16, 7, style, "") if held_out else Markup("")
    return Markup('<svg class="sample" viewBox="0 0 32 14" aria-hidden="true">{}{}</svg>').format(line, dot)


def thin(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """Return at most about `limit` of the points, in order: the lowest and the highest of each bucket, and its gaps.

    First and last stay. So a spike of one step is as high as it was, however long the run.
    """
    if len(points) <= limit:
        return list(points)
    n, kept = len(points), {0, len(points) - 1}
    buckets = max(1, limit // 2)
    for b in range(buckets):
        inside = range(b * n // buckets, (b + 1) * n // buckets)
        there = [i for i in inside if finite(points[i][1])]
        if there:
            kept |= {min(there, key=lambda i: points[i][1] or 0.0), max(there, key=lambda i: points[i][1] or 0.0)}
        if len(there) < len(inside):
            kept.add(next(i for i in inside if not finite(points[i][1])))
    return [points[i] for i in sorted(kept)]


def _frame(steps: Sequence[float], values: Sequence[float]) -> tuple[Frame, list[float]]:
    """Return the frame and the ticks of its value axis."""
    low, high = (min(steps), max(steps)) if steps else (0.0, 1.0)
    if low == 1.0:  # training begins at step 1, which is after nothing
        low = 0.0
    if low == high:
        low, high = low - 1.0, high + 1.0
    of_values = domain(values)
    at = ticks(*of_values)
    longest = max((len(text) for text in labels(at)), default=1)
    return Frame(max(44.0, 12 + 6.4 * longest), (low, high), of_values), at


def _axes(frame: Frame, at: Sequence[float], unit: str) -> Markup:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value, text in zip(at, labels(at), strict=True):
        y = frame.y(value)
        parts.append(Markup('<path class="rule" d="M{:.1f} {:.2f}H{}"/>').format(frame.left, y, right))
        parts.append(Markup('<text class="y" x="{:.1f}" y="{:.2f}">{}</text>').format(frame.left - 6, y + 3.6, text))
    steps = ticks(*frame.steps, most=7, whole=True)
    for value, text in zip(steps, labels(steps), strict=True):
        x = frame.x(value)
        parts.append(Markup('<path class="axis" d="M{:.2f} {}v4"/>').format(x, floor))
        parts.append(Markup('<text class="x" x="{:.2f}" y="{}">{}</text>').format(x, floor + 15, text))
    parts.append(Markup('<path class="axis" d="M{:.1f} {}H{}"/>').format(frame.left, floor, right))
    parts.append(Markup('<text class="y" x="{:.1f}" y="{}">step</text>').format(frame.left - 10, floor + 15))
    return Markup("\n").join(parts)


def _band(frame: Frame, low: float, high: float) -> Markup:
    below, above = frame.values
    top, floor = frame.y(min(max(high, below), above)), frame.y(max(min(low, above), below))
    return Markup('<rect class="band" x="{:.1f}" y="{:.2f}" width="{:.1f}" height="{:.2f}"/>').format(
        frame.left, top, WIDTH - RIGHT - frame.left, floor - top
    )


def _line(frame: Frame, series: Series) -> Markup:
    """A path with a gap at each value that is missing; a value between two gaps is a dot."""
    points = thin(series.points)
    path, dots = [], []
    for i, (step, value) in enumerate(points):
        if not finite(value):
            continue
        before = i > 0 and finite(points[i - 1][1])
        after = i + 1 < len(points) and finite(points[i + 1][1])
        x, y = frame.x(step), frame.y(value)
        path.append(f"{'L' if before else 'M'}{x:.1f} {y:.1f}")
        if not before and not after and not series.held_out:
            dots.append(
                Markup('<circle class="c{} dot" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(_colour(series), x, y)
            )
    kind = "thin" if series.held_out else "line"
    line = Markup('<path class="{} c{}" d="{}" stroke-dasharray="{}"/>').format(
        kind, _colour(series), "".join(path), DASHES[series.style % len(DASHES)]
    )
    return Markup("").join([line, *dots])


def _points(frame: Frame, series: Series) -> Markup:
    shown = [(x, v) for x, v in thin(series.points, 2 * STRIPS) if finite(v)]
    return Markup("").join(
        _marker(frame.x(x), frame.y(v), series.style, f"{series.label}, step {number(x)}: {number(v)}")
        for x, v in shown
    )


def _marker(x: float, y: float, style: int, title: str) -> Markup:
    shape = MARKERS[style % len(MARKERS)]
    shapes = {
        "circle": f"M{x - 3.4:.1f} {y:.1f}a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
        "square": f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        "triangle": f"M{x:.1f} {y - 4:.1f}l3.8 6.8h-7.6z",
        "diamond": f"M{x:.1f} {y - 4.2:.1f}l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
    }
    words = Markup("<title>{}</title>").format(title) if title else ""
    return Markup('<path class="marker c{}" d="{}">{}</path>').format(style % COLOURS, shapes[shape], words)


def _mark(frame: Frame, mark: Mark) -> Markup:
    x = frame.x(mark.step)
    return Markup(
        '<g class="mark"><title>{}</title><path d="M{:.1f} {}V{}"/><text x="{:.1f}" y="{}">{}</text></g>'
    ).format(mark.text, x, TOP - 1, HEIGHT - BOTTOM, x, TOP - 4, mark.label)


def _strips(frame: Frame, series: Sequence[Series]) -> Markup:
    """Vertical strips that say on hover what is at their steps."""
    steps = sorted({x for s in series for x, _ in s.points})
    n = min(STRIPS, len(steps))
    groups = [steps[i * len(steps) // n : (i + 1) * len(steps) // n] for i in range(n)]
    between = [frame.x((a[-1] + b[0]) / 2) for a, b in pairwise(groups)]
    first, last = (frame.x(step) for step in frame.steps)
    parts = []
    for group, left, right in zip(groups, [first, *between], [*between, last], strict=False):
        words = "\n".join([_span(group), *_said(series, group[0], group[-1])])
        parts.append(
            Markup('<rect class="strip" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
                left, TOP, right - left, HEIGHT - TOP - BOTTOM, words
            )
        )
    return Markup("").join(parts)


def _span(group: Sequence[float]) -> str:
    if group[0] == group[-1]:
        return f"step {number(group[0])}"
    return f"steps {number(group[0])} to {number(group[-1])}"


def _said(series: Sequence[Series], first: float, last: float) -> Iterator[str]:
    for s in series:
        inside = s.points[bisect_left(s.points, first, key=_step) : bisect_right(s.points, last, key=_step)]
        there = [v for _, v in inside if finite(v)]
        if not inside:
            continue
        if not there:
            yield f"{s.label}: not finite"
        elif len(inside) == 1:
            yield f"{s.label}: {number(there[0])}"
        else:
            yield f"{s.label}: {number(min(there))} to {number(max(there))}"


def _step(point: Point) -> float:
    return point[0]


def _colour(series: Series) -> int:
    return series.style % COLOURS
