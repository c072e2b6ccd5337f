"""Metrics that methods share: those on pairs, and those on sampled completions."""

from __future__ import annotations

from torch import Tensor

from alignkit.types import Batch, Outputs, Term, metric
from alignkit_kernels import PolicyLoss, sequence_sum


def pair_metrics(batch: Batch, logps_C: Tensor, rewards_S: Tensor) -> dict[str, Term]:
    """Return the metrics that every method on pairs logs; a tie counts as half correct in the accuracy.

    logps_C: the policy's log-probabilities in nats. rewards_S: implicit rewards, alternating chosen and rejected.
    """
    chosen, rejected = batch.pairs(rewards_S)
    logps_chosen, logps_rejected = batch.pairs(sequence_sum(logps_C.detach(), batch.cu_seqlens))
    length_chosen, length_rejected = batch.pairs(batch.lengths.float())
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": wins(chosen, rejected),
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


def rollout_metrics(batch: Batch, outputs: Outputs, out: PolicyLoss) -> dict[str, Term]:
    """Return the metrics that every method on sampled completions logs.

    "kl" is the k3 estimate of KL(policy || reference) in nats per sequence, for the sampling policy on its own samples.
    """
    terms = {
        "clip_fraction": metric(out.clipped.float(), over="tokens"),
        "ratio/max": metric(out.ratios, over="tokens", largest=True),
    }
    if outputs.entropy is not None:
        terms["entropy"] = metric(outputs.entropy, over="tokens")
    if "reference_logps" in batch:
        sampled_by = batch["old_logps"] if "old_logps" in batch else outputs.logps.detach()
        log_r = (batch.reference_logps - sampled_by).clamp(max=20.0)
        terms["kl"] = metric(sequence_sum(log_r.expm1() - log_r, batch.cu_seqlens), over="completions")
    return terms


def wins(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 where a > b, 0.5 where they are equal, else 0; float32, with the shape of a."""
    return (a > b).float() + 0.5 * (a == b).float()
