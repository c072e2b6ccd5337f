"""The HTML pages of the insight tools: one style, one file, nothing loaded from elsewhere, no scripts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alignkit.files import write_text


def write(path: Path, template: str, title: str, **context: Any) -> None:
    """Render a template of `templates/` into one HTML file; an existing file is replaced atomically.

    All values are escaped, except `markupsafe.Markup`. Raises ConfigError where the file cannot be written.
    """
    write_text(path, render(template, title, **context))


def render(template: str, title: str, **context: Any) -> str:
    """Return the page as text. Raises jinja2.UndefinedError where the template uses a value that was not passed."""
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
    """Return a text with `names` in backticks as <code>; everything is escaped."""
    pieces = str(text).split("`")
    if len(pieces) % 2 == 0:  # an unpaired backtick
        return Markup("{}").format(text)
    return Markup("").join(Markup("<code>{}</code>" if i % 2 else "{}").format(p) for i, p in enumerate(pieces))
