"""Samplers that are not exact: the weights that correct them, the metrics that show them, and the bias that goes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from samplers import Double, drawn_from, uses
from torch import Tensor

import alignkit
from alignkit import Batch, Completion, Example, Method, Term
from alignkit.engine.roles import Roles
from alignkit.engine.rollouts import Online
from alignkit.errors import ConfigError, PluginError
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer
from alignkit.models.truncation import Truncation
from alignkit.rollout import Sampled
from alignkit.rollout.completions import with_completions
from alignkit.rollout.correction import correction_weights, mismatch_metrics
from alignkit.rollout_settings import Correction, Rollout, Sampling
from alignkit.runs.folder import read_metrics
from alignkit.testing import Conformance
from alignkit.testing.world import tiny_model
from alignkit.types import Layout
from alignkit_kernels import sequence_sum
from helpers import make_rows

# two completions, of 3 and 2 tokens: log trainer - log sampler
RATIOS = [0.3, -0.9, 1.1, -2.0, 0.1]
BORDERS = torch.tensor([0, 3, 5])


def by_hand(kind: str, threshold: float, floor: float) -> tuple[list[float], list[bool]]:
    """The weights, token by token in plain Python, and which are not the ratio itself."""
    whole = [math.exp(math.fsum(RATIOS[:3]))] * 3 + [math.exp(math.fsum(RATIOS[3:]))] * 2
    weights = whole if kind.startswith("sequence") else [math.exp(x) for x in RATIOS]
    if kind.endswith("truncate"):
        return [min(w, threshold) for w in weights], [w > threshold for w in weights]
    kept = [floor <= w <= threshold for w in weights]
    return [w if k else 0.0 for w, k in zip(weights, kept, strict=True)], [not k for k in kept]


@pytest.mark.parametrize("kind", ["token_truncate", "sequence_truncate", "token_mask", "sequence_mask"])
@pytest.mark.parametrize(("threshold", "floor"), [(1.5, 0.0), (2.0, 0.5), (9.0, 0.3)])
def test_each_correction_equals_its_definition(kind: str, threshold: float, floor: float) -> None:
    floor = floor if kind.endswith("mask") else 0.0
    rollout = Rollout(backend="vllm", correction=kind, correction_threshold=threshold, correction_floor=floor)
    weights, beyond = correction_weights(torch.tensor(RATIOS, requires_grad=True), BORDERS, rollout)
    want, changed = by_hand(kind, threshold, floor)
    assert weights.tolist() == pytest.approx(want, rel=1e-6)
    assert beyond.tolist() == changed
    assert not weights.requires_grad


def test_without_a_correction_weights_are_one_and_a_huge_ratio_is_no_infinity() -> None:
    weights, _ = correction_weights(torch.tensor(RATIOS), BORDERS, Rollout(backend="vllm", correction="none"))
    assert weights.tolist() == [1.0] * 5
    huge = torch.tensor([900.0, 0.0, 0.0, -900.0, 0.0])
    assert correction_weights(huge, BORDERS, Rollout())[0].tolist() == [2.0, 1.0, 1.0, 0.0, 1.0]
    masked = correction_weights(huge, BORDERS, Rollout(backend="vllm", correction="token_mask"))[0]
    assert masked.tolist() == [0.0, 1.0, 1.0, 0.0, 1.0]


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(ValidationError, match="correction_floor has an effect with correction: token_mask or"):
        Rollout(backend="vllm", correction="token_truncate", correction_floor=0.5)
    with pytest.raises(ValidationError, match="correction_threshold has no effect with correction: none"):
        Rollout(backend="vllm", correction="none", correction_threshold=3.0)
    settings = {"model": "no/such", "data": [], "reward": "numeric"}
    with pytest.raises(ConfigError, match=r"backend: generate samples with the trained model itself; remove rollout"):
        alignkit.run("grpo", **settings, rollout={"correction": "token_mask"})
    with pytest.raises(ConfigError, match=r"'dpo' does not sample completions; remove `rollout"):
        alignkit.run("dpo", model="no/such", data=[], rollout={"backend": "vllm", "correction": "token_mask"})


# ------------------------------------------------------------------------------------------------------- metrics


def test_the_metrics_are_those_of_all_tokens_on_all_ranks() -> None:
    trainer, sampler = [-1.0, -2.0, -0.5], [-1.2, -1.9, -1.5]
    other = {"trainer": [-3.0], "sampler": [-0.7]}  # the other rank's token
    beyond = [False, False, True, False]
    everyone = list(zip(trainer + other["trainer"], sampler + other["sampler"], strict=True))
    log_w = [a - b for a, b in everyone]

    def total(mine: Tensor) -> Tensor:
        a, b = other["trainer"][0], other["sampler"][0]
        w = math.exp(a - b)
        return mine + torch.tensor([1.0, w, w - 1 - (a - b), a, b, 0.0], dtype=torch.float64)[: len(mine)]

    def largest(mine: Tensor) -> Tensor:
        return torch.maximum(mine, torch.tensor([math.exp(-3.0 + 0.7)], dtype=torch.float64))

    found = mismatch_metrics(total, largest, torch.tensor(trainer), torch.tensor(sampler), torch.tensor(beyond[:3]))
    want = {
        "rollout/kl": math.fsum(math.exp(x) - 1 - x for x in log_w) / 4,
        "rollout/ratio_mean": math.fsum(map(math.exp, log_w)) / 4,
        "rollout/ratio_max": math.exp(max(log_w)),
        "rollout/perplexity": math.exp(-math.fsum(a for a, _ in everyone) / 4),
        "rollout/sampler_perplexity": math.exp(-math.fsum(b for _, b in everyone) / 4),
        "rollout/corrected": 1 / 4,
    }
    assert found == pytest.approx(want, rel=1e-6)


def test_the_kl_is_unbiased() -> None:
    """Over all tokens that the sampler may draw, the mean of the estimate is KL(sampler || trainer)."""
    g = torch.Generator().manual_seed(0)
    trainer, sampler = torch.randn(2, 9, generator=g, dtype=torch.float64).log_softmax(-1).unbind()
    want = float((sampler.exp() * (sampler - trainer)).sum())
    estimates = [mismatch_metrics(lambda t: t, lambda t: t, trainer[[i]], sampler[[i]])["rollout/kl"] for i in range(9)]
    got = math.fsum(float(sampler[i].exp()) * estimates[i] for i in range(9))
    assert got == pytest.approx(want, rel=1e-9)


# ------------------------------------------------------------------------------- the gradient, by enumeration

VOCABULARY = 6  # completions of two tokens: 36 of them
PROMPT = torch.tensor([1, 3], dtype=torch.int32)


class Reinforce(Method):
    """REINFORCE over all completions at once, each weighted by how often the sampler draws it."""

    name, data, uses = "reinforce", "prompts", frozenset({"policy"})

    def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
        logps_S = sequence_sum(models.policy(batch).logps, batch.cu_seqlens)
        return {"policy": Term(-batch["times"] * batch["rewards"] * logps_S, over="completions")}


def small_model() -> Any:
    import transformers as tf

    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.LlamaConfig(vocab_size=VOCABULARY, **sizes, initializer_range=0.5)
    return tf.AutoModelForCausalLM.from_config(config).double()


def enumerated(per_token: bool) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """Policy, all pairs of tokens, the sampler's log-probabilities of each, rewards, and the true gradient."""
    policy, sampler = small_model(), small_model()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sampler.parameters():  # weights of another precision, or of an older version
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    pairs = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    ids = torch.cat([PROMPT.long().expand(len(pairs), -1), pairs], 1)

    def logps(model: Any) -> Tensor:
        return model(input_ids=ids).logits[:, 1:3].log_softmax(-1).gather(2, pairs[..., None]).squeeze(2)

    rewards = torch.randn(VOCABULARY, generator=g, dtype=torch.float64)[pairs[:, 0]] if per_token else None
    rewards = torch.randn(len(pairs), generator=g, dtype=torch.float64) if rewards is None else rewards
    value = (logps(policy).sum(1).exp() * rewards).sum()  # the expected reward itself, in float64
    (-value).backward()
    want = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    with torch.no_grad():
        return policy, pairs, logps(sampler), rewards, want


