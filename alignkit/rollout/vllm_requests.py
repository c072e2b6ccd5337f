"""A request for completions as vLLM's /v1/completions takes it, and its reply as samples, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alignkit.errors import RolloutError
from alignkit.rollout.noise import splitmix
from alignkit.rollout.sampler import Request, Sampled
from alignkit.rollout.servers import ServerError
from alignkit.rollout_settings import Sampling

_MOST_STOPS = 4  # strings in a request to vLLM 0.32
_BITS = 2**40 - 1  # of a prompt's seed; its completions' seeds follow, and vLLM's seeds have 63 bits


def body_of(request: Request, at: int, ends: Sequence[int], model: str) -> dict[str, Any]:
    """Return the request for the completions of prompt `at`. ends: tokens that end one. model: its name there.

    vLLM gives the completions of one request the seeds seed, seed + 1, ...
    """
    s = request.sampling
    number = request.numbers[at] if request.numbers else at
    # generation settings of the model's folder are the server's defaults, so that each one is sent
    drawn = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    if not request.greedy:
        drawn = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
    return {
        "model": model,
        "prompt": list(request.prompts[at]),
        "n": request.n,
        "seed": seed_of(request.seed, number),
        "max_tokens": s.max_new_tokens,
        "min_tokens": s.min_new_tokens,
        **drawn,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,  # those of the server's folder; ours are named
        "stop_token_ids": list(ends),
        # vLLM finds no stop string among the first min_tokens tokens, and takes 4; `cut` finds all of them
        "stop": s.stop[:_MOST_STOPS],
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
    }


def check_lengths(request: Request, most: int) -> None:
    """Raise RolloutError for a prompt that does not fit: vLLM would cut its completions short, silently."""
    longest = max(map(len, request.prompts), default=0)
    if longest + request.sampling.max_new_tokens > most:
        raise RolloutError(
            f"a prompt of {longest} tokens and max_new_tokens {request.sampling.max_new_tokens} are more than the "
            f"servers' --max-model-len {most}; lower max_prompt_tokens, or start them with a larger one"
        )


def seed_of(seed: int, number: int) -> int:
    """Return the seed of a prompt's first completion, from 0 to 2^62."""
    state = splitmix(torch.tensor(seed), torch.tensor(number))
    # the completions' seeds follow on it: room for as many as a prompt may have
    return (int(state) & _BITS) << 20


def samples_of(reply: Any, request: Request, at: int, ends: Sequence[int], tokenizer: Any) -> list[Sampled]:
    """Return the completions of prompt `at` in their order. Raises ServerError where one is missing or damaged."""
    try:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(request.n)):
            raise ServerError(f"{len(choices)} completions came back, not {request.n}")
        asked = list(request.prompts[at])
        return [_sample(choice, asked, request.sampling, ends, tokenizer) for choice in choices]
    except (LookupError, TypeError, AttributeError) as error:
        raise ServerError(f"the reply is not one of vLLM: {type(error).__name__}: {error}") from None


def _sample(choice: Any, asked: list[int], sampling: Sampling, ends: Sequence[int], tokenizer: Any) -> Sampled:
    tokens, logps = [int(t) for t in choice["token_ids"]], choice["logprobs"]["token_logprobs"]
    reason = choice["finish_reason"]
    if choice.get("prompt_token_ids", asked) != asked:
        raise ServerError("the reply is for another prompt")
    if reason not in ("stop", "length") or not tokens or len(logps) != len(tokens):
        raise ServerError(
            f"a completion is incomplete: finish_reason {reason!r}, {len(tokens)} tokens, {len(logps)} logprobs"
        )
    if any(logp is None or not -1e9 < logp <= 1e-3 for logp in logps):
        raise ServerError("a completion has logprobs that are no log-probabilities")
    length, ended = cut(tokens, sampling, ends, tokenizer)
    if not ended and length < sampling.max_new_tokens:  # vLLM shortens what would be longer than max_model_len
        raise ServerError(f"a completion was cut at {length} of {sampling.max_new_tokens} tokens")
    return Sampled(tokens[:length], ended, [min(float(logp), 0.0) for logp in logps[:length]])


def cut(tokens: Sequence[int], sampling: Sampling, ends: Sequence[int], tokenizer: Any) -> tuple[int, bool]:
    """Return the length of a completion up to what ends it, as in `generate`, and whether anything does."""
    length = min(len(tokens), sampling.max_new_tokens)
    last = next((i + 1 for i, token in enumerate(tokens[:length]) if token in ends), None)
    if sampling.stop:
        # a token has at least one byte; one token more, because decoders drop a space before the first one
        reach = max(len(s.encode()) for s in sampling.stop) + 1
        for n in range(1, (last or length) + 1):
            text = tokenizer.decode(tokens[max(0, n - reach) : n], clean_up_tokenization_spaces=False)
            if any(s in text for s in sampling.stop):
                return n, True
    return (length, False) if last is None else (last, True)
