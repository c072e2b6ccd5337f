"""The mismatch of sampler and trainer: its metrics, and the weights that correct it.

    w = trainer / sampler = e^(log-probability by the trainer - log-probability by the sampler)

of a token, or of a completion (the product over its tokens), both of the distribution that the sampler draws from. The
gradient of a sample, times w, has the mean that it would have under samples of the trainer; a threshold trades some of
this for a bounded variance:

    token_truncate      min(w_t, C)                      truncated, TIS (fengyao.notion.site/off-policy-rl)
    sequence_truncate   min(w, C), w of the completion   the same, of whole completions (Ionides, 2008)
    token_mask          w_t in [floor, C], else 0        IcePop (Ring-1T, 2510.18855), with a floor of 0.5 and C = 5
    sequence_mask       w in [floor, C], else 0          masked, MIS (richardli.xyz/rl-collapse)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.rollout_settings import Rollout, Sampling
from alignkit_kernels import sequence_sum

LIMIT = 20.0  # log-ratios beyond it count as this in the metrics: e^20 is large enough to be noticed


def correction_weights(log_ratios: Tensor, cu_seqlens: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return the weight of each token's gradient, float32 [C], and where the threshold or the floor changed it, bool.

    log_ratios: log trainer - log sampler of each token, [C] nats. A weight is a number: it has no gradient.
    """
    kind, threshold = rollout.corrects, rollout.correction_threshold
    log_w = log_ratios.detach().double()
    if kind.startswith("sequence"):
        log_w = sequence_sum(log_w, cu_seqlens).repeat_interleave(cu_seqlens.diff())
    weights = torch.ones_like(log_w) if kind == "none" else log_w.exp()
    beyond = weights > threshold
    if kind.endswith("mask"):
        beyond = beyond | (weights < rollout.correction_floor)
        return weights.masked_fill(beyond, 0.0).float(), beyond
    return weights.clamp(max=threshold).float(), beyond


def mismatch_metrics(
    total: Callable[[Tensor], Tensor], largest: Callable[[Tensor], Tensor], trainer: Tensor, sampler: Tensor,
    beyond: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return the metrics of a step's tokens on all ranks; total, largest: the sum and the maximum over the ranks.

    trainer, sampler: log-probabilities of the same tokens, [C] nats. beyond: where a weight was changed, [C].
    "rollout/kl" is the k3 estimate w - 1 - log w of KL(sampler || trainer), nats per token: never negative, unbiased.
    """
    trainer, sampler = trainer.double(), sampler.double()
    log_w = (trainer - sampler).clamp(-LIMIT, LIMIT)
    ratios = log_w.exp()
    parts = [torch.ones_like(log_w), ratios, log_w.expm1() - log_w, trainer, sampler]
    parts += [] if beyond is None else [beyond.double()]
    n, *sums = total(torch.stack([part.sum() for part in parts])).tolist()
    mean, kl, by_trainer, by_sampler, *changed = (value / max(n, 1) for value in sums)
    top = float(largest(ratios.max()[None])[0])
    found = {"rollout/kl": kl, "rollout/ratio_mean": mean, "rollout/ratio_max": top}
    perplexities = torch.tensor([-by_trainer, -by_sampler], dtype=torch.float64).exp().tolist()
    found |= dict(zip(("rollout/perplexity", "rollout/sampler_perplexity"), perplexities, strict=True))
    if beyond is not None:
        found["rollout/corrected"] = changed[0]
    return found


def is_comparable(processed: bool, sampling: Sampling) -> bool:
    """Return whether a sampler's log-probabilities can be compared with the trainer's.

    Those of the bare model cannot be turned into those at a temperature: the sum over the vocabulary is not known.
    """
    bare = sampling.temperature == sampling.top_p == 1 and not sampling.top_k and not sampling.min_new_tokens
    return processed or bare


def check_comparable(processed: bool, sampling: Sampling, rollout: Rollout) -> None:
    """Raise ConfigError where a correction would compare two different distributions."""
    if rollout.corrects == "none" or is_comparable(processed, sampling):
        return
    given = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_new_tokens")}
    changed = ", ".join(f"{k} {v:g}" for k, v in given.items() if v != type(sampling).model_fields[k].default)
    raise ConfigError(
        f"the sampler returns log-probabilities of the bare model, but completions are drawn with {changed}, so that "
        "rollout.correction would compare two distributions. Let it return those that it draws from (vLLM: "
        "--logprobs-mode processed_logprobs), remove these settings of `sampling`, or set rollout.correction: none"
    )
