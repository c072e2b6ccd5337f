"""examine(): all probes, one after the other, as text for a bug report and as JSON."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

from alignkit.insight.doctor import computing, installed, kept, machine, software, surroundings
from alignkit.insight.doctor.parts import Asked, Part, Probe, looked

PROBES: dict[str, Probe] = {
    "versions": software.versions,
    "libraries": software.working,
    "devices": machine.devices,
    "kernels": computing.kernels,
    "attention": computing.attention,
    "plugins": installed.plugins,
    "reference cache": kept.cache,
    "disks": kept.disks,
    "environment": surroundings.environment,
    "terminal": surroundings.terminal,
}


@dataclass(frozen=True)
class Diagnosis:
    """What was found, part by part."""

    parts: tuple[Part, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is a problem; warnings may be there."""
        return all(part.severity != "problem" for part in self.parts)

    def describe(self) -> dict[str, Any]:
        """Return everything as it goes into JSON."""
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
        """Return what to print: plain text, troubles under the part that they are of."""
        return "\n".join([*(line for part in self.parts for line in _lines(part)), _verdict(self.parts)])


def examine(asked: Asked | None = None) -> Diagnosis:
    """Look at versions, devices, kernels, plugins, the cache, disks and the environment. Raises nothing."""
    wanted = asked or Asked()
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what a library has to say of itself while it is imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Diagnosis(tuple(looked(title, probe, wanted) for title, probe in PROBES.items()))
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
