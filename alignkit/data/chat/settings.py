"""What a user can set about conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from alignkit.config import OnDropped, RunConfig, TrainOn


@dataclass(frozen=True)
class Chat:
    """How conversations are read.

    train_on: the assistant's turns of an answer that are learned. on_dropped: what is done where the template leaves
    out a part of a learned answer. special_tokens: control tokens spelled out in the rows' text are control tokens.
    date: the day that templates write, None for today. tools: JSON schemas for rows without their own. arguments:
    variables of the template, for all rows. seconds: the template's time limit for each row.
    """

    train_on: TrainOn = "all"
    on_dropped: OnDropped = "refuse"
    special_tokens: bool = False
    date: date | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 10.0

    @classmethod
    def of(cls, config: RunConfig) -> Chat:
        """Return the settings of a run."""
        return cls(
            config.train_on,
            config.on_dropped,
            config.special_tokens_in_text,
            config.template_date,
            config.tools,
            config.chat_template_kwargs,
        )
