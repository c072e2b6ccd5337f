"""What a file of TRL sets, by TRL's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import ConfigError
from alignkit.insight.convert.script import read_script
from alignkit.trl_names import trainers


@dataclass(frozen=True)
class Source:
    """The settings of one trainer. cls: its configuration class. lines: where a script sets each.

    adapters: "LoraConfig" or "ModelConfig", whose defaults hold. unread: (name, why) of what a script computes.
    """

    cls: str
    given: Mapping[str, Any]
    adapters: str = "ModelConfig"
    lines: Mapping[str, int] = field(default_factory=dict)
    unread: tuple[tuple[str, str], ...] = ()


def read_source(path: Path, method: str | None) -> Source:
    """Read a YAML file of TRL's command line, or a script. method: which trainer, by our method's name.

    Raises ConfigError where the file cannot be read, or does not say which trainer it is for.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path, text, method)
    if path.suffix != ".py":
        raise ConfigError(f"'{path}' is neither a YAML file of TRL's command line (.yaml) nor a script (.py)")
    script = read_script(text, path)
    wanted = class_of(method) if method else None
    configs = [c for c in script.configs if wanted in (None, c.name)]
    if not configs:
        known = ", ".join(trainers())
        raise ConfigError(f"{path} builds no {wanted or 'configuration class of TRL that is known'}; known: {known}")
    if len(configs) > 1:
        found = ", ".join(f"{c.name} in line {c.line}" for c in configs)
        raise ConfigError(f"{path} builds several configurations ({found}); keep one, or choose by --method")
    given, lines, unread = script.settings_of(configs[0])
    return Source(configs[0].name, given, "LoraConfig", lines, unread)


def class_of(method: str) -> str:
    """Return TRL's configuration class of a method. Raises ConfigError: TRL 1.16 has none."""
    for name, one in trainers().items():
        if method in (one["method"], *(loss.get("method") for loss in one["losses"].values())):
            return name
    raise ConfigError(
        f"TRL has no configuration class for '{method}'; methods: "
        + ", ".join(dict.fromkeys(one["method"] for one in trainers().values()))
    )


def _from_yaml(path: Path, text: str, method: str | None) -> Source:
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must contain settings of TRL, found {type(given).__name__}")
    if method is None:
        raise ConfigError(f"{path} does not say which trainer reads it; add --method with the X of `trl X --config`")
    return Source(class_of(method), {str(k): _number(v) for k, v in given.items()})


def _number(value: Any) -> Any:
    """Return 5e-6, a text in YAML, as the number that TRL's command line reads."""
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", value)
    return float(value) if is_number else value
