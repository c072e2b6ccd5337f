"""The reference cache as a run uses it: a file that is full, locked, read-only or damaged does not end the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from alignkit.databases import Spare
from alignkit.reference.cache import LogpCache, default_path


class RunCache:
    """The methods of `LogpCache` that a run needs; they raise nothing. What cannot be stored is kept in memory.

    Memory: four bytes per learned token, less than the rows themselves. hits, misses: as in `LogpCache`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path).expanduser() if path is not None else default_path()
        self.hits = 0
        self.misses = 0
        self._kept: dict[bytes, Tensor] = {}
        self._file = Spare("reference cache", self.path, lambda: LogpCache(self.path), b"CREATE TABLE logps")

    @property
    def stores(self) -> bool:
        """False from the first value that could not be stored: other processes cannot read what is kept in memory."""
        return self._file.writable

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """Return the values that are stored or kept, float32 [c]."""
        wanted = list(dict.fromkeys(keys))
        found = {k: self._kept[k] for k in wanted if k in self._kept}
        elsewhere = [k for k in wanted if k not in found]
        nothing: dict[bytes, Tensor] = {}
        found |= self._file.read(lambda file: file.get(elsewhere), nothing)
        self.hits += len(found)
        self.misses += len(wanted) - len(found)
        return found

    def put(self, items: Mapping[bytes, Tensor], fingerprint: str) -> None:
        """Store one reference's values, float32 [c], or keep them."""
        if not self._file.write(lambda file: file.put(items, fingerprint)):
            self._kept |= {k: value.detach().cpu().clone() for k, value in items.items()}

    def use(self, fingerprint: str, label: str = "") -> None:
        """Record that a reference is in use today."""
        self._file.write(lambda file: file.use(fingerprint, label))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
