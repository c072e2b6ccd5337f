"""A method's loss and metrics over the held-out rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from alignkit import finish, meter
from alignkit.context import StepContext
from alignkit.roles import in_step
from alignkit.stream import chunks, seeded

if TYPE_CHECKING:
    from alignkit.engine import Loop


def evaluate(loop: Loop, step: int) -> dict[str, float]:
    """Return the loss and the metrics as "eval/NAME" numbers; nothing where no rows are held out.

    What is sampled of a held-out prompt depends on its place among them, so that evaluations can be compared.
    """
    rows, ranks, method = loop.rows.held_out, loop.parts.ranks, loop.method
    if not rows:
        return {}
    metrics, extra, offset = meter.Meter(), dict[str, float](), 0
    with finish.evaluating(loop.parts.policy, method.dropout()):
        for part in chunks(rows, loop.config.batch_size, max(method.min_batch, ranks.n)):
            loop.extra = {}
            generator = seeded(loop.config.seed, 3, offset)
            ctx = StepContext(loop, step, part, generator, training=False, offset=offset)
            batch = loop.collect(loop.shard(part), ctx)
            metrics.expect(meter.counts(batch, ranks.sum))
            for micro, weight in in_step(batch.micro_batches(loop.parts.roles.max_tokens), ranks.most):
                with torch.no_grad():
                    terms = method.loss(micro, loop.parts.roles)
                metrics.add(terms, meter.sums(terms, micro, method.name), weight)
            share = len(part) / len(rows)
            extra |= {k: extra.get(k, 0.0) + share * v for k, v in loop.extra.items()}
            offset += len(part)
    values = metrics.means(ranks.sum, ranks.largest) | extra
    return {f"eval/{name}": value for name, value in values.items()}
