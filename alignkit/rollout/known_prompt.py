"""A known prompt: its log-probabilities by the trainer and by a server tell which weights the server has in force.

The prompt is longer than two blocks of the prefix cache (128 tokens on a CPU, 16 on a GPU), and is asked for after each
sync: where the cache still holds what the weights before made of it, the answer is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import httpx2
import torch
from torch import Tensor

from alignkit.errors import RolloutError
from alignkit.models.loading import causal_lm
from alignkit.rollout.batched import sampling_mode
from alignkit.rollout.sampler import Setup
from alignkit.rollout.servers import Server, ServerError

LENGTH = 300  # tokens
_ASKED = 16  # tokens whose log-probabilities are compared
_NOISE = 3.0  # times the usual difference that weights must move to be told apart
_HOT = 2.0  # a temperature at which processed log-probabilities differ from the bare ones


class KnownPrompt:
    """Compares servers with the trainer's model. longest: tokens that a prompt of the servers may have.

    Reads the model on the CPU or GPU that it is on: one pass over LENGTH tokens after each update.
    """

    def __init__(self, setup: Setup, longest: int, seconds: float) -> None:
        self.setup, self.seconds = setup, seconds
        config = causal_lm(setup.model).config.get_text_config()
        words = min(config.vocab_size, len(setup.tokenizer))
        known = getattr(config, "max_position_embeddings", None) or LENGTH
        length = max(1, min(LENGTH, longest - 1, known - 1))
        # a walk over the vocabulary: the same in every run, and like no text that a server has read before
        self.tokens = [(7919 * i + 104_729 * (i // words) + 13) % words for i in range(length)]
        self._asked: list[int] | None = None
        self._now: Tensor | None = None
        self._before: Tensor | None = None
        self._usual = 0.02  # nats, of a server with the right weights

    def read(self) -> None:
        """Compute the trainer's log-probabilities with its weights as they are now."""
        lm = causal_lm(self.setup.model)
        device = next(lm.parameters()).device
        # only the last position's logits, where the architecture can be asked for them
        last = {"logits_to_keep": 1} if "logits_to_keep" in signature(lm.forward).parameters else {}
        with torch.no_grad(), self.setup.gathered(blocks=False), self.setup.autocast(), sampling_mode(self.setup.model):
            logits = lm(input_ids=torch.tensor([self.tokens], device=device), use_cache=False, **last).logits[0, -1]
        logps_V = logits.double().log_softmax(-1).cpu()
        if self._asked is None:
            likely = logps_V.topk(min(_ASKED // 2, len(logps_V))).indices.tolist()
            spread = range(0, len(logps_V), max(1, len(logps_V) // (_ASKED // 2)))
            self._asked = list(dict.fromkeys([*likely, *spread]))[:_ASKED]
        self._before, self._now = self._now, logps_V

    async def check(self, http: httpx2.AsyncClient, server: Server, model: str, tolerance: float) -> None:
        """Raise RolloutError where the server's log-probabilities are not those of the weights last read.

        model: the name there. tolerance: in nats, of the root of the mean squared difference. Raises ServerError where
        the server does not answer.
        """
        assert self._now is not None
        assert self._asked is not None
        got = await self._logps(http, server, model, self._asked)
        off = _distance(got, self._now[self._asked])
        old = moved = math.inf
        if self._before is not None:
            old, moved = (_distance(x, self._before[self._asked]) for x in (got, self._now[self._asked]))
        outdated = _NOISE * self._usual < moved < math.inf and old < off
        if off <= tolerance and not outdated:
            self._usual = max(self._usual, off)
            return
        was = f", and {old:.3g} nats from those before the last update" if outdated else ""
        raise RolloutError(
            f"{server} has other weights in force than it was given: its log-probabilities of a known prompt are "
            f"{off:.3g} nats from the trainer's (rollout.tolerance {tolerance:g}){was}. Either it answers from a stale "
            "prefix cache, or it did not load the weights, or its model is another one; restart it, with the model of "
            "this run, and raise rollout.tolerance only where its data type is coarse"
        )

    async def processed(self, http: httpx2.AsyncClient, server: Server, model: str) -> bool:
        """Return whether the server's log-probabilities are of the distribution that it samples from.

        They are compared with both that the trainer computes for a draw from two tokens at a high temperature.
        """
        assert self._now is not None
        body = self._body(model) | {"temperature": _HOT, "top_k": 2, "return_token_ids": True}
        reply = await server.post(http, "/v1/completions", body, self.seconds)
        try:
            choice = reply["choices"][0]
            token, got = int(choice["token_ids"][0]), float(choice["logprobs"]["token_logprobs"][0])
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"the reply is not one of vLLM: {type(error).__name__}: {error}") from None
        two = self._now.topk(2).values / _HOT
        # either of the two tokens, whichever it was: a server of coarse data type may order them in another way
        drawn = min(abs(got - float(x)) for x in two.log_softmax(-1))
        return drawn < abs(got - float(self._now[token]))

    async def _logps(self, http: httpx2.AsyncClient, server: Server, model: str, asked: Sequence[int]) -> Tensor:
        body = self._body(model) | {"logprob_token_ids": list(asked), "return_tokens_as_token_ids": True}
        reply = await server.post(http, "/v1/completions", body, self.seconds)
        try:
            found = reply["choices"][0]["logprobs"]["top_logprobs"][0]
            return torch.tensor([float(found[f"token_id:{token}"]) for token in asked], dtype=torch.float64)
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"the reply lacks log-probabilities of tokens: {type(error).__name__}: {error}") from None

    def _body(self, model: str) -> dict[str, Any]:
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        plain |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        return {"model": model, "prompt": self.tokens, "max_tokens": 1, "seed": 0, "logprobs": 0, **plain}


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the root of the mean squared difference, clamped where tokens are nearly impossible."""
    return float((a.clamp(min=-30) - b.clamp(min=-30)).square().mean().sqrt())
