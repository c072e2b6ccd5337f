"""What the methods on single answers share: their labels, and their metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit import Batch, Term, kl_metric, log_ratios, metric
from alignkit_kernels import sequence_sum


def labels(batch: Batch) -> dict[str, Tensor]:
    """Return which examples are desirable and which are not, bool [S]."""
    desirable = torch.tensor([bool(e.numbers["desirable"]) for e in batch.examples], device=batch.device)
    return {"desirable": desirable, "undesirable": ~desirable}


def label_metrics(batch: Batch, logps_C: Tensor, rewards: Tensor, margin: Tensor, right: Tensor) -> dict[str, Term]:
    """Return the metrics of a batch with `labels`.

    rewards: implicit ones, beta h. margin: distance to the baseline, positive on the right side. right: 1, 0 or, for a
    tie, 0.5. All [S].
    """
    kinds = {"chosen": "desirable", "rejected": "undesirable"}
    values = {
        "rewards": rewards,
        "logps": sequence_sum(logps_C.detach(), batch.cu_seqlens),
        "logratios": log_ratios(batch, logps_C),
        "length": batch.lengths.float(),
    }
    return {
        "rewards/margin": metric(margin, over="completions"),
        "rewards/accuracy": metric(right, over="completions"),
        **{f"{name}/{kind}": metric(v, over=over) for name, v in values.items() for kind, over in kinds.items()},
        **kl_metric(batch, logps_C),
    }
