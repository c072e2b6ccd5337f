"""Write the parts of the pages that come from the code: settings of methods and runs, chat templates, names of TRL.

    python docs/generate.py             rewrite the text between the markers
    python docs/generate.py --check     change nothing; exit 1 and name the pages that are out of date

A part is the text between `<!-- generated: NAME -->` and `<!-- end -->`; the rest of a page is written by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from alignkit import Method, registry
from alignkit.cli.console import described
from alignkit.config import RunConfig
from alignkit.environment_settings import EnvironmentSettings
from alignkit.method import Role

DOCS = Path(__file__).resolve().parent
_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NEEDS = {
    "rows": "`cached`, `adapter-off`, `full` or `int8`",
    "live": "`adapter-off`, `full` or `int8`",
    "moving": "`full`",
}


def table(cls: type[BaseModel]) -> str:
    """Return a Markdown table of a settings class."""
    rows = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for name, default, values, meaning in described(cls):
        cells = (f"`{name}`", _escape(values), f"`{default}`", _escape(meaning))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 2 else "It has no settings of its own."


def facts(cls: type[Method]) -> str:
    """Return a Markdown table of what a method needs, and of defaults that are not its settings."""
    reference = "none"
    if "reference" in cls.uses:
        reference = _NEEDS[cls(cls.Config()).reference_need()]
    columns = {
        "data": cls.data,
        "roles": ", ".join(role for role in get_args(Role) if role in cls.uses),
        "reference": reference,
        "learning rate, all weights": f"{cls.learning_rate:g}",
        "learning rate, LoRA": f"{cls.lora_learning_rate:g}",
        "`epochs_per_batch`": str(cls.epochs_per_batch),
        "smallest `batch_size`": str(cls.min_batch),
    }
    head, values = (f"| {' | '.join(row)} |" for row in (columns.keys(), columns.values()))
    return "\n".join([head, "|---" * len(columns) + "|", values])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def part(page: Path, name: str) -> str:
    """Return the text of the part `name` of a page."""
    if name == "run-settings":
        return table(RunConfig)
    if name == "environment":
        return table(EnvironmentSettings)
    if name == "chat-templates":
        return _chat_table()
    if name == "trl-names":
        return _trl_tables()
    method = registry.get(page.stem)
    return {"facts": lambda: facts(method), "settings": lambda: table(method.Config)}[name]()


def _chat_table() -> str:
    sys.path.append(str(DOCS))
    import chat_table

    return str(chat_table.table())


def _trl_tables() -> str:
    sys.path.append(str(DOCS))
    import trl_table

    return str(trl_table.tables())


def generated(page: Path) -> str:
    """Return the page's text as it should be."""
    text = page.read_text(encoding="utf-8")
    return _PART.sub(lambda m: f"{m[1]}{part(page, m[2])}\n{m[3]}", text)


def pages() -> list[Path]:
    """Return all pages with generated parts."""
    return sorted(p for p in DOCS.rglob("*.md") if _PART.search(p.read_text(encoding="utf-8")))


def main(check: bool) -> int:
    """Rewrite the pages, or only print which ones would change."""
    stale = [(page, text) for page in pages() if (text := generated(page)) != page.read_text(encoding="utf-8")]
    for page, text in stale:
        print(f"{'out of date' if check else 'written'}: {page.relative_to(DOCS.parent)}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))
