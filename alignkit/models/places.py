"""Where a model is looked up: in a folder, or on the hub."""

from __future__ import annotations

from pathlib import Path

from alignkit.errors import ModelError
from alignkit.hub import SECONDS, holds_model, is_path, meant, silent_hub


def look(name: str | Path) -> None:
    """Raise ModelError for a path without a model, which is not looked up on the hub, and where the hub is silent."""
    text = str(name)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not holds_model(folder) and holds_model(folder / "model"):
            raise ModelError(f"'{text}' is the folder of a run, which is no model.{meant(text)}")
        return
    if is_path(text):
        raise ModelError(
            f"the folder '{text}' does not exist; give a model's folder, or a hub name such as org/name.{meant(text)}"
        )
    if not _is_cached(text) and (hub := silent_hub()):
        raise ModelError(
            f"no folder is called '{text}', nor is a model of this name in the local cache, and the hub ({hub}) did "
            f"not answer within {SECONDS:g} s. Give a model's folder, or check the name and the network.{meant(text)}"
        )


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def where(name: str | Path) -> str:
    """Return the words about where a name was looked up, for a message; "" for a folder."""
    if Path(name).exists():
        return ""
    return f" (no local folder has this name, so it was looked up on the hub.{meant(str(name))})"
