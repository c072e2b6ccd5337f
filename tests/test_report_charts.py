"""Charts of the report: ticks, axes, and points that land where a float64 computation puts them."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.insight.report import svg
from alignkit.insight.report.curves import groups
from alignkit.insight.report.read import Run
from alignkit.insight.report.svg import DASHES, Mark, Series, chart, sample, thin
from alignkit.insight.report.ticks import domain, labels, number, ticks

FINITE = st.floats(min_value=-1e30, max_value=1e30, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-30)


def parsed(markup: object) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup))


def value_of(label: str) -> float:
    return float(label.replace("−", "-"))


def axis(root: ElementTree.Element, kind: str, place: str) -> tuple[float, float]:
    """(pixels a unit, pixel of 0) of an axis, from its first and its last label."""
    texts = [t for t in root.iter("text") if t.get("class") == kind and t.text != "step"]
    (a, at_a), *_, (b, at_b) = [(value_of(t.text or ""), float(t.attrib[place])) for t in texts]
    scale = (at_b - at_a) / (b - a)
    return scale, at_a - a * scale


def path_points(root: ElementTree.Element, kind: str) -> list[list[tuple[float, float]]]:
    """The connected pieces of each line of a kind: pixels."""
    pieces = []
    for path in root.iter("path"):
        if path.attrib["class"].split()[0] == kind:
            for piece in filter(None, path.attrib["d"].split("M")):
                pieces.append([tuple(map(float, p.split())) for p in piece.split("L")])
    return pieces  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------ ticks


@given(FINITE, FINITE, st.integers(3, 9), st.booleans())
def test_ticks_are_round_even_and_inside(a: float, b: float, most: int, whole: bool) -> None:
    low, high = min(a, b), max(a, b)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return
    at = ticks(low, high, most, whole)
    air = 1e-6 * (high - low)
    assert len(at) <= most
    assert all(low - air <= v <= high + air for v in at)
    steps = [y - x for x, y in pairwise(at)]
    assert all(s == pytest.approx(steps[0], rel=1e-6) for s in steps)
    if steps:
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert any(mantissa == pytest.approx(m, rel=1e-5) for m in (1, 2, 2.5, 5))
    if whole:
        assert all(v == round(v) for v in at)
    else:
        assert len(at) >= 2 or most == 3


@given(st.lists(FINITE, min_size=1, max_size=20))
def test_a_domain_holds_all_values_and_is_never_empty(values: list[float]) -> None:
    low, high = domain(values)
    assert low < high
    assert low <= min(values)
    assert max(values) <= high


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], (0.0, 1.0)),
        ([0.0], (0.0, 1.0)),
        ([4.0, 4.0], (2.0, 6.0)),
        ([-4.0], (-6.0, -2.0)),
        ([1.0, 3.0], (0.0, 3.18)),  # 0 is near: it is the floor
        ([2.0, 3.0], (1.94, 3.06)),
        ([-3.0, -1.0], (-3.18, 0.0)),
        ([-1.0, 1.0], (-1.12, 1.12)),
    ],
)
def test_domains(values: list[float], expected: tuple[float, float]) -> None:
    assert domain(values) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.69, 0.93, ["0.70", "0.75", "0.80", "0.85", "0.90"]),
        (-1.1, 1.1, ["−1.0", "−0.5", "0", "0.5", "1.0"]),
        (0, 1e-4, ["0", "0.2e−4", "0.4e−4", "0.6e−4", "0.8e−4", "1.0e−4"]),
        (0, 3e5, ["0", "1e5", "2e5", "3e5"]),
        (0, 12000, ["0", "2500", "5000", "7500", "10000"]),
    ],
)
def test_labels_of_an_axis_have_the_same_decimals(low: float, high: float, expected: list[str]) -> None:
    assert labels(ticks(low, high)) == expected


@given(FINITE, FINITE)
def test_labels_are_the_ticks_and_differ(a: float, b: float) -> None:
    low, high = domain([a, b])
    at = ticks(low, high)
    texts = labels(at)
    assert len(set(texts)) == len(texts)
    assert [value_of(t) for t in texts] == pytest.approx(at, abs=1e-5 * (high - low))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (math.nan, "-"), (math.inf, "-"), (0, "0"), (0.0, "0"), (1, "1"), (1234567, "1 234 567"),
        (0.5, "0.5"), (0.123456, "0.1235"), (-12.345678, "−12.35"), (1e-5, "1e−5"), (-7.2773e-9, "−7.277e−9"),
        (123456.7, "1.235e5"), (999.96, "1000"), (32.0, "32"),
    ],
)  # fmt: skip
def test_numbers_have_four_digits(value: float | None, text: str) -> None:
    assert number(value) == text


# ------------------------------------------------------------------------------------------------------------ charts


@pytest.mark.parametrize("seed", range(5))
def test_points_land_where_the_axes_say(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(2, 80)
    points = [(float(i + 1), rng.gauss(3 * seed, 10.0 ** rng.randint(-2, 3))) for i in range(n)]
    held = [(0.0, points[0][1]), (float(n), points[-1][1] / 2)]
    root = parsed(chart("m", "nats", [Series("a", points), Series("b", held, 1, held_out=True)]))
    x, x0 = axis(root, "x", "x")
    y, y0 = axis(root, "y", "y")
    (line,) = path_points(root, "line")
    (thin_line,) = path_points(root, "thin")
    for drawn, given_points in ((line, points), (thin_line, held)):
        for (at_x, at_y), (step, value) in zip(drawn, given_points, strict=True):
            assert at_x == pytest.approx(step * x + x0, abs=0.12)
            # labels stand 3.6 below their tick, and pixels are written with one decimal
            assert at_y == pytest.approx(value * y + y0 - 3.6, abs=0.12)
    assert all(0 <= at_x <= svg.WIDTH and 0 <= at_y <= svg.HEIGHT for at_x, at_y in line)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_a_missing_value_is_a_gap_and_one_alone_between_gaps_a_dot(missing: float | None) -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, missing), (4.0, 3.0), (5.0, missing), (6.0, 1.0), (7.0, 2.0)]
    root = parsed(chart("m", "", [Series("a", points)]))
    assert [len(p) for p in path_points(root, "line")] == [2, 1, 2]
    dots = [c for c in root.iter("circle") if "dot" in c.attrib["class"]]
    assert len(dots) == 1
    assert "nan" not in str(root)
    assert any("step 3\na: not finite" in (t.text or "") for t in root.iter("title"))


@pytest.mark.parametrize("points", [[], [(1.0, None)], [(5.0, math.nan)]])
def test_a_series_without_a_finite_value_leaves_axes_alone(points: list[tuple[float, float | None]]) -> None:
    root = parsed(chart("m", "", [Series("a", points)]))
    assert not path_points(root, "line")
    assert [t.text for t in root.iter("text") if t.attrib["class"] == "y"] == [
        "0", "0.2", "0.4", "0.6", "0.8", "1.0", "step",
    ]  # fmt: skip


def test_a_single_point_is_a_dot_in_the_middle_and_a_constant_a_level_line() -> None:
    root = parsed(chart("m", "", [Series("a", [(7.0, 2.5)])]))
    (dot,) = [c for c in root.iter("circle") if "dot" in c.attrib["class"]]
    assert float(dot.attrib["cx"]) == pytest.approx((44 + svg.WIDTH - svg.RIGHT) / 2, abs=0.1)
    assert float(dot.attrib["cy"]) == pytest.approx((svg.TOP + svg.HEIGHT - svg.BOTTOM) / 2, abs=0.1)
    (line,) = path_points(parsed(chart("m", "", [Series("a", [(float(i), 2.5) for i in range(9)])])), "line")
    assert [y for _, y in line] == pytest.approx([(svg.TOP + svg.HEIGHT - svg.BOTTOM) / 2] * 9, abs=0.1)


def test_hover_texts_say_the_values_of_all_series_at_their_steps() -> None:
    one = [(float(i), i / 10) for i in range(1, 4)]
    root = parsed(chart("m", "", [Series("<a>", one), Series("b", [(2.0, 7.0)], 1, held_out=True)]))
    strips = [r for r in root.iter("rect") if r.attrib["class"] == "strip"]
    assert [r[0].text for r in strips] == ["step 1\n<a>: 0.1", "step 2\n<a>: 0.2\nb: 7", "step 3\n<a>: 0.3"]
    edges = [(float(r.attrib["x"]), float(r.attrib["width"])) for r in strips]
    assert all(x + w == pytest.approx(nxt, abs=0.11) for (x, w), (nxt, _) in pairwise(edges))
    assert any(p[0].text == "b, step 2: 7" for p in root.iter("path") if p.attrib["class"] == "marker c1")


def test_a_band_is_shaded_as_far_as_the_chart_goes() -> None:
    def shaded(*values: float) -> tuple[float, float, float, float]:
        points = [(float(i), v) for i, v in enumerate(values)]
        root = parsed(chart("kl", "", [Series("a", points)], band=(0.5, 10.0)))
        (rect,) = [r for r in root.iter("rect") if r.attrib["class"] == "band"]
        top = float(rect.attrib["y"])
        return top, top + float(rect.attrib["height"]), *axis(root, "y", "y")

    top, bottom, unit, zero = shaded(0.0, 20.0)
    zero -= 3.6  # a label stands that far below its line
    assert (top, bottom) == pytest.approx((zero + 10 * unit, zero + 0.5 * unit), abs=0.02)
    top, bottom, *_ = shaded(2.0, 4.0)
    assert (top, bottom) == pytest.approx((svg.TOP, svg.HEIGHT - svg.BOTTOM), abs=0.02)  # all of it
    top, bottom, *_ = shaded(20.0, 40.0)
    assert top == bottom == pytest.approx(svg.HEIGHT - svg.BOTTOM, abs=0.02)  # none of it


def test_the_kl_alone_has_its_healthy_band() -> None:
    run = Run(Path("r"), "r", {}, [{"step": i, "kl": i / 9, "loss": 1 / i} for i in range(1, 9)], [], [], [])
    panels = {panel.name: panel for group in groups([run], []) for panel in group.panels}
    assert panels["kl"].unit == "nats a sequence; shaded: 0.5 to 10"
    assert ['class="band"' in panels[name].chart for name in ("kl", "loss")] == [True, False]


def test_alarms_stand_at_their_step_with_label_and_words() -> None:
    points = [(float(i), float(i)) for i in range(11)]
    marks = [Mark(5, "1,2", "<b>too far</b>"), Mark(99, "3", "outside")]
    root = parsed(chart("m", "", [Series("a", points)], marks))
    (mark,) = [g for g in root.iter("g") if g.attrib["class"] == "mark"]
    assert mark[0].text == "<b>too far</b>"
    assert mark[2].text == "1,2"
    x, x0 = axis(root, "x", "x")
    assert float(mark[2].attrib["x"]) == pytest.approx(5 * x + x0, abs=0.1)


def test_neighbouring_lines_differ_in_colour_and_in_dashes() -> None:
    looks = [(str(sample(i, False)), DASHES[i % len(DASHES)], i % 7) for i in range(12)]
    for (text, dash, colour), (_, next_dash, next_colour) in pairwise(looks):
        assert f'stroke-dasharray="{dash}"' in text
        assert f"c{colour}" in text
        assert dash != next_dash
        assert colour != next_colour
    assert len({look[1:] for look in looks}) == 12


# ---------------------------------------------------------------------------------------------------------- thinning


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=400))
def test_thinning_keeps_order_ends_extremes_and_gaps(values: list[float | None]) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    kept = thin(points, 40)
    assert len(kept) <= 3 * 20 + 2
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert all(points[int(x)] is p for x, p in ((p[0], p) for p in kept))
    assert (kept[0][0], kept[-1][0]) == (points[0][0], points[-1][0])
    finite = [v for v in values if v is not None and math.isfinite(v)]
    left = [v for _, v in kept if v is not None and math.isfinite(v)]
    if finite:
        assert (min(left), max(left)) == (min(finite), max(finite))
    assert (len(finite) < len(values)) == (len(left) < len(kept))


def test_a_spike_of_one_step_in_ten_thousand_is_as_high_as_it_was() -> None:
    points = [(float(i), math.sin(i / 500)) for i in range(10_000)]
    points[6_789] = (6_789.0, 50.0)
    kept = thin(points)
    assert (6_789.0, 50.0) in kept
    assert len(kept) <= svg.POINTS + 2
    root = parsed(chart("m", "", [Series("a", points)]))
    assert any("50" in (t.text or "") for t in root.iter("title"))
    assert len(str(chart("m", "", [Series("a", points)]))) < 30_000
    assert len(re.findall("<rect", str(chart("m", "", [Series("a", points)])))) == svg.STRIPS
