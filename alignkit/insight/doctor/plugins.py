"""Installed plugins, and which of them are broken."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from alignkit.insight.doctor.probe import Fact, Trouble


def plugins() -> Iterator[Fact | Trouble]:
    """Yield every installed method, reward, judge and listener, and those that cannot be used."""
    from alignkit import registry
    from alignkit.errors import PluginError

    found = registry.plugins()
    sound = [f"{p.name} ({p.distribution} {p.version})" for p in found if p.method is not None]
    yield Fact("methods", ", ".join(sound) or "none")
    if not found:
        yield Trouble("problem", "no method is installed", "pip install alignkit-dpo")
    for plugin in found:
        if plugin.problem:
            yield Trouble("problem", plugin.problem, _remedy(registry.GROUP, plugin.name))
    for group, kind, load in (
        (registry.REWARDS, "rewards", registry.reward),
        (registry.JUDGES, "judges", registry.judge),
    ):
        yield Fact(f"{kind} of plugins", ", ".join(registry.names(group)) or "none")
        for name in registry.names(group):
            try:
                load(name)
            except PluginError as error:
                yield Trouble("problem", str(error), _remedy(group, name))
    refused: list[str] = []
    listeners = registry.listeners(refused.append)
    yield Fact("listeners", ", ".join(listeners) or "none")
    for what in refused:
        yield Trouble("problem", what, "upgrade or uninstall its distribution")


def _remedy(group: str, name: str) -> str:
    owners = sorted({e.dist.name for e in entry_points(group=group) if e.name == name and e.dist})
    if len(owners) > 1:
        return f"pip uninstall {owners[-1]}, or {' or '.join(owners[:-1])}"
    return f"pip install -U {owners[0]}, or pip uninstall {owners[0]}" if owners else "uninstall its distribution"
