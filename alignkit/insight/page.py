"""Write the HTML pages of the insight tools: one look, one file, nothing loaded from elsewhere, no scripts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alignkit.files import write_text


def write(path: Path, template: str, title: str, **context: Any) -> None:
    """Render a template of `templates/` into one HTML file; whatever was there before is replaced at once.

    All that is put in is escaped, but for `markupsafe.Markup`. Raises ConfigError where the file cannot be written.
    """
    write_text(path, render(template, title, **context))


def render(template: str, title: str, **context: Any) -> str:
    """Return the page as text. Raises jinja2.UndefinedError where the template asks for what is not given."""
    return _environment().get_template(template).render(title=title, **context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("alignkit.insight"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = marked
    return environment


def marked(text: str) -> Markup:
    """Return a text in which `names` between backticks are code; all else is escaped."""
    pieces = str(text).split("`")
    if len(pieces) % 2 == 0:  # one without a partner
        return Markup("{}").format(text)
    return Markup("").join(Markup("<code>{}</code>" if i % 2 else "{}").format(p) for i, p in enumerate(pieces))