def expected_gradient(policy: Any, pairs: Tensor, sampler: Tensor, rewards: Tensor, rollout: Rollout) -> Tensor:
    """The gradient that the engine's policy gives in the mean over the sampler's completions."""
    example = Example(PROMPT, tuple(Completion(pair.to(torch.int32)) for pair in pairs))
    roles = Roles(Reinforce(Reinforce.Config()), scorer := Scorer(policy), scorer, None, 10_000)
    batch = batch_of([example], Layout("forest", 256), torch.device("cpu"))
    times = sampler.sum(1).exp()
    with torch.no_grad():  # as double: the engine's passes without a gradient are in float32
        drawn = scorer(batch.rows, batch.targets).logps
    weights, _ = correction_weights(drawn - sampler.flatten(), batch.cu_seqlens, rollout)
    batch = batch.attach(
        per_completion={"times": times, "rewards": rewards}, per_token={"rollout_weights": weights.double()}
    )
    terms = Reinforce(Reinforce.Config()).loss(batch, roles)
    terms["policy"].value.sum().backward()
    found = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    return found


NO_LIMIT = {"correction_threshold": 1e9}


def test_a_correction_of_completions_removes_the_bias_of_a_wrong_sampler() -> None:
    policy, pairs, sampler, rewards, want = enumerated(per_token=False)

    def error(rollout: Rollout) -> float:
        found = expected_gradient(policy, pairs, sampler, rewards, rollout)
        return float((found - want).norm() / want.norm())

    assert error(Rollout(backend="vllm", correction="none")) > 0.3  # measured 1.9: the planted bias is large
    assert error(Rollout(backend="vllm", correction="sequence_truncate", **NO_LIMIT)) < 1e-6
    assert error(Rollout(backend="vllm", correction="sequence_mask", **NO_LIMIT)) < 1e-6
    # a threshold gives some of it back, and a token's own weight leaves out how likely the tokens before it were
    uncorrected = error(Rollout(backend="vllm", correction="none"))
    assert 1e-3 < error(Rollout(backend="vllm", correction="sequence_truncate")) < 0.5 * uncorrected
    assert 1e-3 < error(Rollout(backend="vllm", correction="token_truncate", **NO_LIMIT)) < uncorrected


