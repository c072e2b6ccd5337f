"""The manifest of a checkpoint: size and sha256 of its other files. A folder with one is complete."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import CheckpointError
from alignkit.files import sha256, share, sync

VERSION = 1


def described(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of files by their names, once they are on the disk."""
    files = {}
    for path in paths:
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return files


def seal(temporary: Path, files: Mapping[str, Any]) -> None:
    """Write the manifest of these files, which makes the folder a checkpoint."""
    share(temporary)
    sync(temporary)
    manifest = temporary / "manifest.json"
    manifest.write_text(
        json.dumps({"version": VERSION, "files": dict(sorted(files.items()))}, indent=1), encoding="utf-8"
    )
    sync(manifest)
    sync(temporary)


def verify(path: Path, own: int = 0, ranks: int = 1) -> None:
    """Raise CheckpointError naming a file that is missing or differs; each of several ranks reads its share of them."""
    for i, (name, entry) in enumerate(_manifest(path).items()):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing")
        if file.stat().st_size != entry["size"]:
            raise CheckpointError(f"{name} has {file.stat().st_size} bytes, but {entry['size']} were written")
        if i % ranks == own and sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{name} has changed since it was written: its sha256 differs")


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version = manifest["version"]
        files = {str(n): {"size": int(e["size"]), "sha256": str(e["sha256"])} for n, e in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError("manifest.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"manifest.json is damaged: {error!r}") from error
    if version != VERSION:
        raise CheckpointError(f"manifest.json has format version {version}, but this alignkit reads version {VERSION}")
    if any(Path(name).name != name for name in files):
        raise CheckpointError("manifest.json names files outside the checkpoint")
    return files
