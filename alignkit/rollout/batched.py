"""Batches by the engine's own loop, or by transformers' `generate`: our own random numbers, each prompt computed once.

P prompts, R rows (a prompt has as many as it has completions), T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.models.attention import without_flex
from alignkit.models.compiled import uncompiled
from alignkit.models.loading import causal_lm
from alignkit.models.passes import halved
from alignkit.models.rope import forget_lengths, switch_of
from alignkit.rollout.decoder import Context, Decoder, attending, refused
from alignkit.rollout.fast_layers import fast_layers
from alignkit.rollout.mixture import MixedLogits, Mixture, copyable
from alignkit.rollout.noise import GumbelNoise
from alignkit.rollout.processors import Stops, cut, warpers
from alignkit.rollout.sampler import Sampled
from alignkit.rollout.token_loop import decode
from alignkit.rollout_settings import Sampling


@dataclass(frozen=True)
class Batched:
    """The inputs that all batches of a call of `sample` share.

    ends: tokens that end a sequence. greedy: no noise. own: use the engine's own loop where it computes exactly.
    """

    model: nn.Module
    tokenizer: Any
    sampling: Sampling
    ends: list[int]
    seed: int
    mixture: Mixture | None
    greedy: bool = False
    own: bool = True

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], n: int, numbers: Sequence[int]) -> list[list[Sampled]]:
        """Return n completions of each prompt, [prompt][completion]."""
        found: list[list[Sampled]] = [[] for _ in prompts]
        models = [self.model] if self.mixture is None else [self.model, self.mixture.reference]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(sampling_mode(model))
            batch = self._generated
            if self.own and prompts and not self._refused(prompts):
                batch = self._decoded
                for model, *_ in self._models():
                    stack.enter_context(attending(causal_lm(model)))
                    stack.enter_context(fast_layers(causal_lm(model)))
            for at, completions in self._batches([len(p) for p in prompts], n):
                rows = [(i, k) for i in range(len(at)) for k in completions]
                made = self._rows(batch, [prompts[i] for i in at], rows, [numbers[i] for i in at])
                for (i, _), one in zip(rows, made, strict=True):
                    found[at[i]].append(one)
        return found

    def _batches(self, lengths: Sequence[int], n: int) -> Iterator[tuple[list[int], range]]:
        """Yield prompts and which of their completions to sample together: at most batch_size rows, longest first.

        Prompts whose rotary frequencies change while they are continued are sampled with others of the same length.
        """
        switch, size = switch_of(causal_lm(self.model)), self.sampling.batch_size
        alike: dict[int, list[int]] = {}
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            # the prefix is a pass of its own; the last sampled token is not read
            first, last = lengths[i] - 1, lengths[i] + self.sampling.max_new_tokens - 1
            changes = switch is not None and switch.same_as(first) != switch.same_as(last)
            key = -lengths[i] if changes else switch.same_as(last) if switch else 0
            alike.setdefault(key, []).append(i)
        together = max(1, size // n)
        for order in alike.values():
            for start in range(0, len(order), together):
                for done in range(0, n, size):
                    yield order[start : start + together], range(done, min(n, done + size))

    def _rows(
        self, batch: Callable[..., list[Sampled]], prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, int]],
        numbers: Sequence[int],
    ) -> list[Sampled]:  # fmt: skip
        """Sample rows of (place in `prompts`, completion) together, or fewer at once where memory runs out.

        Completions do not depend on their batch.
        """

        done: list[Sampled] = []

        def attempt(size: int) -> list[Sampled]:
            while len(done) < len(rows):  # a smaller size continues after the rows that are done
                some = rows[len(done) : len(done) + size]
                first, last = some[0][0], some[-1][0] + 1  # rows are in the order of their prompts
                within = [(i - first, k) for i, k in some]
                done.extend(batch(prompts[first:last], within, numbers[first:last]))
            return done

        return halved(attempt, len(rows), 1, "%d completions at a time in this batch")[0]

    def _refused(self, prompts: Sequence[Sequence[int]]) -> str | None:
        """Return why the engine's own loop cannot be used, or None."""
        most = self.sampling.max_new_tokens
        found = (refused(model, prompts, most) for model, *_ in self._models())
        return next((problem for problem in found if problem), None)

    def _decoded(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, int]], numbers: Sequence[int]
    ) -> list[Sampled]:
        """Sample rows by the engine's own loop."""
        lm, at_R = causal_lm(self.model), [i for i, _ in rows]
        device, width, noise = next(lm.parameters()).device, 0, None
        if not self.greedy:
            noise = GumbelNoise(self.seed, [numbers[i] for i in at_R], [k for _, k in rows], width, device)
        stops = Stops(self.tokenizer, self.sampling.stop, width) if self.sampling.stop else None
        to_logits = warpers(self.sampling, self.ends, width, device, self.greedy)
        most = self.sampling.max_new_tokens
        parts = [(Decoder(causal_lm(model), prompts, most, context), w) for model, w, context in self._models()]
        made = decode(parts, at_R, most, self.ends, to_logits, noise, stops)
        return [cut(tokens, self.ends, stops.lengths.get(row) if stops else None) for row, tokens in enumerate(made)]

    def _models(self) -> list[tuple[nn.Module, float, Context]]:
        """Return the models whose logits are added, each with its weight and the context of its passes."""
        if self.mixture is None:
            return [(self.model, 1.0, nullcontext)]
        weight = self.mixture.weight
        both = [(self.model, 1 - weight, nullcontext), (self.mixture.reference, weight, self.mixture.context)]
        return [one for one in both if one[1]]

    def _generated(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, int]], numbers: Sequence[int]
    ) -> list[Sampled]:
        """Sample rows by transformers' `generate`."""
        from transformers import GenerationConfig

        lm = causal_lm(self.model)
        forget_lengths(lm)
        device = next(lm.parameters()).device
        ids_PT, mask_PT = _padded(prompts, self.ends[0], device)
        width, at_R = ids_PT.shape[1], torch.tensor([i for i, _ in rows], device=device)
        ours = [numbers[i] for i, _ in rows], [k for _, k in rows]
        noise = [] if self.greedy else [GumbelNoise(self.seed, *ours, width, device)]
        stops = Stops(self.tokenizer, self.sampling.stop, width)
        shared = _prefix(lm, ids_PT, mask_PT, at_R) if len(rows) > len(prompts) else None
        done = lm.generate(
            ids_PT[at_R],
            attention_mask=mask_PT[at_R],
            generation_config=GenerationConfig(
                max_new_tokens=self.sampling.max_new_tokens, eos_token_id=self.ends, pad_token_id=self.ends[0]
            ),
            logits_processor=[
                *self._mixed(ids_PT, mask_PT, at_R),
                *warpers(self.sampling, self.ends, width, device, self.greedy),
                *noise,
            ],
            stopping_criteria=[stops] if self.sampling.stop else [],
            synced_gpus=False,  # else a model with sharded blocks waits at each token, though they are gathered
            **({} if shared is None else {"past_key_values": shared}),
        )
        return [cut(tokens, self.ends, stops.lengths.get(row)) for row, tokens in enumerate(done[:, width:].tolist())]

    def _mixed(self, ids_PT: Tensor, mask_PT: Tensor, at_R: Tensor) -> list[MixedLogits]:
        if self.mixture is None or self.mixture.weight == 0:
            return []
        lm = causal_lm(self.mixture.reference)
        forget_lengths(lm)
        with self.mixture.context():
            cache = _prefix(lm, ids_PT, mask_PT, at_R)
        return [MixedLogits(lm, self.mixture, cache, mask_PT[at_R])]


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask [P, T], padded on the left; the mask comes from lengths, as the padding may be any token."""
    width = max(len(p) for p in prompts)
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _prefix(lm: Any, ids_PT: Tensor, mask_PT: Tensor, at_R: Tensor) -> Any | None:
    """Return keys and values of all but the prompts' last tokens, computed once per prompt and copied for its rows.

    None without such tokens, where the model's cache cannot be copied (recurrent states), or where the last token
    changes the rotary frequencies: each row then computes its whole prompt.
    """
    width, switch = ids_PT.shape[1], switch_of(lm)
    if width == 1 or (switch and switch.same_as(width - 1) != switch.same_as(width)):
        return None
    read = lm.generate(
        ids_PT[:, :-1],
        attention_mask=mask_PT[:, :-1],
        max_new_tokens=1,
        return_dict_in_generate=True,
        synced_gpus=False,
    )
    cache = read.get("past_key_values")
    if not copyable(cache):
        return None
    cache.batch_select_indices(at_R)
    forget_lengths(lm)  # of P rows, and R rows follow
    return cache


@contextmanager
def sampling_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, without the `generate` settings of the model's folder; restore both afterwards."""
    from transformers import GenerationConfig

    lm = causal_lm(model)
    training = [module for module in model.modules() if module.training]
    settings, config = lm.generation_config, lm.config.get_text_config()
    asked = getattr(config, "output_router_logits", False)
    try:
        model.eval()
        if asked:  # the model would compute the router's loss of every sampled token, with a mask of the whole prompt
            config.output_router_logits = False
        lm.generation_config = GenerationConfig()  # a repetition penalty, for example, is not part of the policy
        with without_flex(lm), uncompiled(lm):
            yield
    finally:
        lm.generation_config = settings
        if asked:
            config.output_router_logits = asked
        for module in training:
            module.training = True
