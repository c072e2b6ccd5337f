"""Settings -> the examples of a run, to train on and held out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from alignkit.config import RunConfig
from alignkit.data import Dataset, Report
from alignkit.data.blocks import encoded
from alignkit.data.sources import open_rows
from alignkit.data.stream import hold_out
from alignkit.data.streaming import Streamed
from alignkit.data.tokenise import tokenise_as
from alignkit.engine.state import Splits
from alignkit.method import Method
from alignkit.rewards import columns_read
from alignkit.types import Example

logger = logging.getLogger(__name__)


def read(config: RunConfig, method: Method[Any], tokenizer: Any) -> Splits:
    """Read, check and tokenise the rows. Raises DataError with every fault; logs what was dropped."""
    streamed = _streamed(config, method, tokenizer) if config.streaming else None
    left: dict[str, None] = {}
    if streamed is None:
        train, weights = _examples(config.data, config, method, tokenizer, left, config.order_by)
    else:
        train, weights = streamed.first, {}
        left |= streamed.left
    if config.eval_data is not None:
        held_out, _ = _examples(config.eval_data, config, method, tokenizer, left)
    else:
        train, held_out = hold_out(train, config.eval_fraction, config.seed)
    _name_unread(config, method, left)
    digest = hashlib.sha256()
    for e in chain(train, held_out):
        for part in (e.prompt, *(t for c in e.completions for t in (c.tokens, c.trained_at))):
            digest.update(len(part).to_bytes(4, "little") + part.numpy().tobytes())
        digest.update(json.dumps(sorted(e.numbers.items())).encode())
        digest.update(json.dumps(e.columns, sort_keys=True, default=str).encode())
        if e.declared:
            digest.update(json.dumps(e.declared, sort_keys=True, default=str).encode())
        if e.order is not None or weights:
            digest.update(json.dumps([e.source, e.order]).encode())
    if weights:
        digest.update(json.dumps(weights).encode())
    if streamed is None:
        logger.info("%d rows to train on, %d held out", len(train), len(held_out))
    return Splits(train, held_out, digest.hexdigest(), weights, streamed)


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


def _examples(
    source: Any,
    config: RunConfig,
    method: Method[Any],
    tokenizer: Any,
    left: dict[str, None],
    order_by: str | None = None,
) -> tuple[Sequence[Example], Mapping[str, float]]:
    """Return the examples of a source, and the weights of its parts. left: gets the columns that are left over."""
    found = encoded(source, method.data, config.columns, partial(_encode, config, tokenizer), order_by, method.columns)
    left |= found.report.left
    for line in found.lines():
        logger.info(line)
    return found.examples, found.weights
