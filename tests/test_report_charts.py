"""Charts of the report: points land where the axes say, and nothing of matplotlib leaks into the page or stays set."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import ConfigError
from alignkit.insight.report import charts, report
from alignkit.insight.report.charts import DASHES, HEIGHT, LINES, WIDTH, Mark, Series, alarm_sample, chart, sample
from alignkit.insight.report.curves import groups
from alignkit.insight.report.inline_svg import STRIPS
from alignkit.insight.report.numbers import number
from alignkit.insight.report.run_files import Run

Pixels = list[tuple[float, float]]


def parsed(markup: object) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup))


def drawn(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    """The groups of a kind: "line", "points", "mark", "band"."""
    return [g for g in root.iter("g") if g.get("class") == kind]


def pieces(path: ElementTree.Element) -> list[Pixels]:
    """The connected pieces of a path of straight lines."""
    parts = filter(None, path.attrib["d"].replace("z", "").split("M"))
    return [[(float(x), float(y)) for x, y in (point.split() for point in part.split("L"))] for part in parts]


def lines(root: ElementTree.Element, kind: str) -> list[list[Pixels]]:
    return [pieces(path) for group in drawn(root, kind) if (path := group.find("path")) is not None]


def markers(group: ElementTree.Element) -> Pixels:
    """The centres of a line's markers."""
    moves = [path.get("transform") for path in group.iter("path") if path.get("transform")]
    return [(float(x), float(y)) for x, y in (re.findall(r"[\d.]+", move or "") for move in moves)]


def texts(root: ElementTree.Element, anchor: str) -> list[ElementTree.Element]:
    return [t for t in root.iter("text") if f"text-anchor: {anchor}" in t.attrib["style"] and t.text != "step"]


def value_of(label: str | None) -> float:
    return float((label or "").replace("−", "-"))


def scale(values: list[float], pixels: list[float]) -> tuple[float, float]:
    """(pixels a unit, pixel of 0)."""
    unit = (pixels[-1] - pixels[0]) / (values[-1] - values[0])
    return unit, pixels[0] - values[0] * unit


def axes(root: ElementTree.Element) -> tuple[tuple[float, float], tuple[float, float]]:
    """Scales of the axis of steps, from its labels, and of the axis of values, from its labels and their rules."""
    steps = [t for t in texts(root, "middle") if "font-weight: 700" not in t.attrib["style"]]
    rules = [p for p in root.iter("path") if "stroke: var(--rule)" in p.attrib["style"]]
    values = texts(root, "end")
    exponent = 10.0 ** value_of((values.pop().text or "").replace("1e", "")) if len(values) > len(rules) else 1.0
    x = scale([value_of(t.text) for t in steps], [float(t.attrib["x"]) for t in steps])
    y = scale([value_of(t.text) * exponent for t in values], [pieces(rule)[0][0][1] for rule in rules])
    return x, y


def titles(root: ElementTree.Element) -> list[str | None]:
    return [title.text for title in root.iter("title")]


# ----------------------------------------------------------------------------------------------------------- numbers


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


@pytest.mark.parametrize("seed", range(6))
def test_points_land_where_the_axes_say(seed: int) -> None:
    rng = random.Random(seed)
    n, size = rng.randint(2, 80), 10.0 ** (-6 if seed == 5 else rng.randint(-2, 3))
    points = [(float(i + 1), rng.gauss(3 * seed, 1) * size) for i in range(n)]
    held = [(0.0, points[0][1]), (n / 2, points[n // 2][1]), (float(n), points[-1][1] / 2)]
    root = parsed(chart("m", "nats", [Series("a", points), Series("b", held, 1, held_out=True)]))
    (x, x0), (y, y0) = axes(root)
    ((line,),), ((thin,),) = lines(root, "line"), lines(root, "points")
    for found, expected in ((line, points), (thin, held), (markers(drawn(root, "points")[0]), held)):
        for (at_x, at_y), (step, value) in zip(found, expected, strict=True):
            assert at_x == pytest.approx(step * x + x0, abs=0.03)
            assert at_y == pytest.approx(value * y + y0, abs=0.03)
    assert all(0 <= at_x <= WIDTH and 0 <= at_y <= HEIGHT for at_x, at_y in line)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf, 1e300])
def test_a_missing_value_is_a_gap_and_one_alone_between_gaps_a_dot(missing: float | None) -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, missing), (4.0, 3.0), (5.0, missing), (6.0, 1.0), (7.0, 2.0)]
    root = parsed(chart("m", "", [Series("a", points)]))
    (line,) = lines(root, "line")
    assert [len(piece) for piece in line if len(piece) > 1] == [2, 2]
    (dot,) = markers(drawn(root, "line")[0])
    (x, x0), (y, y0) = axes(root)
    assert dot == pytest.approx((4 * x + x0, 3 * y + y0), abs=0.03)
    assert "nan" not in ElementTree.tostring(root, encoding="unicode")
    assert "step 3\na: not finite" in titles(root)


