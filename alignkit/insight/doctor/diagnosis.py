"""examine(): run all probes; a diagnosis as text for a bug report and as JSON."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alignkit.insight.doctor.attention import attention
from alignkit.insight.doctor.devices import devices
from alignkit.insight.doctor.disks import disks
from alignkit.insight.doctor.kernels import kernels
from alignkit.insight.doctor.plugins import plugins
from alignkit.insight.doctor.probe import Part, Probe, run
from alignkit.insight.doctor.versions import versions


@dataclass(frozen=True)
class Diagnosis:
    """The results of all probes."""

    parts: tuple[Part, ...]

    @property
    def healthy(self) -> bool:
        """True if no part has a problem; warnings are allowed."""
        return all(part.severity != "problem" for part in self.parts)

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "healthy": self.healthy,
            "parts": {
                part.title: {
                    "severity": part.severity,
                    "facts": {fact.name: fact.value for fact in part.facts},
                    "troubles": [trouble._asdict() for trouble in part.troubles],
                }
                for part in self.parts
            },
        }

    def text(self) -> str:
        """Return plain text to print, each part with its troubles."""
        return "\n".join([*(line for part in self.parts for line in _lines(part)), _verdict(self.parts)])


def probes(runs: Path) -> dict[str, Probe]:
    """Return all probes by their titles; runs: the folder of runs."""
    return {
        "versions": versions,
        "devices": devices,
        "kernels": kernels,
        "attention": attention,
        "plugins": plugins,
        "disks": partial(disks, runs),
    }


def examine(runs: Path = Path("runs")) -> Diagnosis:
    """Examine versions, devices, kernels, attention, plugins and disks; runs: the folder of runs. Raises nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what a library logs while it is imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Diagnosis(tuple(run(title, probe) for title, probe in probes(runs).items()))
    finally:
        logging.disable(before)


def _lines(part: Part) -> list[str]:
    lines = [f"{part.title}: {part.severity}"]
    lines += [f"  {fact.name}: {' '.join(fact.value.split())}" for fact in part.facts]
    for severity, what, remedy in part.troubles:
        lines += [f"  {severity}: {' '.join(what.split())}", f"    remedy: {' '.join(remedy.split())}"]
    return [*lines, ""]


def _verdict(parts: tuple[Part, ...]) -> str:
    found = [trouble.severity for part in parts for trouble in part.troubles]
    if not found:
        return "nothing is wrong"
    counts = [(found.count(name), name) for name in ("problem", "warn")]
    words = [f"{n} {'warning' if name == 'warn' else name}{'s' * (n > 1)}" for n, name in counts if n]
    return " and ".join(words)
