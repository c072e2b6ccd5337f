"""The conformance suite of samplers: what a run relies on, checked on a tiny model.

from alignkit.testing import *
from alignkit_mine import Mine

class TestMine(SamplerConformance):
    def build(self, setup):
        return Mine(setup)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from alignkit.rollout.sampler import Request, Sampled, Sampler, Setup
from alignkit.rollout_settings import Sampling
from alignkit.testing.suite import one_thread
from alignkit.testing.world import EOS, tiny_model, tiny_tokenizer

TEXTS = ("hello? what is there", "the fox. ", "a", "b?")
SHORT = Sampling(max_new_tokens=6)


class SamplerConformance:
    """Checks a sampler; `build` returns it.

    tolerance: in nats, between a sampler's log-probabilities and the model's; that of a token's data type. lacks:
    settings of `sampling` that the sampler refuses. repeats: the same request gives the same tokens again.
    """

    tolerance: ClassVar[float] = 1e-3
    lacks: ClassVar[Collection[str]] = ()
    repeats: ClassVar[bool] = True

    def build(self, setup: Setup) -> Sampler:
        """Return the sampler for this model; it is closed after each check."""
        raise NotImplementedError("define build(self, setup) in the test class")

    def model(self) -> Any:
        """Return the model that samples; override it where the sampler needs another one than `tiny_model`."""
        return tiny_model()

    def tokenizer(self) -> Any:
        """Return the tokenizer of `model`."""
        return tiny_tokenizer()

    def ends(self) -> list[int]:
        """Return the tokens that end a completion."""
        return [EOS]

    @pytest.fixture
    def setup(self, tmp_path: Path) -> Iterator[Setup]:
        """The model, its tokenizer and a folder for one check."""
        with one_thread():
            yield Setup(self.model(), self.tokenizer(), self.ends(), folder=tmp_path)

    @pytest.fixture
    def sampler(self, setup: Setup) -> Iterator[Sampler]:
        """The sampler, with the model's weights in force as version 0."""
        made = self.build(setup)
        try:
            made.update(0, setup.model)
            yield made
        finally:
            made.close()

    def test_every_prompt_has_its_completions_in_order(self, setup: Setup, sampler: Sampler) -> None:
        """n completions of each prompt, of its own: greedy ones are those of the model's forward pass."""
        asked = self._request(n=3)
        made = sampler.sample(asked)
        assert [len(some) for some in made] == [3] * len(TEXTS), "completions are lost, or too many"
        self._check_greedy(setup, sampler)
        assert sampler.sample(replace(asked, prompts=[], numbers=())) == [], "a request without prompts has no samples"

    def test_log_probabilities(self, setup: Setup, sampler: Sampler) -> None:
        """They are of the distribution that `processed` says, one for each token."""
        for changes in ({}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}):
            if not set(changes) & set(self.lacks):
                asked = self._request(n=2, **changes)
                self._check_logps(setup, sampler, asked, sampler.sample(asked))

    def test_weights_of_a_version(self, setup: Setup, sampler: Sampler) -> None:
        """After an update samples come from the new weights, also of prompts that were read before."""
        assert sampler.version == 0, "update(0, model) did not put version 0 in force"
        sampler.sample(self._request(n=1))
        for version in (1, 5):
            self._move(setup.model, version)
            sampler.update(version, setup.model)
            assert sampler.version == version, f"update({version}, model) did not put that version in force"
            self._check_greedy(setup, sampler)
            asked = self._request(n=2)
            self._check_logps(setup, sampler, asked, sampler.sample(asked))

    def test_limits_and_ends(self, setup: Setup, sampler: Sampler) -> None:
        """A completion ends with an end token or is cut at the limit, and says which."""
        made = sampler.sample(self._request(n=12, max_new_tokens=24))
        for one in (s for some in made for s in some):
            assert 1 <= len(one.tokens) <= 24, f"{len(one.tokens)} tokens came back, the limit is 24"
            inside = [token for token in one.tokens[:-1] if token in setup.ends]
            assert not inside, "a completion goes on after an end token"
            assert one.ended == (one.tokens[-1] in setup.ends), "`ended` is not whether the last token is an end token"
            assert one.ended or len(one.tokens) == 24, "a completion was cut before the limit"

    def test_least_length(self, setup: Setup, sampler: Sampler) -> None:
        """No end token among the first min_new_tokens tokens."""
        if "min_new_tokens" in self.lacks:
            pytest.skip("the sampler lacks min_new_tokens")
        made = sampler.sample(self._request(n=12, max_new_tokens=10, min_new_tokens=6))
        assert all(len(one.tokens) >= 6 for some in made for one in some), "a completion ended before min_new_tokens"

    def test_stop_strings(self, setup: Setup, sampler: Sampler) -> None:
        """A completion ends with the token that completes a stop string."""
        if "stop" in self.lacks:
            pytest.skip("the sampler lacks stop")
        stop = [text for text in map(setup.tokenizer.decode, ([5], [6], [7], [8], [9], [10])) if text]
        made = sampler.sample(self._request(n=8, max_new_tokens=16, stop=stop))
        for one in (s for some in made for s in some):
            hits = [
                any(s in setup.tokenizer.decode(one.tokens[:k]) for s in stop) for k in range(1, len(one.tokens) + 1)
            ]
            assert not any(hits[:-1]), "a completion goes on after a stop string"
            assert one.ended == (hits[-1] or one.tokens[-1] in setup.ends), "`ended` is wrong at a stop string"

    def test_settings_change_the_distribution(self, setup: Setup, sampler: Sampler) -> None:
        """A temperature near 0, top_k 1 and a tiny top_p leave the most likely token only."""
        for changes in ({"temperature": 0.01}, {"top_k": 1}, {"top_p": 1e-6}):
            if not set(changes) & set(self.lacks):
                slack = 20 * changes.get("temperature", 0.0)  # what is drawn at all, once in e^20 tokens
                self._check_likeliest(setup, sampler.sample(self._request(n=2, **changes)), str(changes), slack)

    def test_randomness(self, setup: Setup, sampler: Sampler) -> None:
        """It comes from the seed, the prompt's number and the completion's, and from nothing else."""
        asked = self._request(n=4, max_new_tokens=12)
        before = torch.get_rng_state()
        first = _tokens(sampler.sample(asked))
        assert torch.equal(before, torch.get_rng_state()), "sampling changes torch's generator"
        assert all(len({*map(tuple, some)}) > 1 for some in first[:2]), "the completions of a prompt are all the same"
        assert _tokens(sampler.sample(replace(asked, seed=8))) != first, "another seed gives the same samples"
        twice = replace(asked, prompts=[asked.prompts[0]] * 2, numbers=(0, 1))
        one, two = _tokens(sampler.sample(twice))
        assert one != two, "the same prompt under another number has the same samples"
        if self.repeats:
            assert _tokens(sampler.sample(asked)) == first, "the same request does not give the same samples"

    def test_closing_twice(self, setup: Setup, sampler: Sampler) -> None:
        """A run may close a sampler again after an error."""
        sampler.close()
        sampler.close()

    def _request(self, n: int, **changes: Any) -> Request:
        tokenizer = self.tokenizer()
        prompts = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
        return Request(prompts, SHORT.model_copy(update=changes), n=n, seed=7, numbers=range(len(prompts)))

    def _move(self, model: Any, seed: int) -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.05)

    def _check_greedy(self, setup: Setup, sampler: Sampler) -> None:
        self._check_likeliest(setup, sampler.sample(replace(self._request(n=1), greedy=True)), "greedy")

    def _check_likeliest(self, setup: Setup, made: Sequence[Sequence[Sampled]], what: str, slack: float = 0.0) -> None:
        for prompt, some in zip(self._request(n=1).prompts, made, strict=True):
            for one in some:
                logps = _bare(setup.model, prompt, one.tokens)
                behind = logps.amax(-1) - logps[range(len(one.tokens)), one.tokens]
                assert float(behind.max()) <= 2 * self.tolerance + slack, (
                    f"{what}: a token is {float(behind.max()):.3g} nats less likely than the model's best one: it is "
                    "of other weights, of another prompt, or of another distribution"
                )

    def _check_logps(self, setup: Setup, sampler: Sampler, asked: Request, made: Sequence[Sequence[Sampled]]) -> None:
        for prompt, some in zip(asked.prompts, made, strict=True):
            for one in some:
                if one.logps is None:
                    continue  # the sampler computes what the trainer computes
                assert len(one.logps) == len(one.tokens), "a completion has not one log-probability for each token"
                logps = _bare(setup.model, prompt, one.tokens)
                if sampler.processed:
                    logps = _processed(logps, asked.sampling)
                off = (logps[range(len(one.tokens)), one.tokens] - torch.tensor(one.logps)).abs().max()
                assert float(off) <= self.tolerance, (
                    f"log-probabilities differ by {float(off):.3g} nats from the model's with {asked.sampling!r} "
                    f"(processed: {sampler.processed})"
                )


def _tokens(made: Sequence[Sequence[Sampled]]) -> list[list[list[int]]]:
    return [[one.tokens for one in some] for some in made]


def _bare(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Return the log-probabilities after each prefix [tokens, V], by a plain forward pass in float64."""
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = exact(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)  # type: ignore[no-any-return]


def _processed(logps: Tensor, sampling: Sampling) -> Tensor:
    """Return the log-probabilities of the distribution that is sampled from."""
    logps = (logps / sampling.temperature).log_softmax(-1)
    if sampling.top_k:
        logps = logps.masked_fill(logps < logps.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, at = logps.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        logps = logps.masked_fill(beyond.scatter(-1, at, beyond), -torch.inf)
    return logps.log_softmax(-1)