@pytest.mark.parametrize("points", [[], [(1.0, None)], [(5.0, math.nan)]])
def test_a_series_without_a_finite_value_leaves_the_axes_empty(points: list[tuple[float, float | None]]) -> None:
    root = parsed(chart("m", "", [Series("a", points)]))
    assert not lines(root, "line")
    assert [t.text for t in texts(root, "end")] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


def test_a_single_point_is_a_dot_in_the_middle_and_a_constant_a_level_line() -> None:
    root = parsed(chart("m", "", [Series("a", [(7.0, 2.5)])]))
    ((at_x, at_y),) = markers(drawn(root, "line")[0])
    (frame,) = [r for r in root.iter("rect") if r.attrib["class"] == "strip"]
    left, top, width, height = (float(frame.attrib[name]) for name in ("x", "y", "width", "height"))
    assert (at_x, at_y) == pytest.approx((left + width / 2, top + height / 2), abs=0.11)
    ((line,),) = lines(parsed(chart("m", "", [Series("a", [(float(i), 2.5) for i in range(9)])])), "line")
    assert [y for _, y in line] == [line[0][1]] * len(line)


def test_an_axis_begins_at_0_where_0_is_near() -> None:
    def bottom(*values: float) -> float:
        (_, _), (y, y0) = axes(root := parsed(chart("m", "", [Series("a", list(enumerate(values, 1)))])))
        frame = next(r for r in root.iter("rect") if r.attrib["class"] == "strip")
        return (float(frame.attrib["y"]) + float(frame.attrib["height"]) - y0) / y

    assert bottom(0.0, 1.0) == pytest.approx(0, abs=0.01)
    assert bottom(1.0, 3.0) == pytest.approx(0, abs=0.02)
    assert bottom(2.0, 3.0) == pytest.approx(1.94, abs=0.01)
    assert bottom(-1.0, 1.0) == pytest.approx(-1.12, abs=0.02)


def test_hover_texts_have_the_values_of_all_series_at_their_steps() -> None:
    one = [(float(i), i / 10) for i in range(1, 4)]
    root = parsed(chart("m", "", [Series("<a>", one), Series("b", [(2.0, 7.0)], 1, held_out=True)]))
    strips = [r for r in root.iter("rect") if r.attrib["class"] == "strip"]
    assert titles(root) == ["step 1\n<a>: 0.1", "step 2\n<a>: 0.2\nb: 7", "step 3\n<a>: 0.3"]
    edges = [(float(r.attrib["x"]), float(r.attrib["width"])) for r in strips]
    assert all(x + width == pytest.approx(following, abs=0.11) for (x, width), (following, _) in pairwise(edges))
    (x, x0), _ = axes(root)
    assert edges[1][0] == pytest.approx(1.5 * x + x0, abs=0.06)


def test_a_band_is_shaded_as_far_as_the_chart_goes() -> None:
    def shaded(*values: float) -> list[float]:
        root = parsed(chart("kl", "", [Series("a", list(enumerate(values)))], band=(0.5, 10.0)))
        _, (unit, zero) = axes(root)
        return sorted({round((y - zero) / unit, 2) for ((piece,),) in [lines(root, "band")] for _, y in piece})

    assert shaded(0.0, 20.0) == pytest.approx([0.5, 10.0], abs=0.02)
    assert shaded(2.0, 4.0) == pytest.approx([1.88, 4.12], abs=0.02)  # all of it
    assert not drawn(parsed(chart("kl", "", [Series("a", [(1, 20.0), (2, 30.0)])], band=(0.5, 10.0))), "band")


def test_the_kl_alone_has_its_healthy_band() -> None:
    run = Run(Path("r"), "r", {}, [{"step": i, "kl": i / 9, "loss": 1 / i} for i in range(1, 9)], [], [], [])
    panels = {panel.name: panel for group in groups([run], []) for panel in group.panels}
    assert panels["kl"].unit == "nats a sequence; shaded: 0.5 to 10"
    assert ['class="band"' in panels[name].chart for name in ("kl", "loss")] == [True, False]


def test_alarms_are_at_their_step_with_label_and_text() -> None:
    points = [(float(i), float(i)) for i in range(11)]
    marks = [Mark(5, "1,2", "<b>too far</b>"), Mark(10, "3", "at the end"), Mark(99, "4", "outside")]
    root = parsed(chart("m", "", [Series("a", points)], marks))
    (x, x0), _ = axes(root)
    ((five,),), ((ten,),) = ([line] for line in lines(root, "mark"))
    labels = [t for t in texts(root, "middle") if "font-weight: 700" in t.attrib["style"]]
    assert [t.text for t in labels] == ["1,2", "3"]
    for step, line, label in zip((5, 10), (five, ten), labels, strict=True):
        assert [at for at, _ in line] == pytest.approx([step * x + x0] * 2, abs=0.03)
        assert float(label.attrib["x"]) == pytest.approx(step * x + x0, abs=0.03)
    assert "step 5\na: 5\n<b>too far</b>" in titles(root)
    assert titles(root)[-1] == "step 10\na: 10\nat the end"