def test_a_correction_of_tokens_is_exact_for_the_first_token() -> None:
    """With a reward that only the first token decides, the later ones have no gradient in the mean."""
    policy, _, sampler, rewards, want = enumerated(per_token=True)
    one = [Completion(torch.tensor([token], dtype=torch.int32)) for token in range(VOCABULARY)]
    example = Example(PROMPT, tuple(one))
    scorer = Scorer(policy)
    roles = Roles(Reinforce(Reinforce.Config()), scorer, scorer, None, 10_000)
    batch = batch_of([example], Layout("forest", 64), torch.device("cpu"))
    logps, own = sampler[::VOCABULARY, 0], rewards[::VOCABULARY]
    with torch.no_grad():
        drawn = scorer(batch.rows, batch.targets).logps
    weights, _ = correction_weights(drawn - logps, batch.cu_seqlens, Rollout(backend="vllm", **NO_LIMIT))
    numbers = {"times": logps.exp(), "rewards": own}
    batch = batch.attach(per_completion=numbers, per_token={"rollout_weights": weights})
    Reinforce(Reinforce.Config()).loss(batch, roles)["policy"].value.sum().backward()
    found = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert float((found - want).norm() / want.norm()) < 1e-6


def test_the_weights_change_the_gradient_and_no_value() -> None:
    policy, pairs, _, _, _ = enumerated(per_token=False)
    scorer = Scorer(policy)
    roles = Roles(Reinforce(Reinforce.Config()), scorer, scorer, None, 10_000)
    example = Example(PROMPT, tuple(Completion(pair.to(torch.int32)) for pair in pairs[:3]))
    plain = batch_of([example], Layout("forest", 64), torch.device("cpu"))
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.25, 1.5])
    weighted = plain.attach(per_token={"rollout_weights": weights})
    gradients = []
    for batch in (plain, weighted):
        outputs = roles.policy(batch, entropy=True)
        assert torch.equal(outputs.logps, roles.policy(plain).logps)
        # any loss at all: a square of the numbers, and the entropy, which has no weight
        rows = [torch.autograd.grad(x, policy.lm_head.weight, retain_graph=True)[0] for x in outputs.logps]
        (square,) = torch.autograd.grad(outputs.logps.square().sum(), policy.lm_head.weight, retain_graph=True)
        (entropy,) = torch.autograd.grad(outputs.entropy.sum(), policy.lm_head.weight, retain_graph=True)
        gradients.append((rows, square, entropy, outputs.logps.detach()))
    (rows, _, entropy, logps), (scaled, square, same, _) = gradients
    for i, weight in enumerate(weights.tolist()):
        assert torch.allclose(scaled[i], weight * rows[i], atol=1e-12)
    assert torch.allclose(square, sum(2 * logps[i] * weights[i].double() * rows[i] for i in range(6)), atol=1e-12)
    assert torch.equal(entropy, same)


