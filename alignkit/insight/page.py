"""Write the HTML pages of the insight tools: one look, one file, nothing loaded from elsewhere, no scripts."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alignkit.errors import ConfigError


def write(path: Path, template: str, title: str, **context: Any) -> None:
    """Render a template of `templates/` into one HTML file; whatever was there before is replaced at once.

    All that is put in is escaped, but for `markupsafe.Markup`. Raises ConfigError where the file cannot be written.
    """
    write_text(path, render(template, title, **context))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; its folder is made. Links and devices are written to, never replaced.

    Raises ConfigError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        # what /dev/stdout names has to stay what it is
        target = path if path.is_symlink() or (path.exists() and not path.is_file()) else temporary
        path.parent.mkdir(parents=True, exist_ok=True)
        # text of a model may hold halves of characters, which no file can
        target.write_text(text, encoding="utf-8", errors="replace")
        if target is temporary:
            os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file") from error


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
