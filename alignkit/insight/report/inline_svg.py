"""matplotlib's SVG as a part of an HTML page: no ids, no links, no fonts, the page's own colours; values on hover."""

from __future__ import annotations

import io
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup

from alignkit.insight.report.numbers import Point, finite, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRIPS = 60  # parts of a chart with a hover text of their own
_NAMES = ("paper", "muted", "rule", "bad", "s0", "s1", "s2", "s3", "s4", "s5", "s6")
COLOURS = {name: f"#0a11{i:02x}" for i, name in enumerate(_NAMES, 16)}
"""Placeholder colours by the names in style.css: each is written as var(--name), so a chart is light, dark or printed
like its page."""


def inline(figure: Figure) -> Markup:
    """Return the contents of the <svg> of a figure. Ids that the drawing code set become classes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.StringIO()
    FigureCanvasSVG(figure).print_svg(written, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    _, _, text = written.getvalue().partition("<svg")
    text = text[text.index(">") + 1 : text.rindex("</svg>")]
    shapes = dict(re.findall(r'<path id="(\w+)" d="([^"]*)"', text))
    text = re.sub(r"<defs>.*?</defs>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<use xlink:href="#(\w+)" x="([^"]*)" y="([^"]*)"',
        lambda use: f'<path d="{shapes[use[1]]}" transform="translate({use[2]} {use[3]})"',
        text,
    )
    text = re.sub(r' id="(?:(line|points|mark|band)|[^"]*)"', lambda m: f' class="{m[1]}"' if m[1] else "", text)
    text = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(path[0].split())), text)
    # the limits of the axes hold all that is drawn, so nothing has to be clipped
    text = re.sub(r'font-family: [^;"]*;? ?| clip-path="[^"]*"| transform="rotate\(-0[^"]*"', "", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(re.sub(r">\s+<", "><", text.strip()))


def hover(axes: Axes, lines: Sequence[tuple[str, Sequence[Point]]], events: Sequence[tuple[float, str]]) -> Markup:
    """Return invisible strips over drawn axes, each with the values and the events at its steps as its title.

    lines: (label, points). events: (step, text).
    """
    steps = sorted({step for _, points in lines for step, _ in points})
    n = min(STRIPS, len(steps))
    groups = [steps[i * len(steps) // n : (i + 1) * len(steps) // n] for i in range(n)]
    first, last = axes.get_xlim()
    edges = [first, *((a[-1] + b[0]) / 2 for a, b in pairwise(groups)), last]
    top, height = axes.figure.bbox.height - axes.bbox.y1, axes.bbox.height
    made = []
    for group, (left, right) in zip(groups, pairwise(edges), strict=bool(groups)):
        texts = [_span(group), *_values(lines, group[0], group[-1])]
        texts += [text for step, text in events if left <= step < right or step == right == last]
        x, end = (axes.transData.transform((step, 0))[0] for step in (left, right))
        strip = Markup(
            '<rect class="strip" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
        )
        made.append(strip.format(x, top, end - x, height, "\n".join(texts)))
    return Markup("").join(made)


def _span(group: Sequence[float]) -> str:
    if group[0] == group[-1]:
        return f"step {number(group[0])}"
    return f"steps {number(group[0])} to {number(group[-1])}"


def _values(lines: Sequence[tuple[str, Sequence[Point]]], first: float, last: float) -> Iterator[str]:
    for label, points in lines:
        inside = points[bisect_left(points, first, key=_step) : bisect_right(points, last, key=_step)]
        values = [value for _, value in inside if finite(value)]
        if not inside:
            continue
        if not values:
            yield f"{label}: not finite"
        elif len(inside) == 1:
            yield f"{label}: {number(values[0])}"
        else:
            yield f"{label}: {number(min(values))} to {number(max(values))}"


def _step(point: Point) -> float:
    return point[0]
