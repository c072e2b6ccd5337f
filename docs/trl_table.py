"""The tables of docs/from-trl.md: TRL's settings and ours, from alignkit/trl_names.yaml."""

from __future__ import annotations

from alignkit.trl_names import PEFT, Entry, table


def tables() -> str:
    """Return a Markdown table for each section, and one of the settings without a counterpart."""
    sections: dict[str, list[Entry]] = {}
    for entry in table().values():
        sections.setdefault(entry.section, []).append(entry)
    absent = [*sections.pop("", []), *sections.pop(PEFT, [])]
    parts = [f"### {title}\n\n{_named(entries)}" for title, entries in sections.items()]
    return "\n\n".join([*parts, f"### Without a counterpart\n\n{_absent(absent)}"])


def _named(entries: list[Entry]) -> str:
    rows = ["| TRL | here | what differs |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| `{e.name}` | {_here(e)} | {_escaped(e.note)} |" for e in entries)])


def _here(entry: Entry) -> str:
    if not entry.to:
        return "none"
    return ", ".join(
        f"`{ours}`" + (f" ({', '.join(methods)})" if methods else "") for methods, ours in entry.to.items()
    )


def _absent(entries: list[Entry]) -> str:
    by_note: dict[str, list[str]] = {}
    for entry in entries:
        by_note.setdefault(entry.note, []).append(f"`{entry.name}`")
    rows = ["| TRL, transformers, peft | instead |", "|---|---|"]
    return "\n".join([*rows, *(f"| {', '.join(names)} | {_escaped(note)} |" for note, names in by_note.items())])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
