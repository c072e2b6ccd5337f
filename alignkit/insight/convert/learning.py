"""Losses, lengths, sampling and policy gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.errors import ConfigError
from alignkit.insight.convert.work import Work

SAME = (
    "ld_alpha", "desirable_weight", "undesirable_weight", "center_rewards_coefficient",
    "temperature", "top_p", "top_k", "max_new_tokens", "importance_sampling_level", "mask_truncated_completions",
    "chat_template_kwargs", "rpo_alpha", "delta", "top_entropy_quantile", "entropy_coef", "normalize_advantages",
)  # fmt: skip
DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}


def loss_of(given: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, `method` among them, that give TRL's loss. Raises ConfigError: it is not offered."""
    types = given.get("loss_type") or trainer["defaults"].get("loss_type") or []
    types = [types] if isinstance(types, str) else list(types)
    weights = dict(zip(types, given.get("loss_weights") or [1.0] * len(types), strict=False))
    losses = [t for t in types if t not in trainer["added"]]
    mixed = next((ours for ours, able in trainer["mixed"].items() if len(losses) > 1 and {*losses} <= {*able}), None)
    if mixed is not None:
        sums = {"method": trainer["method"], mixed: {t: float(weights[t]) for t in losses}}
        return sums | {ours: weights[t] for t, ours in trainer["added"].items() if t in types}
    if len(losses) > 1 or any(t not in trainer["losses"] for t in losses) or (types and not losses):
        offered = ", ".join(trainer["losses"])
        raise ConfigError(
            f"loss_type: {' + '.join(map(str, types))} is not offered here; offered of this trainer's: {offered}. "
            "Change it in the file, or choose another method, see `alignkit methods`"
        )
    found = {"method": trainer["method"], **(trainer["losses"][losses[0]] if losses else {})}
    return found | {ours: weights[t] / weights[losses[0]] for t, ours in trainer["added"].items() if t in types}


def learning(work: Work) -> None:
    """Set the loss's own settings."""
    work.done |= {"loss_type", "loss_weights"}
    beta = work.get("beta")
    if beta is not None:
        work.same(["beta"])
    work.same(name for name in SAME if name in work.given or name in work.defaults)
    weight = work.get("cpo_alpha")
    if weight is not None:
        work.same(["cpo_alpha"])
    if "simpo_gamma" in work.defaults and work.get("simpo_gamma") is not None and _has(work, "simpo_gamma"):
        work.put("gamma_ratio", work.get("simpo_gamma") / beta)
    smoothing = work.get("label_smoothing")
    if smoothing and (work.settings.get("loss_type") in ("robust", "exo_pair") or "cpo_alpha" in work.defaults):
        work.same(["label_smoothing"])
    elif smoothing:
        work.lose("label_smoothing", "TRL's loss ignores it; here it would change the loss")
    divergence = work.get("f_divergence_type")
    if divergence not in (None, "reverse_kl"):
        work.put("divergence", DIVERGENCES.get(divergence, divergence))
    work.done.add("f_alpha_divergence_coef")
    if divergence == "alpha_divergence":
        work.same(["f_alpha_divergence_coef"])
    if work.get("sync_ref_model"):
        work.same(["ref_model_sync_steps", "ref_model_mixup_alpha"])
    work.done |= {"ref_model_sync_steps", "ref_model_mixup_alpha"}
    if work.get("precompute_ref_log_probs"):
        if _has(work, "precompute_ref_log_probs"):
            work.put("reference", "cached")
        else:
            work.lose("precompute_ref_log_probs")
    if work.samples:
        _policy_gradient(work, beta)


def _policy_gradient(work: Work, beta: float | None) -> None:
    clip, high = work.get("epsilon"), work.get("epsilon_high")
    variant = work.settings.get("variant")
    if variant != "cispo":  # it clips above only
        work.put("clip", clip)
    if variant == "cispo":  # TRL's number is the ratio itself
        if high is None or high <= 1:
            raise ConfigError("loss_type: cispo needs epsilon_high above 1, the largest ratio; 5.0 is usual")
        work.put("clip_high", high - 1)
    elif variant is not None:
        work.put("clip_high", clip if high is None else high)
    elif high is not None and high != clip:
        work.lose("epsilon_high")
    if variant is None:
        return
    scale = work.get("scale_rewards")
    work.put("scale", {True: "group", False: "none"}.get(scale, scale) if isinstance(scale, bool) else scale)
    if beta:
        work.put("kl", "unbiased" if work.get("use_bias_correction_kl") else "k3")
    work.done.add("use_bias_correction_kl")


def lengths(work: Work) -> None:
    """Set the limits of prompts and completions."""
    longest, completion = work.get("max_length"), work.get("max_completion_length")
    prompt = work.get("max_prompt_length")
    if work.samples:
        work.put("max_prompt_tokens", prompt)  # TRL does not cut prompts
        if completion is not None:
            work.put("sampling.max_new_tokens", completion)
        if work.get("use_transformers_continuous_batching") or work.get("use_transformers_paged"):
            work.put("rollout.backend", "continuous")
        return
    work.put("max_prompt_tokens", longest if prompt is None else prompt)
    work.put("max_completion_tokens", longest if completion is None else completion)
    if longest is not None:
        why = f"it limits prompt and completion together; here each may have {longest} tokens, so no row is cut more"
        work.left.append(("max_length", why))


def _has(work: Work, name: str) -> bool:
    from alignkit.trl_names import table

    return table()[name].target(work.method) is not None
