"""What identifies the rows of a source without reading them: the bytes of its files, the fingerprint of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """size: bytes, about. digest: returns what changes with the rows; raises OSError."""

    size: int
    digest: Callable[[], str]


def of_files(paths: Sequence[Path]) -> Origin | None:
    """Return the origin of rows in files; None where one cannot be read, which reading it reports."""
    try:
        size = sum(path.stat().st_size for path in paths)
    except OSError:
        return None
    return Origin(size, partial(_digest, paths))


def of_dataset(source: Any) -> Origin | None:
    """Return the origin of an object of `datasets`; None where it has no fingerprint, as one that is streamed."""
    import datasets

    if isinstance(source, datasets.DatasetDict):
        source = source.get("train")
    if not isinstance(source, datasets.Dataset):
        return None
    fingerprint = str(source._fingerprint)
    return Origin(source.data.nbytes, lambda: fingerprint)


def _digest(paths: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
