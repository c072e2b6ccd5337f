"""Fingerprints of the models that a run was started with: models.json in its folder.

    {"model": {"given": "base", "content": {"config.json": "5b0c...", "model.safetensors": "9f21..."}},
     "reward.use": {...}}

A model's folder is known by the content of its files, not by its path; a model of the hub by its commit, an object by
its weights. Endpoints are known by their settings in config.yaml.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from alignkit.config import RunConfig
from alignkit.errors import ConfigError, ModelError
from alignkit.files import replace_text, sha256
from alignkit.reference.keys import weights_digest

logger = logging.getLogger(__name__)

FILE = "models.json"
ROLES = ("model", "tokenizer", "reward", "judge", "critic")
_KINDS = {".safetensors", ".bin", ".pt", ".json", ".jinja", ".model", ".txt", ".py"}
_ADAPTER = "adapter_config.json"


def found(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the models in a run's settings: the place in the settings -> what was given, and its content."""
    every = {}
    for role in ROLES:
        for place, value in _values(role, getattr(config, role)):
            if content := _content(value):
                every[place] = {"given": _name(value), "content": content}
            base = _base(value)
            if base is not None and (content := _content(base)):
                every[f"base of {place}"] = {"given": base, "content": content}
    return every


def check(folder: Path, config: RunConfig) -> dict[str, str]:
    """Write models.json; where the run is resumed, compare it first.

    Returns the paths that may differ from those in config.yaml: before -> now. Raises ModelError naming models that
    changed, unless `allow_changed_models` is set. A run of an earlier version has no such file, and is not compared.
    """
    path, now = folder / FILE, found(config)
    before = _read(path) if config.resume else {}
    changed = [k for k in before.keys() & now.keys() if before[k]["content"] != now[k]["content"]]
    if changed:
        what = "; ".join(_difference(k, before[k], now[k]) for k in sorted(changed))
        if not config.allow_changed_models:
            raise ModelError(
                f"{folder} was started with other models: {what}. Resume with the models as they were; to continue "
                f"with changed ones on purpose, add --allow-changed-models"
            )
        logger.warning("models changed since the run was started: %s", what)
    replace_text(path, json.dumps(before | now, indent=1) + "\n")
    return {before[k]["given"]: now[k]["given"] for k in before.keys() & now.keys()}


def _values(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the texts and objects in a setting, each with its place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _values(f"{place}.{key}", inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _values(f"{place}.{number}", inner)
    elif value is not None:
        yield place, value


def _name(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else str(value)


def _content(value: Any) -> dict[str, str]:
    """Return what identifies a model; empty where the value is none, or is not on this machine."""
    if isinstance(value, nn.Module):
        return {"weights": weights_digest(value)[:16]}
    if not isinstance(value, str | Path):
        return {}
    if _is_folder(value):
        files = sorted(p for p in Path(value).iterdir() if p.suffix in _KINDS and p.is_file())
        return {p.name: sha256(p)[:16] for p in files}
    return _commit(str(value))


def _is_folder(value: str | Path) -> bool:
    try:
        return Path(value).is_dir()
    except (OSError, ValueError):  # a long text, such as a judge's instructions
        return False


def _commit(name: str) -> dict[str, str]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name on the hub
        return {}
    return {"commit": Path(path).parent.name} if isinstance(path, str) else {}


def _base(value: Any) -> str | None:
    """Return the base model of an adapter's folder."""
    if not isinstance(value, str | Path) or not _is_folder(value):
        return None
    path = Path(value) / _ADAPTER
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # loading the model names the fault
        return None
    return base if isinstance(base, str) else None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {str(k): {"given": str(v["given"]), "content": dict(v["content"])} for k, v in saved.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}. Remove the file to resume without a comparison of the models"
        ) from None


def _difference(place: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what changed in a model, as "model 'base': config.json was 5b0c, is 77aa"."""
    names = sorted(before["content"].keys() | now["content"].keys())
    pairs = [(n, before["content"].get(n, "absent"), now["content"].get(n, "absent")) for n in names]
    parts = [f"{n} was {was}, is {is_}" for n, was, is_ in pairs if was != is_]
    more = f" and {len(parts) - 3} more files" if len(parts) > 3 else ""
    return f"{place} '{now['given']}': {', '.join(parts[:3])}{more}"
