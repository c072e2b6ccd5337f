"""Names that are folders or names on the hub: which they are, what was meant instead, and whether the hub answers."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from alignkit.errors import nearest

SECONDS = 5.0  # for a connection to the hub; its client tries for more than a minute
_OF_MODELS = ("config.json", "adapter_config.json")


def is_path(name: str) -> bool:
    """Return whether a name can only be meant as a path: the hub's are `name` and `org/name`."""
    parts = name.rstrip("/").split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or Path(name).expanduser().exists():
        return True
    return len(parts) == 2 and (parts[1] == "model" or Path(parts[0]).exists())


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model or an adapter."""
    return any((folder / name).is_file() for name in _OF_MODELS)


def meant(name: str) -> str:
    """Return " Did you mean '...'?" with a folder of a model near a path without one, or what is there; or ""."""
    path = Path(name).expanduser()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if there.is_file():
        return f" '{there}' is a file."
    rest = path.relative_to(there).parts
    names = sorted(p.name for p in there.iterdir() if p.is_dir() and not p.name.startswith("."))
    close = nearest(rest[0], names).rpartition("mean '")[2].removesuffix("'?") if rest else ""
    begins = [there / close if close else there, there]
    found = next((f for b in begins for f in (b.joinpath(*rest[1:]), b, b / "model") if holds_model(f)), None)
    if found is not None:
        return f" Did you mean '{found}'?"
    return f" The folder '{there}' holds: {', '.join(names[:8])}." if names and rest else ""


def silent_hub() -> str | None:
    """Return the hub's address where it takes no connection within SECONDS; None where it does, or is not asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    endpoint = urlsplit(str(constants.ENDPOINT))
    via = urlsplit(getproxies().get(endpoint.scheme) or constants.ENDPOINT)
    port = via.port or (443 if via.scheme == "https" else 80)
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((via.hostname or "", port), SECONDS).close()
        except OSError:
            return
        answered.set()

    # a thread: looking up the address has no time limit of its own
    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return None if answered.is_set() else str(constants.ENDPOINT)
