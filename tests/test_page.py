"""The frame of all HTML pages: what is put in is escaped, nothing is loaded, colours can be read by everybody."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from alignkit.errors import ConfigError
from alignkit.insight import page

STYLE = (Path(page.__file__).parent / "templates/style.css").read_text(encoding="utf-8")
LIGHT, DARK, PRINT = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
SERIES = [f"s{i}" for i in range(7)]


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#\w{6})", block))


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_and_white_is_21() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)


@pytest.mark.parametrize("block", [LIGHT, DARK, PRINT], ids=["light", "dark", "print"])
def test_every_colour_of_text_meets_wcag_aa_on_every_ground_it_stands_on(block: str) -> None:
    c = colours(block)
    pairs = [(text, ground) for text in ("ink", "muted", "link") for ground in ("paper", "panel")]
    pairs += [(t, f"{g}-panel") for g in ("good", "warn", "bad") for t in ("ink", "muted", g)]
    pairs += [(t, "paper") for t in ("good", "warn", "bad", *SERIES)]  # legends are written in the line's colour
    assert {p: round(contrast(c[p[0]], c[p[1]]), 2) for p in pairs if contrast(c[p[0]], c[p[1]]) < 4.5} == {}


def test_print_is_light_whatever_the_screen_is() -> None:
    assert colours(PRINT).keys() == colours(LIGHT).keys() == colours(DARK).keys()


def test_a_page_stands_alone_and_is_escaped(tmp_path: Path) -> None:
    page.write(tmp_path / "new/page.html", "base.html", "<script>alert(1)</script> & co")
    text = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<h1>&lt;script&gt;alert(1)&lt;/script&gt; &amp; co</h1>" in text
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["page.html"]


def test_halves_of_characters_do_not_stop_a_page(tmp_path: Path) -> None:
    page.write(tmp_path / "page.html", "base.html", "half \ud83d of one")
    assert "half ? of one" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*page\.html: .*; choose another file"):
        page.write(tmp_path / "file/page.html", "base.html", "t")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        page.write(tmp_path / "page.html", "base.html", "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "page.html"]


def test_a_text_is_written_whole_and_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    page.write_text(file, "one")
    link.symlink_to(file)
    page.write_text(link, "two \ud83d")
    assert link.is_symlink()
    assert file.read_text() == "two ?"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    page.write_text(pipe, "three")
    assert os.read(reader, 9) == b"three"
    os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(ConfigError, match=r"cannot write .*f{300}: .*; choose another file"):
        page.write_text(tmp_path / ("f" * 300), "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "pipe"]


def test_what_a_template_needs_must_be_given() -> None:
    with pytest.raises(UndefinedError, match="nothing"):
        page._environment().from_string("{{ nothing }}").render()


def test_a_table_escapes_and_puts_columns_of_numbers_to_the_right() -> None:
    text = page._environment().from_string(
        '{% import "macros.html" as parts %}{{ parts.table(["<name>", "n", "mixed"], rows, "all <of> them") }}'
        '{{ parts.facts([("<a>", "<b>")]) }}'
    )
    shown = text.render(rows=[["<i>", 1, "x"], ["b", "-", 2]])
    assert "<i>" not in shown
    assert '<th scope="col">&lt;name&gt;</th><th scope="col" class="n">n</th><th scope="col">mixed</th>' in shown
    assert '<td>&lt;i&gt;</td><td class="n">1</td><td>x</td>' in shown
    assert '<td>b</td><td class="n">-</td><td>2</td>' in shown
    assert "<caption>all &lt;of&gt; them</caption>" in shown
    assert "<dt>&lt;a&gt;</dt><dd>&lt;b&gt;</dd>" in shown


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("raise `beta` or `tau`", "raise <code>beta</code> or <code>tau</code>"),
        ("a `<b>` & <i>", "a <code>&lt;b&gt;</code> &amp; &lt;i&gt;"),
        ("one ` alone <", "one ` alone &lt;"),
        ("", ""),
    ],
)
def test_names_between_backticks_are_code_and_all_is_escaped(text: str, made: str) -> None:
    assert page.marked(text) == made
