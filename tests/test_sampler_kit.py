"""The suite of samplers: ours pass it, and each planted fault is found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_double import vllm_double

from alignkit.rollout.sampler import Request, Sampled, Sampler, Setup
from alignkit.rollout.sampling import Local
from alignkit.rollout.vllm import Vllm
from alignkit.rollout_settings import Rollout
from alignkit.testing import SamplerConformance, tiny_model, tiny_tokenizer
from alignkit.testing.world import EOS

pytest_plugins = ("pytester",)


class TestGenerate(SamplerConformance):
    def build(self, setup: Setup) -> Sampler:
        return Local(setup, "generate")


class TestContinuous(SamplerConformance):
    lacks = ("stop", "min_new_tokens")

    def build(self, setup: Setup) -> Sampler:
        return Local(setup, "continuous")


class TestVllm(SamplerConformance):
    processed = False

    @pytest.fixture(autouse=True)
    def _double(self) -> Iterator[None]:
        with ExitStack() as stack:
            self.double = stack.enter_context(vllm_double(tiny_model(), tiny_tokenizer()))
            self.double.processed = self.processed
            yield

    def build(self, setup: Setup) -> Sampler:
        return Vllm(replace(setup, settings=Rollout(backend="vllm", urls=[self.double.url], retries=0)))


class TestVllmProcessed(TestVllm):
    processed = True


# ------------------------------------------------------------------------------------------------ planted faults

Made = list[list[Sampled]]


class Scored(Sampler):
    """`generate` with its own log-probabilities, and a fault. spoil: changes what comes back."""

    def __init__(self, setup: Setup, spoil: Callable[[Made], Made] = lambda made: made) -> None:
        self.setup, self.spoil, self.model = setup, spoil, setup.model

    def sample(self, request: Request) -> Made:
        made = Local(replace(self.setup, model=self.model), "generate").sample(self.asked(request))
        return self.spoil([[self.scored(p, s) for s in some] for p, some in zip(request.prompts, made, strict=True)])

    def asked(self, request: Request) -> Request:
        return request

    def scored(self, prompt: Any, one: Sampled) -> Sampled:
        exact = copy.deepcopy(self.model).double()
        with torch.no_grad():
            logps = exact(input_ids=torch.tensor([[*prompt, *one.tokens]])).logits[0].log_softmax(-1)
        return replace(one, logps=[float(logps[len(prompt) + i - 1, t]) for i, t in enumerate(one.tokens)])

    processed = False

    def update(self, version: int, model: Any) -> None:
        self.version = version


class OldWeights(Scored):
    """It samples from what it was first given."""

    def update(self, version: int, model: Any) -> None:
        self.model = copy.deepcopy(model) if version == 0 else self.model
        self.version = version


class StalePrompts(Scored):
    """Prompts that it read before are answered with the weights of then."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.read: dict[tuple[int, ...], Any] = {}

    def sample(self, request: Request) -> Made:
        found = []
        for i, prompt in enumerate(request.prompts):
            self.model = self.read.setdefault(tuple(prompt), copy.deepcopy(self.setup.model))
            numbers = list(request.numbers)[i : i + 1]
            found += super().sample(replace(request, prompts=[prompt], numbers=numbers))
        return found


class NoVersion(Scored):
    def update(self, version: int, model: Any) -> None:
        self.version = 0


class Ignores(Scored):
    """It ignores a part of the request."""

    def __init__(self, setup: Setup, **instead: Any) -> None:
        super().__init__(setup)
        self.instead = instead

    def asked(self, request: Request) -> Request:
        own = {k: v for k, v in self.instead.items() if k in ("seed", "greedy")}
        if "numbers" in self.instead:
            own["numbers"] = [0] * len(request.prompts)
        sampling = {k: v for k, v in self.instead.items() if k not in ("seed", "greedy", "numbers")}
        return replace(request, sampling=request.sampling.model_copy(update=sampling), **own)


def each(change: Callable[[Sampled], Sampled]) -> Callable[[Made], Made]:
    return lambda made: [[change(one) for one in some] for some in made]


def processed(setup: Setup) -> Sampler:
    made = Scored(setup)
    made.processed = True
    return made


