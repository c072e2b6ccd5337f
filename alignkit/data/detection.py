"""The form of rows, from the names of their columns; and what to type where there is none."""

from __future__ import annotations

from collections import Counter

from alignkit.data.forms import FORMS, Form
from alignkit.data.rows import RawRows
from alignkit.errors import ConfigError, DataError, nearest
from alignkit.method import DataKind


def detect(raw: RawRows, kind: DataKind, forced: str | None) -> Form:
    """Return the form of rows that are read as `kind`. forced: its name. Raises ConfigError, DataError."""
    # a column counts where half of the rows have it, so that a single odd row does not decide for all
    seen = Counter(column for _, cells in raw for column in cells)
    columns = {column for column, n in seen.items() if 2 * n >= len(raw)}
    known = {form.name for form in FORMS}
    if forced is not None and forced not in known:
        raise ConfigError(
            f"columns: unknown form '{forced}'.{nearest(forced, known)} Forms: {', '.join(sorted(known))}"
        )
    present = [f for f in FORMS if columns.issuperset(f.columns) and forced in (None, f.name)]
    serving = [form for form in present if kind in form.kinds]
    if "prompt" in columns:  # a prompt goes before what could be rewritten to one
        serving.sort(key=lambda form: form.rewrite is not None and not {"prompt", "messages"} & {*form.asked})
    if serving:
        return serving[0]
    raise DataError(_mismatch(raw.source, kind, columns, present, forced))


def _mismatch(source: str, kind: DataKind, columns: set[str], present: list[Form], forced: str | None) -> str:
    """Return what was found, what is needed, and what to type."""
    serving = [form for form in FORMS if kind in form.kinds]
    ours = [form for form in serving if form.rewrite is None or form.name == "messages"]
    choices = list(dict.fromkeys(form.name for form in ours))
    listed = "; ".join(next(" + ".join(form.columns) for form in ours if form.name == name) for name in choices)
    if others := dict.fromkeys(form.name for form in serving if form not in ours):
        listed += f"; or rows of {', '.join(others)} (docs/data.md)"
    if present:
        found = f"found rows of the form '{present[0].name}' ({' + '.join(present[0].columns)})"
    elif forced is not None:
        wants = " or ".join(" + ".join(form.columns) for form in FORMS if form.name == forced)
        found = f"the form '{forced}' needs the columns {wants}; found {', '.join(sorted(columns))}"
    else:
        found = f"found the columns {', '.join(sorted(columns)) or '(none)'}, which match no known form"
    return f"{source}: {found}.\nThe method needs {kind}, which can be read from: {listed}.\n{_to_type(kind, columns)}"


# what others call our columns, the most common name first
_ALSO = {
    "prompt": ("question", "instruction", "query", "problem", "input", "user", "context", "request"),
    "completion": ("answer", "response", "output", "solution", "reply", "target", "text", "assistant"),
    "chosen": ("better", "accepted", "positive", "good", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "worse", "loser", "negative", "bad", "rejected_response", "response_rejected"),
    "label": ("good", "thumbs_up", "liked", "rating", "feedback", "desirable"),
}


def _to_type(kind: DataKind, columns: set[str]) -> str:
    """Return the option that names the columns, with the names that are probably meant."""
    wanted = {"pairs": "pairs", "unpaired": "unpaired", "text": "completion", "prompts": "prompt"}[kind]
    lower = {column.lower(): column for column in columns}
    names = {
        ours: next((lower[name] for name in (ours, *_ALSO[ours]) if name in lower), None)
        for ours in next(form.columns for form in FORMS if form.name == wanted)
    }
    whole = all(names.values())
    pairs = [(ours, theirs or "<yours>") for ours, theirs in names.items() if ours != theirs]
    option = ",".join(f"{ours}={theirs}" for ours, theirs in pairs)
    setting = ", ".join(f"{ours}: {theirs}" for ours, theirs in pairs)
    return (
        f"{'Try' if whole else 'Map your columns:'} --columns {option} (in a file, columns: {{{setting}}}), or choose "
        "a method that reads this data."
    )
