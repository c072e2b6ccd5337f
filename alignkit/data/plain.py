"""Examples without tensors: as lists, while they are made; as bytes, where many are only compared or counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from alignkit.types import Completion, Example


class Answer(NamedTuple):
    """The tokens of a completion, and which of them are learned; None: all of them."""

    ids: Sequence[int]
    trained: Sequence[bool] | None = None


@dataclass(slots=True)
class Tokenised:
    """An example before its lists become tensors, or the arrays of a store; the fields are those of `Example`."""

    prompt: Sequence[int]
    answers: tuple[Answer, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)
    row: int = 0
    asked: str | list[dict[str, Any]] = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    declared: Mapping[str, Any] = field(default_factory=dict)

    def example(self) -> Example:
        """Return it with tensors."""
        completions = tuple(
            Completion(_ids(ids), None if trained is None else torch.tensor(trained, dtype=torch.bool))
            for ids, trained in self.answers
        )
        about = self.numbers, self.row, self.asked, self.columns
        return Example(_ids(self.prompt), completions, *about, declared=self.declared)


def _ids(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int32)


class Raw(NamedTuple):
    """An example as bytes.

    prompt: int32. answers: of each, the tokens (int32), and whether each is learned (a byte each; None: all are).
    """

    prompt: bytes
    answers: tuple[tuple[bytes, bytes | None], ...]
    numbers: Mapping[str, float]
    columns: Mapping[str, Any]
    source: str
    order: float | None
    declared: Mapping[str, Any]

    @classmethod
    def of(cls, e: Example) -> Raw:
        """Return an example as bytes."""
        answers = tuple(
            (c.tokens.numpy().tobytes(), None if c.trained is None else c.trained.to(torch.uint8).numpy().tobytes())
            for c in e.completions
        )
        return cls(e.prompt.numpy().tobytes(), answers, e.numbers, e.columns, e.source, e.order, e.declared)

    @property
    def n_tokens(self) -> int:
        """Tokens of the tree: the prompt once, and every completion."""
        return (len(self.prompt) + sum(len(tokens) for tokens, _ in self.answers)) // 4

    def digested(self, placed: bool) -> bytes:
        """Return what a run compares of an example when it is resumed; placed: also its source and order."""
        parts = [_sized(self.prompt, 4)]
        for tokens, trained in self.answers:
            flags = np.ones(len(tokens) // 4, np.uint8) if trained is None else np.frombuffer(trained, np.uint8)
            parts += [_sized(tokens, 4), _sized(flags.nonzero()[0].astype("<i8").tobytes(), 8)]
        parts.append(json.dumps(sorted(self.numbers.items())).encode() if self.numbers else b"[]")
        parts.append(json.dumps(self.columns, sort_keys=True, default=str).encode() if self.columns else b"{}")
        if self.declared:
            parts.append(json.dumps(self.declared, sort_keys=True, default=str).encode())
        if self.order is not None or placed:
            parts.append(json.dumps([self.source, self.order]).encode())
        return b"".join(parts)


def _sized(part: bytes, width: int) -> bytes:
    return (len(part) // width).to_bytes(4, "little") + part
