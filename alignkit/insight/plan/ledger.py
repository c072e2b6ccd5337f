"""Bytes of live tensors by purpose, and their peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class _Entry:
    def __init__(self, label: str, n_bytes: int) -> None:
        self.label, self.n_bytes = label, n_bytes


class Ledger(TorchDispatchMode):
    """While entered, it counts every storage that an operation allocates under the current label.

    Fake tensors count as the memory that real ones would take. now, peak: bytes by label.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._largest, self._total, self._label = 0, 0, "workspace"
        self._entries: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count what is allocated inside under this label."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def count(self, tensor: Tensor, label: str | None = None) -> None:
        """Count an existing tensor, or move it to another label; a tensor on "meta" takes no memory."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if (entry := self._entries.get(storage)) is not None:
            if label is not None:
                self.now[entry.label] -= entry.n_bytes
                self.now[label] += entry.n_bytes
                entry.label = label
            return
        entry = self._entries[storage] = _Entry(label or self._label, storage.nbytes())
        weakref.finalize(storage, self._release, entry)
        self.now[entry.label] += entry.n_bytes
        self._total += entry.n_bytes
        if self._total > self._largest:
            self._largest, self.peak = self._total, dict(self.now)

    def forget_peak(self) -> None:
        """Restart the search for the peak."""
        self._largest, self.peak = self._total, dict(self.now)

    def _release(self, entry: _Entry) -> None:
        self.now[entry.label] -= entry.n_bytes
        self._total -= entry.n_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, out)
        return out
