"""Metrics that methods share: those on pairs, and those on sampled completions."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.types import Batch, Outputs, Term, metric
from alignkit_kernels import PolicyLoss, sequence_sum

ULPS = 4 * torch.finfo(torch.float32).eps  # measured passes in other layouts differ by up to 1.5 eps in these units
LOGIT = 32.0  # a log-probability is a logit minus a log-sum-exp, and is rounded like them, however small it is itself


def pair_metrics(batch: Batch, logps_C: Tensor, rewards_S: Tensor, per_nat: float | Tensor = 1.0) -> dict[str, Term]:
    """Return the metrics that every method on pairs logs; a tie counts as half correct in the accuracy.

    logps_C: the policy's log-probabilities in nats. rewards_S: implicit rewards, alternating chosen and rejected.
    per_nat: what a nat of a completion's summed log-ratio adds to its reward, a number or [S]: rewards that differ by
    less than the rounding of these sums (see `rounding`) are a tie.
    """
    chosen, rejected = batch.pairs(rewards_S)
    reference = [batch.reference_logps] if "reference_logps" in batch else []
    tolerance = sum(batch.pairs(per_nat * rounding(batch.cu_seqlens, logps_C, *reference)))
    logps_chosen, logps_rejected = batch.pairs(sequence_sum(logps_C.detach(), batch.cu_seqlens))
    length_chosen, length_rejected = batch.pairs(batch.lengths.float())
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": wins(chosen, rejected, tolerance),
        "logps/chosen": logps_chosen,
        "logps/rejected": logps_rejected,
        "length/chosen": length_chosen,
        "length/rejected": length_rejected,
    }
    if "reference_logps" in batch:
        ratios_chosen, ratios_rejected = batch.pairs(log_ratios(batch, logps_C))
        values |= {"logratios/chosen": ratios_chosen, "logratios/rejected": ratios_rejected}
    return {name: metric(value) for name, value in values.items()} | kl_metric(batch, logps_C)


def log_ratios(batch: Batch, logps_C: Tensor) -> Tensor:
    """Return log policy - log reference of each completion, [S], in nats per token; 0 at the start of a run."""
    return sequence_sum(logps_C.detach() - batch.reference_logps, batch.cu_seqlens, mean=True)


def kl_metric(batch: Batch, logps_C: Tensor) -> dict[str, Term]:
    """Return "kl" where the batch has reference log-probabilities: nats per sequence, on the data's completions.

    The k3 estimator r - 1 - log r of KL(reference || policy), r = policy / reference, summed over a completion's
    tokens: never negative, and unbiased on samples of the reference (Schulman, 2020).
    """
    if "reference_logps" not in batch:
        return {}
    log_r = (logps_C.detach() - batch.reference_logps).clamp(max=20.0)  # e^20 is large enough to be noticed
    return {"kl": metric(sequence_sum(log_r.exp() - 1 - log_r, batch.cu_seqlens), over="completions")}


def rollout_metrics(batch: Batch, outputs: Outputs, out: PolicyLoss | None = None) -> dict[str, Term]:
    """Return the metrics that every method on sampled completions logs.

    out: of the surrogate, None for a method without one.
    "kl" is the k3 estimate of KL(policy || reference) in nats per sequence, for the sampling policy on its own samples.
    """
    terms = {}
    if out is not None:
        terms["clip_fraction"] = metric(out.clipped.float(), over="tokens")
        terms["ratio/max"] = metric(out.ratios, over="tokens", largest=True)
    if outputs.entropy is not None:
        terms["entropy"] = metric(outputs.entropy, over="tokens")
    if "reference_logps" in batch:
        sampled_by = batch["old_logps"] if "old_logps" in batch else outputs.logps.detach()
        log_r = (batch.reference_logps - sampled_by).clamp(max=20.0)
        terms["kl"] = metric(sequence_sum(log_r.expm1() - log_r, batch.cu_seqlens), over="completions")
    return terms


def rounding(cu_seqlens: Tensor, *logps: Tensor) -> Tensor:
    """Return how far apart float32 may put two sums over a completion that are equal without rounding, [S] nats.

    logps: [C] each, whose sums are added or subtracted, such as the policy's and the reference's. Every token is
    rounded for itself, by some units in the last place of LOGIT and of its log-probability, so the squares add up. A
    pass in another layout, or in another micro-batch, rounds otherwise.
    """
    sizes = sum((each.detach().abs() + LOGIT).double() for each in logps)
    return ULPS * sequence_sum(torch.as_tensor(sizes).square(), cu_seqlens).sqrt().to(logps[0].dtype)


def wins(a: Tensor, b: Tensor, tolerance: float | Tensor = 0.0) -> Tensor:
    """Return 1 where a > b, 0.5 where they are equal, else 0; float32, with the shape of a.

    Equal are numbers within a few units in the last place of float32, and, beyond that, within `tolerance`.
    """
    equal = (a == b) | ((a - b).abs() <= tolerance + ULPS * torch.maximum(a.abs(), b.abs()))
    return torch.where(equal, 0.5, (a > b).float())
