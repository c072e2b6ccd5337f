"""The alarms of a run's folder as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignkit.alarms import Alarm
from alignkit.files import write_text
from alignkit.insight.health.watch import replay

Alarms = Sequence[tuple[int, Alarm]]  # with their steps


def replay_with(folder: Path, changes: Mapping[str, Any]) -> Alarms:
    """Return what `replay` returns; limits may have the prefix that they have in a run's settings, health.kl_high."""
    return replay(folder, {name.removeprefix("health."): value for name, value in changes.items()})


def table(alarms: Alarms) -> Any:
    """Return a rich table: step, alarm, what happened, what to do."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table("step", "alarm", "what", "to do", box=None, pad_edge=False)
    for step, alarm in alarms:
        grid.add_row(str(step), alarm.name, escape(alarm.message.partition(": ")[2]), escape(alarm.remedy))
    return grid


def write_json(alarms: Alarms, path: Path) -> None:
    """Write the alarms as a JSON list, in the form of alarms.jsonl."""
    write_text(path, json.dumps([{"step": step, **asdict(a)} for step, a in alarms], indent=1) + "\n")