FAULTS: dict[str, tuple[Callable[[Setup], Sampler], str, str]] = {
    "wrong logps": (
        lambda s: Scored(s, each(lambda o: replace(o, logps=[x - 0.01 for x in o.logps or []]))),
        "test_log_probabilities", "differ by 0.01 nats",
    ),
    "a logp is missing": (
        lambda s: Scored(s, each(lambda o: replace(o, logps=(o.logps or [])[1:]))),
        "test_log_probabilities", "not one log-probability for each token",
    ),
    "bare and said to be processed": (processed, "test_log_probabilities", "processed: True"),
    "old version": (OldWeights, "test_weights_of_a_version", "of other weights"),
    "stale prompts": (StalePrompts, "test_weights_of_a_version", "of other weights"),
    "no version": (NoVersion, "test_weights_of_a_version", "did not put that version in force"),
    "lost completion": (
        lambda s: Scored(s, lambda made: [*made[:-1], made[-1][:-1]]),
        "test_every_prompt_has_its_completions_in_order", "completions are lost",
    ),
    "lost prompt": (
        lambda s: Scored(s, lambda made: made[:-1]),
        "test_every_prompt_has_its_completions_in_order", "completions are lost",
    ),
    "wrong order": (
        lambda s: Scored(s, lambda made: made[::-1]),
        "test_every_prompt_has_its_completions_in_order", "of another prompt",
    ),
    "no greedy": (
        lambda s: Ignores(s, greedy=False), "test_every_prompt_has_its_completions_in_order", "another distribution",
    ),
    "ended is wrong": (
        lambda s: Scored(s, each(lambda o: replace(o, ended=False))), "test_limits_and_ends", "`ended` is not",
    ),
    "the end is lost": (
        lambda s: Scored(s, each(lambda o: replace(o, tokens=o.tokens[: -1 if o.ended else None] or [5]))),
        "test_limits_and_ends", "`ended` is not",
    ),
    "no limit": (lambda s: Ignores(s, max_new_tokens=40), "test_limits_and_ends", "the limit is 24"),
    "no least length": (lambda s: Ignores(s, min_new_tokens=0), "test_least_length", "before min_new_tokens"),
    "no stop": (lambda s: Ignores(s, stop=[]), "test_stop_strings", "goes on after a stop string"),
    "no temperature": (
        lambda s: Ignores(s, temperature=1.0), "test_settings_change_the_distribution", "temperature.*another",
    ),
    "no top_k": (lambda s: Ignores(s, top_k=0), "test_settings_change_the_distribution", "top_k.*another distribution"),
    "no top_p": (lambda s: Ignores(s, top_p=1.0), "test_settings_change_the_distribution", "top_p.*another"),
    "no seed": (lambda s: Ignores(s, seed=1), "test_randomness", "another seed gives the same"),
    "no numbers": (lambda s: Ignores(s, numbers=()), "test_randomness", "under another number"),
    "all the same": (
        lambda s: Scored(s, lambda made: [some[:1] * len(some) for some in made]), "test_randomness", "all the same",
    ),
}  # fmt: skip


class Checks(SamplerConformance):
    """Not collected: its name does not begin with Test."""


def run(build: Callable[[Setup], Sampler], check: str, folder: Path) -> None:
    setup = Setup(tiny_model(), tiny_tokenizer(), [EOS], folder=folder)
    sampler = build(setup)
    sampler.update(0, setup.model)
    getattr(Checks(), check)(setup, sampler)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    build, check, says = FAULTS[name]
    run(Scored, check, tmp_path)  # without the fault it passes
    with pytest.raises(AssertionError, match=says):
        run(build, check, tmp_path)


def test_every_check_has_a_fault_that_it_finds() -> None:
    checks = {name for name in dir(SamplerConformance) if name.startswith("test_")}
    assert checks - {check for _, check, _ in FAULTS.values()} == {"test_closing_twice"}


def test_a_suite_without_its_sampler_says_what_to_define(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="define build"):
        Checks().build(Setup(tiny_model(), tiny_tokenizer(), [EOS], folder=tmp_path))
