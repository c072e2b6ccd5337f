"""Building a critic: from the policy, the reward model or a folder, or as a head on the policy's trunk."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from alignkit.config import RunConfig
from alignkit.errors import ConfigError
from alignkit.models.adapters import add_lora
from alignkit.models.loading import causal_lm, classifier_like, from_pretrained, readied
from alignkit.models.rope import switch_of
from alignkit.models.scoring import Scorer
from alignkit.models.unread import adapters_in_memory, zero
from alignkit.models.values import ActorCritic, Valuer, number_head, value_head

logger = logging.getLogger(__name__)

PADDING_ROW = "alignkit_padding_rows"  # in config.json of a reward model: rows of its embeddings that only pad


def with_critic(
    policy: Scorer | Valuer, config: RunConfig, reward_folder: str | None, device: torch.device
) -> ActorCritic:
    """Return policy and critic as one module; with `lora`, a separate critic is trained with adapters too.

    reward_folder: of the reward model, None without one. Raises ConfigError or ModelError where the critic cannot be
    loaded, or has another vocabulary.
    """
    assert isinstance(policy, Scorer)
    if config.critic == "shared":
        return ActorCritic(policy, value_head(policy.model))
    model = _initial(policy.model, config, reward_folder)
    theirs, ours = _vocabulary(model), _vocabulary(policy.model)
    if theirs != ours and config.critic == "auto":
        logger.info("the reward model has another vocabulary than the policy: the critic starts from the policy")
        model = classifier_like(policy.model)
    elif theirs != ours:
        raise ConfigError(
            f"the critic has a vocabulary of {theirs} tokens and the policy one of {ours}, but both must share a "
            "tokenizer; use critic: policy, or a reward model trained from the same base"
        )
    if (own := switch_of(causal_lm(model))) != switch_of(causal_lm(policy.model)):
        raise ConfigError(
            f"the critic's rotary frequencies change with the length of a sequence ({own or 'never'}) in another way "
            "than the policy's, and both read the same rows; use critic: policy or shared"
        )
    # a reward model's head scores whole answers, in its own units
    zero(number_head(model))
    if config.lora:
        with adapters_in_memory():
            model = add_lora(model, config.lora, "classifier")
    return ActorCritic(policy, Valuer(readied(model, config, device)).train())


def _vocabulary(model: nn.Module) -> int:
    lm = causal_lm(model)
    return int(lm.get_input_embeddings().weight.shape[0]) - int(getattr(lm.config, PADDING_ROW, 0))


def _initial(policy: nn.Module, config: RunConfig, folder: str | None) -> nn.Module:
    if config.critic == "policy" or (config.critic == "auto" and folder is None):
        return classifier_like(policy)
    if config.critic in ("auto", "reward"):
        if folder is None:
            raise ConfigError("critic: reward needs a reward model's folder in `reward`; use critic: policy or shared")
        return from_pretrained(str(folder), config, "classifier")
    if not Path(config.critic).is_dir():
        raise ConfigError(
            f"critic: the folder '{config.critic}' does not exist; give auto, policy, reward, shared, or a "
            "model's folder"
        )
    return from_pretrained(config.critic, config, "classifier")
