"""sample(): checks, and the choice of a backend of this process; the same as samplers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from alignkit.data.chat import turn_end
from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.models.loading import causal_lm
from alignkit.rollout.batched import Batched
from alignkit.rollout.continuous import sample_continuously
from alignkit.rollout.mixture import Mixture
from alignkit.rollout.sampler import Request, Sampled, Sampler, Setup
from alignkit.rollout_settings import Sampling

DEFAULTS = Sampling()


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor],
    sampling: Sampling = DEFAULTS,
    *,
    n: int = 1,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    mixture: Mixture | None = None,
    greedy: bool = False,
    backend: str = "generate",
) -> list[list[Sampled]]:
    """Return n sampled completions of each prompt, [prompt][completion].

    prompts: text, tokenised as it is, or tokens; they are never cut. seed: from 0 to 2^63 - 1. numbers: identify the
    prompts, default: their positions. mixture: sample from it instead of from the model.
    greedy: take the most likely token each time, whatever temperature, top_p and top_k are.
    backend: generate, transformers or continuous. With "generate" a completion depends on the weights, the prompt,
    `seed`, its prompt's number and its own number, and not on batches, ranks or order, except for rounding; so it does
    with "transformers", whose own `generate` computes the same more slowly. With "continuous" the same call on the same
    machine has returned the same samples, but they depend on everything sampled in that call, and `numbers` is ignored.
    The model and the global generators are restored to their state before the call.
    Raises ConfigError (no end-of-sequence token, or a setting that the backend does not support), DataError (an empty
    prompt) and ModelError (more tokens than the model has positions).
    """
    lm = causal_lm(model)
    ends = ends_of(lm, tokenizer)
    tokens = [list(tokenizer(p)["input_ids"] if isinstance(p, str) else map(int, p)) for p in prompts]
    check_prompts(lm, tokens, sampling.max_new_tokens)
    if backend == "continuous":
        if mixture is not None:
            raise ConfigError("backend: continuous does not support mixtures of two models; use backend: generate")
        return sample_continuously(model, tokens, sampling, ends, n, seed, greedy)
    work = Batched(model, tokenizer, sampling, ends, seed, mixture, greedy, own=backend == "generate")
    return work.sample(tokens, n, range(len(tokens)) if numbers is None else numbers)


class Local(Sampler):
    """`sample` with the model that is trained, whose weights are always in force. backend: see there."""

    def __init__(self, setup: Setup, backend: str = "generate") -> None:
        self.setup, self.backend = setup, backend

    def sample(self, request: Request) -> list[list[Sampled]]:
        """Return the completions, see `alignkit.rollout.sample`."""
        with self.setup.gathered(), self.setup.autocast():
            return sample(
                self.setup.model,
                self.setup.tokenizer,
                request.prompts,
                request.sampling,
                n=request.n,
                seed=request.seed,
                numbers=request.numbers,
                mixture=request.mixture,
                greedy=request.greedy,
                backend=self.backend,
            )

    def update(self, version: int, model: nn.Module) -> None:
        """Note the version: the weights are the model's own."""
        self.version = version


def ends_of(lm: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a sequence, the tokenizer's first. Raises ConfigError where it has none.

    A chat model's folder may name others that end a turn; ordinary tokens among them are defaults of the configuration,
    for another vocabulary, and are ignored.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token and save it again")
    named = lm.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    more = [i for i in (*named, turn_end(tokenizer)) if i in special]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def check_prompts(lm: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise DataError for an empty prompt, ModelError for more tokens than the model has positions."""
    config = lm.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) is not None  # has no limit
    limit = None if rotary else getattr(config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DataError(f"prompt {number} of {len(prompts)} is empty; give at least one token")
        if limit and len(prompt) + max_new_tokens > limit:
            raise ModelError(
                f"prompt {number} of {len(prompts)} has {len(prompt)} tokens, and with max_new_tokens {max_new_tokens} "
                f"needs more than the model's {limit} positions; lower max_new_tokens or max_prompt_tokens"
            )
