"""A line chart as inline SVG, drawn by matplotlib: gaps where a value is missing, values on hover, nothing that runs.

Lines differ in colour and dashes, points in shape, so that they are distinct in greyscale too. matplotlib is in the
extra "report", not a requirement: it adds seven distributions, and machines that only train do not draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from alignkit.insight.report.inline_svg import COLOURS, hover, inline
from alignkit.insight.report.numbers import Point, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 360, 204  # points, of which a CSS pixel is 0.75; the page scales them
DASHES = ((), (7, 3), (2, 2.5), (9, 3, 2, 3), (4, 3), (12, 3, 2, 3, 2, 3))
MARKERS = ("o", "s", "^", "D")
LINES = 7  # colours of the page for lines: s0 to s6
POINTS = 60  # of held-out rows that get a marker; the line goes through all
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "alignkit",
    "path.simplify_threshold": 1.0,  # pixels: 10,000 noisy steps become some 1,000 points, spikes as high as they were
    "font.size": 11,
    "lines.scale_dashes": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.xmargin": 0,
    "axes.ymargin": 0.06,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": COLOURS["rule"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "ytick.major.size": 0,
}


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
    """An event at a step: a vertical line with a short label. text: what happened, shown on hover."""

    step: float
    label: str
    text: str


def chart(
    name: str, unit: str, series: Sequence[Series], marks: Sequence[Mark] = (), band: tuple[float, float] | None = None
) -> Markup:
    """Return the chart of one metric. Series without any finite value are left out; without any the axes are empty.

    band: values between which the background is shaded.
    """
    with _figure(WIDTH, HEIGHT) as figure:
        axes = figure.add_subplot(xlabel="step")
        _plot(axes, series)
        steps = axes.get_xlim()
        inside = [mark for mark in marks if steps[0] <= mark.step <= steps[1]]
        for mark in inside:
            _mark(axes, mark)
        if band:
            _shade(axes, *band)
        drawn = inline(figure)
        strips = hover(axes, [(s.label, s.points) for s in series], [(mark.step, mark.text) for mark in inside])
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>').format(
        WIDTH, HEIGHT, f"{name}, {unit}" if unit else name, drawn, strips
    )


def sample(style: int, held_out: bool) -> Markup:
    """Return a short piece of a series' line, for a legend."""
    with _figure(32, 14) as figure:
        axes = figure.add_axes((0.03, 0, 0.94, 1), xlim=(-1, 1), ylim=(-1, 1))
        axes.set_axis_off()
        _line(axes, Series("", [(-1, 0), (0, 0), (1, 0)], style, held_out), [1] if held_out else [])
        return _sample(figure)


def alarm_sample() -> Markup:
    """Return a short piece of an alarm's line, for a legend."""
    with _figure(32, 14) as figure:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, 1), ylim=(0, 1))
        axes.set_axis_off()
        _mark(axes, Mark(0, "", ""))
        return _sample(figure)


def _sample(figure: Figure) -> Markup:
    return Markup('<svg class="sample" viewBox="0 0 32 14" aria-hidden="true">{}</svg>').format(inline(figure))


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure in the report's style; a user's matplotlibrc and global state have no effect."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    with context(["default", _STYLE]):  # type: ignore[list-item]  # a style may be a mapping
        yield Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained" if width == WIDTH else None)


def _plot(axes: Axes, series: Sequence[Series]) -> None:
    """Draw the lines and fix the limits of both axes."""
    from matplotlib.ticker import MaxNLocator

    for one in series:
        ok = [finite(value) for _, value in one.points]
        if any(ok):
            alone = [i for i, here in enumerate(ok) if here and not any(ok[max(0, i - 1) : i] + ok[i + 1 : i + 2])]
            _line(axes, one, range(0, len(ok), len(ok) // POINTS + 1) if one.held_out else alone)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    if axes.lines:
        axes.autoscale_view()
    if axes.dataLim.x0 == 1:  # training begins at step 1, and nothing is before it
        axes.set_xlim(left=0)
    if 0 <= axes.dataLim.y0 < 0.4 * axes.dataLim.y1:  # 0 is near, and the distance from it is informative
        axes.set_ylim(bottom=0)
    # an exponent goes left of the axis, where no alarm's number is; the layout would reserve a column for it
    axes.yaxis.get_offset_text().set(horizontalalignment="right", in_layout=False)
    axes.set_autoscale_on(False)


def _line(axes: Axes, series: Series, marked: Sequence[int]) -> None:
    """Draw one line; marked: indices of the points that get a marker."""
    axes.plot(
        [step for step, _ in series.points],
        [value if finite(value) else math.nan for _, value in series.points],
        gid="points" if series.held_out else "line",
        color=COLOURS[f"s{series.style % LINES}"],
        linewidth=0.9 if series.held_out else 1.6,
        dashes=DASHES[series.style % len(DASHES)] or (None, None),
        dash_capstyle="butt",
        solid_capstyle="butt",
        marker=MARKERS[series.style % len(MARKERS)],
        markersize=6 if series.held_out else 4,
        markeredgecolor=COLOURS["paper"],
        markeredgewidth=0.8,
        markevery=list(marked),
    )


def _mark(axes: Axes, mark: Mark) -> None:
    axes.axvline(mark.step, gid="mark", color=COLOURS["bad"], linewidth=1.2, dashes=(1.5, 2.5))
    if mark.label:
        axes.annotate(
            mark.label, (mark.step, 1), (0, 2), axes.get_xaxis_transform(), "offset points",
            color=COLOURS["bad"], size=10, weight="bold", ha="center",
        )  # fmt: skip


def _shade(axes: Axes, low: float, high: float) -> None:
    """Shade the values of a band as far as the axis goes."""
    bottom, top = axes.get_ylim()
    if low < top and high > bottom:
        axes.axhspan(max(low, bottom), min(high, top), gid="band", color=COLOURS["s2"], alpha=0.09, linewidth=0)
