"""The alarms of a run's folder on the terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignkit.alarms import Alarm
from alignkit.files import write_text
from alignkit.insight.health.watch import replay

Found = Sequence[tuple[int, Alarm]]


def replayed(folder: Path, changes: Mapping[str, Any]) -> Found:
    """Return what `replay` does; limits may be written as in a run's settings, health.kl_high, too."""
    return replay(folder, {name.removeprefix("health."): value for name, value in changes.items()})


def table(found: Found) -> Any:
    """Return a rich table: step, alarm, what happened, what to do."""
    from rich.markup import escape
    from rich.table import Table

    made = Table("step", "alarm", "what", "to do", box=None, pad_edge=False)
    for step, alarm in found:
        made.add_row(str(step), alarm.name, escape(alarm.message.partition(": ")[2]), escape(alarm.remedy))
    return made


def write_json(found: Found, path: Path) -> None:
    """Write the alarms as a list, in the form that alarms.jsonl has."""
    write_text(path, json.dumps([{"step": step, **asdict(a)} for step, a in found], indent=1) + "\n")
