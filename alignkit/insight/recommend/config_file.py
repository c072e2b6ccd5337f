"""The YAML file to start from: settings, each with a comment that gives the reason."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError
from alignkit.files import write_text
from alignkit.insight.recommend.recommendation import Option, Recommendation
from alignkit.insight.recommend.recommendation_text import yaml_line

_WIDTH = 100


def write_config(
    found: Recommendation, path: Path, *, model: str, data: str, columns: Mapping[str, str] | None = None
) -> str:
    """Write the settings of the first choice, and return its name. Raises ConfigError: no choice, cannot be written."""
    if found.first is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.refused.items())
        raise ConfigError(f"no installed method can be used with these rows. {reasons or 'No method is installed'}")
    text = config_text(found, found.first, path, {"model": model, "data": data, "columns": columns})
    write_text(path, text)
    return found.first.method


def config_text(found: Recommendation, first: Option, path: Path, given: Mapping[str, Any]) -> str:
    """Return the text of a file of settings. path: as given, for the next commands. given: model, data, columns.

    A relative path in it is relative to the folder where a command runs: run the next commands in the same folder.
    """
    file = shlex.quote(str(path))
    audit = found.facts.audit
    why = {
        "model": "folder or hub name; it is read, never changed",
        "data": f"{audit.kept:,} rows of the form '{audit.form}'",
        "columns": "alignkit's column names: yours",
    }
    settings = [(name, value, why[name]) for name, value in given.items() if value]
    settings = [("method", first.method, first.reason), *settings, *found.settings]
    head = (
        *(f"Warning: {caution}" for caution in found.cautions),
        f"Next: alignkit validate {file}, alignkit plan {file}, alignkit run {file}",
        f"All settings: alignkit settings {first.method}",
    )
    blocks = ["\n".join(map(_comment, head))]
    blocks += [f"{_comment(reason)}\n{yaml_line(name, value)}" for name, value, reason in settings]
    return "\n\n".join(blocks) + "\n"


def _comment(text: str) -> str:
    # white space is joined, so that no text can leave its comment
    whole = textwrap.wrap(" ".join(text.split()), _WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"# {line}" for line in whole)