class Twice(Method):
    """A method that knows of the weights, although it need not."""

    name, data, uses = "twice", "prompts", frozenset({"policy", "reward"})

    def collect(self, batch: Batch, ctx: Any) -> Batch:
        return ctx.rollouts(batch, 2)

    def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
        logps = models.policy(batch).logps
        logps = logps * batch["rollout_weights"] if "rollout_weights" in batch else logps
        return {"policy": Term(-batch["rewards"] * sequence_sum(logps, batch.cu_seqlens), over="completions")}


class Once(Twice):
    """The same without."""

    def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
        sums = sequence_sum(models.policy(batch).logps, batch.cu_seqlens)
        return {"policy": Term(-batch["rewards"] * sums, over="completions")}


def test_the_kit_finds_a_method_that_applies_the_weights_itself() -> None:
    class Suite(Conformance):
        __test__ = False
        method = Once

    class Faulty(Suite):
        method = Twice

    Suite().test_a_correction_scales_the_gradient_once({})
    with pytest.raises(AssertionError, match=r"the loss uses 'rollout_weights' itself; models.policy applies them"):
        Faulty().test_a_correction_scales_the_gradient_once({})


def test_a_masked_token_has_no_gradient_even_where_its_loss_is_infinite() -> None:
    policy, pairs, _, _, _ = enumerated(per_token=False)
    scorer = Scorer(policy)
    roles = Roles(Reinforce(Reinforce.Config()), scorer, scorer, None, 10_000)
    batch = batch_of([Example(PROMPT, (Completion(pairs[0].to(torch.int32)),))], Layout(), torch.device("cpu"))
    outputs = roles.policy(batch.attach(per_token={"rollout_weights": torch.tensor([0.0, 1.0])}))
    (outputs.logps * torch.tensor([math.inf, 1.0])).sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------ what is compared: like with like


TRUNCATED = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8, "temperature": 1.3},
    {"top_k": 12, "top_p": 0.9, "temperature": 0.8, "min_new_tokens": 1},
    {"min_new_tokens": 1},
]


@pytest.mark.parametrize("given", TRUNCATED)
def test_the_mean_ratio_is_one_whatever_sampling_leaves_out(given: dict[str, Any]) -> None:
    """Over all tokens that the sampler may draw; without the renormalisation it is what the trainer has of them."""
    sampling, ends = Sampling(**given), [2, 7]
    trainer = tiny_model(0, torch.float64)
    sampler = tiny_model(0, torch.float64)
    with torch.no_grad():
        sampler.lm_head.weight.mul_(1.02)  # slightly other numbers, in the same order
    prompt = torch.tensor([5, 9, 4], dtype=torch.int32)
    logits = [m(input_ids=prompt[None].long()).logits[0, -1] for m in (sampler, trainer)]
    mu, pi = (drawn_from(row, sampling, bool(sampling.min_new_tokens), ends) for row in logits)
    assert (mu.isfinite() == pi.isfinite()).all()
    tokens = mu.isfinite().nonzero().flatten()
    example = Example(prompt, tuple(Completion(t[None].to(torch.int32)) for t in tokens))
    batch = batch_of([example], Layout("forest", 256), torch.device("cpu"))
    truncation = Truncation.of(sampling, tuple(ends), batch)
    assert (truncation is None) == (given == {"temperature": 0.7})
    with torch.no_grad():
        outputs = Scorer(trainer)(batch.rows, batch.targets, sampling.temperature, truncation=truncation)
    drawn = outputs.logps if outputs.drawn is None else outputs.drawn
    assert drawn.tolist() == pytest.approx(pi[tokens].tolist(), abs=1e-9)
    mean = float((mu[tokens].exp() * (drawn - mu[tokens]).exp()).sum())
    assert mean == pytest.approx(1.0, abs=1e-9)
    bare = float(outputs.logps.exp().sum())  # E[trainer / sampler] without it
    assert (bare < 0.99) == (truncation is not None)


