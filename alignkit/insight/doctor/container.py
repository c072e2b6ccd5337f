"""What a container or a batch system leaves a process of the machine: Linux's control groups, version 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Limit(NamedTuple):
    """Bytes of memory that a group may use, and uses."""

    limit: int
    used: int


def memory() -> Iterator[Limit]:
    """Yield the limits of the groups that hold this process, the innermost first; version 1 writes none as a huge one.

    Pages of files that can be dropped are not in use, as container tools count it: a group that reads large files
    fills its limit with them.
    """
    for group in _around("memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if limit:
            used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
            about = dict(line.rpartition(" ")[::2] for line in _read(group / "memory.stat").splitlines())
            idle = about.get("total_inactive_file") or about.get("inactive_file") or "0"
            yield Limit(limit, max(used - int(idle), 0))


def cores() -> float | None:
    """Return how many cores' time the groups that hold this process leave it, None where there is no limit."""
    found = []
    for group in _around("cpu"):
        version_1 = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"  # -1: none
        quota, _, period = (_read(group / "cpu.max") or version_1).partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _around(controller: str) -> Iterator[Path]:
    for line in _read(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = GROUPS / controller if controllers else GROUPS  # version 2 has one tree for all
        # in a container it may be the host's name, which is not there: then the top counts
        own = top / path.lstrip("/")
        yield from (group for group in (own, *own.parents) if group.is_relative_to(top))


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
