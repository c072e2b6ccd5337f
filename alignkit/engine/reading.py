"""Settings -> the examples of a run, to train on and held out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from alignkit.config import RunConfig
from alignkit.data import Dataset, Report
from alignkit.data.blocks import encoded
from alignkit.data.plain import Tokenised
from alignkit.data.shelf import FOLDER, key_of, shelved
from alignkit.data.sources import lazy_parts, open_rows
from alignkit.data.stream import hold_out
from alignkit.data.streaming import Streamed
from alignkit.data.tokenise import tokenise_as, tokenised_as
from alignkit.data.views import raws
from alignkit.engine.state import Splits
from alignkit.method import Method
from alignkit.rewards import columns_read
from alignkit.types import Example

logger = logging.getLogger(__name__)


def read(config: RunConfig, method: Method[Any], tokenizer: Any, keep: bool = False) -> Splits:
    """Read, check and tokenise the rows. Raises DataError with every fault; logs what was dropped.

    keep: use the rows that are kept beside the runs, and keep them there.
    """
    streamed = _streamed(config, method, tokenizer) if config.streaming else None
    left: dict[str, None] = {}
    if streamed is None:
        train, weights = _examples(config.data, config, method, tokenizer, left, keep, config.order_by)
    else:
        train, weights = streamed.first, {}
        left |= streamed.left
    if config.eval_data is not None:
        held_out, _ = _examples(config.eval_data, config, method, tokenizer, left, keep)
    else:
        train, held_out = hold_out(train, config.eval_fraction, config.seed)
    _name_unread(config, method, left)
    if streamed is None:
        logger.info("%d rows to train on, %d held out", len(train), len(held_out))
    return Splits(train, held_out, digest(train, held_out, weights), weights, streamed)


def digest(train: Sequence[Example], held_out: Sequence[Example], weights: Mapping[str, float]) -> str:
    """Return the sha256 of all examples, which a resumed run compares."""
    whole = hashlib.sha256()
    for raw in chain(raws(train), raws(held_out)):
        whole.update(raw.digested(placed=bool(weights)))
    if weights:
        whole.update(json.dumps(weights).encode())
    return whole.hexdigest()


def _name_unread(config: RunConfig, method: Method[Any], left: Collection[str]) -> None:
    """Log the columns that neither form nor method, neither rewards nor `order_by` read: a weight without a reader,
    say, is otherwise lost without a word."""
    scored = columns_read(config.reward, config.judge, left) if method.data == "prompts" else frozenset[str]()
    unread = sorted({*left} - scored - {(config.order_by or "").removeprefix("-")})
    if unread:
        logger.info("columns that nothing reads: %s", ", ".join(unread))


def _streamed(config: RunConfig, method: Method[Any], tokenizer: Any) -> Streamed:
    source, encode = open_rows(config.data), partial(_encode, config, tokenizer)
    return Streamed(
        source,
        method.data,
        config.columns,
        encode,
        config.batch_size,
        config.seed,
        config.shuffle_buffer,
        method.columns,
    )


def _encode(config: RunConfig, tokenizer: Any, dataset: Dataset) -> tuple[list[Example], Report]:
    return tokenise_as(config, dataset, tokenizer)


def _tokenised(config: RunConfig, tokenizer: Any, dataset: Dataset) -> tuple[list[Tokenised], Report]:
    return tokenised_as(config, dataset, tokenizer)


def _examples(
    source: Any,
    config: RunConfig,
    method: Method[Any],
    tokenizer: Any,
    left: dict[str, None],
    keep: bool,
    order_by: str | None = None,
) -> tuple[Sequence[Example], Mapping[str, float]]:
    """Return the examples of a source, and the weights of its parts. left: gets the columns that are left over."""
    opened, encode = lazy_parts(source), partial(_tokenised, config, tokenizer)
    make = partial(encoded, opened, method.data, config.columns, encode, order_by, method.columns, _Counter())
    key = key_of(opened, method.data, config, tokenizer, order_by, method.columns) if keep else None
    found = make() if key is None else shelved(config.output / FOLDER, key, make)
    left |= found.report.left
    for line in found.lines():
        logger.info(line)
    return found.examples, found.weights


class _Counter:
    """Logs how many rows were read, at most every few seconds."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, rows: int) -> None:
        now = time.monotonic()
        if now - self._last >= self.SECONDS:
            self._last = now
            logger.info("%s rows read and tokenised so far", f"{rows:,}")