def test_a_token_that_the_trainer_would_leave_out_has_a_finite_ratio() -> None:
    """Where the two sets differ, the sampled token belongs to both, so that neither ratio nor KL is infinite."""
    z = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    kept = Truncation(2, 1.0).kept(z, torch.tensor([2]), slice(0, 1))
    want = math.log((math.e**2 + math.e + 1) / (math.e**2 + math.e + 1 + math.exp(-1)))
    assert float(kept) == pytest.approx(want, abs=1e-12)


def test_only_the_first_tokens_may_not_end_a_completion() -> None:
    examples = [Example(torch.tensor([4]), (Completion(torch.tensor([3, 4, 5])), Completion(torch.tensor([6]))))]
    batch = batch_of(examples, Layout(), torch.device("cpu"))
    truncation = Truncation.of(Sampling(min_new_tokens=2), (2,), batch)
    assert truncation is not None
    assert truncation.early is not None
    assert truncation.early.tolist() == [True, True, False, True]


# ------------------------------------------------------------------------------------------------------ in a run


@pytest.fixture
def online(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a short run of a method that samples."""
    rows = [{"prompt": r["prompt"]} for r in make_rows("text", 10)]
    short = {"max_new_tokens": 10, "batch_size": 16}
    own = {"max_steps": 2, "sampling": short, "learning_rate": 3e-3, "rollout": {"backend": "double"}}
    return settings | own | {"data": rows}


ASKS: dict[str, dict[str, Any]] = {
    "nash": {"judge": {"bradley_terry": {"use": "length", "max": 5}}},
    "ppo": {"reward": {"use": "length", "max": 5}, "epochs_per_batch": 2},
    "grpo": {"reward": {"use": "length", "max": 5}, "group_size": 3, "beta": 0.1},
    "rloo": {"reward": {"use": "length", "max": 5}, "group_size": 3},
    "reinforce": {"reward": {"use": "length", "max": 5}},
    "online_dpo": {"reward": {"use": "length", "max": 5}, "group_size": 3},
}
QUIET = {"health": {"enabled": False}}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", list(ASKS))
def test_every_method_that_samples_is_corrected_and_says_how_large_the_mismatch_is(
    method: str, online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    double = Double(online["model"])
    uses(monkeypatch, double)
    seen: list[Batch] = []
    original = Online.rollouts

    def watched(self: Online, *args: Any) -> Batch:
        seen.append(original(self, *args))
        return seen[-1]

    monkeypatch.setattr(Online, "rollouts", watched)
    result = alignkit.run(method, **online | ASKS[method] | QUIET)
    assert double.updates == [0, 1]  # the weights of each step are in force before it samples
    written, said = read_metrics(result.folder), lines_of(result.folder)
    for line, batch in zip(written, seen, strict=True):
        log_w = [float(x) for x in (batch["old_logps"] - batch["sampler_logps"]).double()]
        assert line["rollout/kl"] == pytest.approx(math.fsum(math.exp(x) - 1 - x for x in log_w) / len(log_w), rel=1e-5)
        assert line["rollout/kl"] > 1e-5
        assert line["rollout/ratio_max"] == pytest.approx(math.exp(max(log_w)), rel=1e-6)
        assert line["rollout/perplexity"] == pytest.approx(
            math.exp(-float(batch["old_logps"].double().mean())), rel=1e-5
        )
        weights = [min(math.exp(x), 2.0) for x in log_w]
        assert batch["rollout_weights"].tolist() == pytest.approx(weights, rel=1e-5)
        own = [s for s in said if s["step"] == line["step"]]
        sums = sequence_sum(batch["sampler_logps"], batch.cu_seqlens)
        assert [s["sampler_logp"] for s in own] == pytest.approx(sums.tolist(), rel=1e-6)
        means = sequence_sum(torch.tensor(weights), batch.cu_seqlens, mean=True)
        assert [s["weight"] for s in own] == pytest.approx(means.tolist(), rel=1e-5)


def test_an_exact_sampler_elsewhere_gives_the_run_that_generate_gives(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = alignkit.run("grpo", **online | ASKS["grpo"] | QUIET | {"rollout": {}}, name="plain")
    uses(monkeypatch, Double(online["model"], noise=0.0))
    other = alignkit.run("grpo", **online | ASKS["grpo"] | QUIET, name="other")
    for a, b in zip(read_metrics(plain.folder), read_metrics(other.folder), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert b["rollout/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert b["rollout/perplexity"] == pytest.approx(b["rollout/sampler_perplexity"], rel=1e-5)
        assert "rollout/kl" not in a


def test_two_ratios_the_clip_is_against_the_trainer_and_the_weight_against_the_sampler(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several updates a step the first one still begins at ratio 1 (decoupled PPO)."""
    uses(monkeypatch, Double(online["model"], noise=0.3))
    once = alignkit.run("grpo", **online | ASKS["grpo"] | QUIET | {"max_steps": 1}, name="once")
    line = read_metrics(once.folder)[0]
    assert line["ratio/max"] == pytest.approx(1.0, abs=1e-5)
    assert line["rollout/ratio_max"] > 1.5
    assert 0 < line["rollout/corrected"] < 1


@pytest.mark.parametrize("correction", ["none", "token_mask"])
def test_the_setting_decides_what_is_attached(
    correction: str, online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    uses(monkeypatch, Double(online["model"], noise=0.5))
    given = {"backend": "double", "correction": correction} | (
        {} if correction == "none" else {"correction_floor": 0.5}
    )
    result = alignkit.run("grpo", **online | ASKS["grpo"] | QUIET | {"rollout": given})
    line, said = read_metrics(result.folder)[0], lines_of(result.folder)
    assert ("rollout/corrected" in line) == ("weight" in said[0]) == (correction != "none")
    assert line["rollout/kl"] > 0


@pytest.mark.parametrize("sampling", [{"top_k": 4, "temperature": 0.8}, {"top_p": 0.7}, {"min_new_tokens": 3}])
def test_in_a_run_the_ratio_is_that_of_the_distributions_that_are_drawn_from(
    sampling: dict[str, Any], online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights: every ratio is 1, although the sampler leaves out half of the vocabulary."""
    uses(monkeypatch, Double(online["model"], noise=0.0))
    online["sampling"] = online["sampling"] | sampling
    line = read_metrics(alignkit.run("grpo", **online | ASKS["grpo"] | QUIET).folder)[0]
    assert line["rollout/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert line["rollout/kl"] == pytest.approx(0.0, abs=1e-6)
    assert line["rollout/corrected"] == 0


def test_bare_log_probabilities_are_compared_only_where_they_can_be(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    uses(monkeypatch, Double(online["model"], noise=0.0, processed=False))
    own = online | ASKS["grpo"] | QUIET
    line = read_metrics(alignkit.run("grpo", **own, name="bare").folder)[0]
    assert line["rollout/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    warm = own | {"sampling": own["sampling"] | {"temperature": 0.7, "top_k": 4}}
    with pytest.raises(ConfigError, match=r"drawn with temperature 0.7, top_k 4, so that rollout.correction would"):
        alignkit.run("grpo", **warm, name="warm")
    warm["rollout"] = {"backend": "double", "correction": "none"}
    kept = read_metrics(alignkit.run("grpo", **warm, name="kept").folder)[0]
    assert not [name for name in kept if name.startswith("rollout/")]
    assert kept["ratio/max"] == pytest.approx(1.0, abs=1e-5)


def test_a_sampler_that_loses_log_probabilities_is_named() -> None:
    example = Example(torch.tensor([3]), ())
    like = batch_of([example], Layout(), torch.device("cpu"))
    for logps in ([-1.0], None):
        made = [[Sampled([4, 5], True, [-1.0, -2.0]), Sampled([4, 5], True, logps)]]
        with pytest.raises(PluginError, match=r"returned [01] log-probabilities for a completion of 2 tokens"):
            with_completions([example], made, like)


def test_the_page_names_every_metric_and_correction() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/off-policy.md").read_text(encoding="utf-8")
    found = mismatch_metrics(lambda t: t, lambda t: t, torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert [name for name in [*found, *get_args(Correction)] if f"`{name}`" not in page] == []