def test_neighbouring_lines_differ_in_colour_and_in_dashes() -> None:
    def look(i: int) -> tuple[str, str]:
        root = parsed(sample(i, False))
        (path,) = drawn(root, "line")[0]
        style = dict(part.split(": ") for part in path.attrib["style"].split("; "))
        return style["stroke"], style.get("stroke-dasharray", "")

    looks = [look(i) for i in range(12)]
    assert [colour for colour, _ in looks] == [f"var(--s{i % LINES})" for i in range(12)]
    assert [dash for _, dash in looks] == [",".join(map(str, DASHES[i % len(DASHES)])) for i in range(12)]
    assert len(set(looks)) == 12
    assert not markers(drawn(parsed(sample(0, False)), "line")[0])
    assert len(markers(drawn(parsed(sample(0, True)), "points")[0])) == 1
    assert drawn(parsed(alarm_sample()), "mark")


def test_a_chart_takes_its_colours_from_the_page_and_has_a_name() -> None:
    marks = [Mark(1, "1", "x")]
    series = [Series("a", [(0, 1.0), (1, 2.0)], i, bool(i % 2)) for i in range(9)]
    text = str(chart('<m> "&"', "nats", series, marks, (0.5, 10.0)))
    root = parsed(text)
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", '<m> "&", nats')
    assert root.attrib["viewBox"] == f"0 0 {WIDTH} {HEIGHT}"
    assert not {"width", "height"} & root.attrib.keys()  # as wide as its place in the page
    assert not re.search(r"#[0-9a-f]{3}|\bid=|href|url\(|http|font-family|<style|<defs|<metadata|rgb", text)
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", text))
    assert colours <= {"none", *(f"var(--{name})" for name in ("paper", "muted", "rule", "bad"))} | {
        f"var(--s{i})" for i in range(LINES)
    }


def test_the_same_chart_is_the_same_text_whatever_matplotlib_is_set_to() -> None:
    made = [Series("a", [(i, math.sin(i)) for i in range(300)])]
    first = chart("m", "", made)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path", "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert chart("m", "", made) == first
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_loaded() -> None:
    code = (
        "import sys; from alignkit.insight.report.charts import Series, chart\n"
        "chart('m', '', [Series('a', [(0, 1.0), (1, 2.0)])])\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_without_matplotlib_a_report_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"need matplotlib; try: pip install 'alignkit\[report\]'"):
        report(["no/such/folder"])


@pytest.mark.filterwarnings("error")
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(allow_subnormal=False)), min_size=1, max_size=12),
    st.lists(st.floats(0, 12), max_size=2),
)
def test_any_numbers_can_be_drawn(values: list[float | None], steps: list[float]) -> None:
    held = [(step, float(step)) for step in sorted(steps)]
    series = [Series("a", list(enumerate(values))), Series("b", held, 1, held_out=True)]
    root = parsed(chart("m", "", series, [Mark(1, "1", "x")], (0.5, 10.0)))
    for piece in (piece for line in lines(root, "line") for piece in line):
        assert all(-0.1 <= x <= WIDTH + 0.1 and -0.1 <= y <= HEIGHT + 0.1 for x, y in piece)


# ---------------------------------------------------------------------------------------------------------- thinning


def test_a_spike_and_a_gap_of_one_step_in_ten_thousand_are_drawn_as_they_were() -> None:
    rng = random.Random(0)
    points: list[tuple[float, float | None]] = [
        (float(i), math.sin(i / 500) + rng.gauss(0, 0.3)) for i in range(10_000)
    ]
    points[6_789], points[3_000] = (6_789.0, 50.0), (3_000.0, None)
    text = chart("m", "", [Series("a", points)])
    assert len(text) < 30_000
    root = parsed(text)
    (x, x0), (y, y0) = axes(root)
    (line,) = lines(root, "line")
    assert len(line) == 2
    top = min((point for piece in line for point in piece), key=lambda point: point[1])
    assert top == pytest.approx((6_789 * x + x0, 50 * y + y0), abs=0.3)
    assert any("50" in (title or "") for title in titles(root))
    assert len(titles(root)) == STRIPS


def test_many_evaluations_have_few_markers_and_a_whole_line() -> None:
    root = parsed(chart("m", "", [Series("a", [(float(i), float(i % 2)) for i in range(1_000)], held_out=True)]))
    assert charts.POINTS / 2 < len(markers(drawn(root, "points")[0])) <= charts.POINTS
