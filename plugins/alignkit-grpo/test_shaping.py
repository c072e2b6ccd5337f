"""GRPO's settings for further updates, the second clip and entropies: by hand in float64, and as TRL computes them."""

import itertools
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from alignkit.engine.averages import counts, sum_terms
from alignkit.testing import *
from alignkit.testing.bench import Bench, Cut
from alignkit.types import Layout, Outputs
from alignkit_grpo import GRPO
from alignkit_grpo.shaping import beyond, highest, unbiased_kl


def settings(**changes):
    return GRPO.Config(**{"group_size": 4, "beta": 0.3} | changes)


class TestShapedGRPO(Conformance):
    method = GRPO
    configs = (
        {"kl": "unbiased", "group_size": 3},
        {"top_entropy": 0.3, "entropy_coef": 0.1, "group_size": 4},
        {"delta": 1.5, "variant": "dapo", "mask_truncated": True, "entropy_coef": 0.1, "top_entropy": 0.5},
    )

    def expected_step(self, config, rows, bench):
        """At ratio 1, from a pass over each answer alone: nothing is clipped, and the unbiased KL is k3."""
        losses, entropies, lengths = [], [], []
        for row in rows:
            rewards = torch.tensor([a.reward for a in row.answers], dtype=torch.float64)
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4) * (rewards.max() > rewards.min())
            for a, answer, completion in zip(advantages, row.answers, row.example.completions, strict=True):
                if config.mask_truncated and int(completion.tokens[-1]) != 2:
                    continue
                ids = torch.cat([row.example.prompt, completion.tokens]).long()[None]
                with torch.no_grad():
                    logits = bench.models.policy_scorer.model(input_ids=ids, use_cache=False).logits[0]
                p = logits[len(row.example.prompt) - 1 : -1].double().log_softmax(-1)
                entropies += (-(p.exp() * p).sum(-1)).float().tolist()
                r = torch.tensor(answer.policy) - torch.tensor(answer.reference)
                kl = torch.exp(-r) - 1 + r if config.kl == "unbiased" else r.square() / 2
                losses += [(float(a), config.beta * float(k)) for k in kl]
                lengths.append(answer.n)
        place = math.floor(config.top_entropy * (len(entropies) - 1) + 1e-9)
        kept = sorted(entropies, reverse=True)[place]
        per_token = [k - a * (e >= kept) for (a, k), e in zip(losses, entropies, strict=True)]
        bonus = config.entropy_coef * statistics.fmean(e for e in entropies if e >= kept)
        if config.variant == "dapo":
            return statistics.fmean(per_token) - bonus
        ends = list(itertools.accumulate(lengths))
        return (
            statistics.fmean(statistics.fmean(per_token[e - n : e]) for e, n in zip(ends, lengths, strict=True)) - bonus
        )


def drawn(stale=0.5, **changes):
    """A collected batch of stale samples, and leaves for the policy's log-probabilities and entropies, float64."""
    bench = Bench(GRPO(settings(**changes)), stale=stale)
    examples = TestShapedGRPO().examples()
    (batch,) = bench.collect(examples)
    outputs = bench.models.policy(batch, entropy=True)
    # the limit of high entropies is found in float32
    leaves = [t.detach().clone().requires_grad_() for t in (outputs.logps, outputs.entropy.float().double())]
    return bench.method, batch, leaves


def own(method, batch, leaves):
    """The loss and its gradients."""
    models = SimpleNamespace(policy=lambda batch, entropy: Outputs(*leaves))
    terms = method.loss(batch, models)
    loss = sum_terms(terms, batch, "grpo").loss_share(counts(batch, lambda t: t))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.item(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


CASES = {
    "unbiased KL": {"kl": "unbiased"},
    "unbiased KL, no clip's bound": {"kl": "unbiased", "clip": 1.0, "clip_high": 50.0, "beta": 2.0},
    "second clip": {"delta": 1.25, "kl": "k3"},
    "entropy bonus": {"entropy_coef": 0.2, "kl": "k3"},
    "entropy bonus, another average": {"entropy_coef": 0.2, "kl": "k3", "variant": "bnpo"},
    "high entropies": {"top_entropy": 0.25, "kl": "k3"},
    "one token": {"top_entropy": 0.0, "kl": "k3"},
    "all": {"top_entropy": 0.4, "entropy_coef": 0.1, "delta": 1.3, "kl": "unbiased"},
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_by_hand(name):
    """Token by token in Python; a gradient is written out, not derived."""
    c = settings(**CASES[name])
    method, batch, leaves = drawn(**CASES[name])
    got, gradients = own(method, batch, leaves)
    logps, entropies = (x.tolist() for x in leaves)
    old, reference, lengths = batch["old_logps"].tolist(), batch.reference_logps.tolist(), batch.lengths.tolist()
    high, n = c.clip_high or c.clip, len(logps)
    kept = sorted(entropies, reverse=True)[math.floor(c.top_entropy * (n - 1) + 1e-9)]
    acted = [e >= kept for e in entropies]  # the first tokens of a group have one entropy
    loss, g_logps, g_entropies, start, bounded = 0.0, [0.0] * n, [0.0] * n, 0, 0
    for a, length in zip(batch["advantages"].tolist(), lengths, strict=True):
        weight = 1 / n if c.variant == "bnpo" else 1 / (length * len(lengths))
        for t in range(start, start + length):
            q, r = math.exp(logps[t] - old[t]), logps[t] - reference[t]
            if acted[t]:
                ratio = min(q, c.delta) if c.delta else q
                loss -= weight * min(ratio * a, min(max(q, 1 - c.clip), 1 + high) * a)
                stopped = (q > 1 + high and a > 0) or (q < 1 - c.clip and a < 0)
                far = bool(c.delta) and q > c.delta and a < 0
                bounded += far
                g_logps[t] -= weight * q * a * (not stopped and not far)
                g_entropies[t] -= c.entropy_coef / sum(acted)
                loss -= c.entropy_coef * entropies[t] / sum(acted)
            k3, factor = math.exp(-r) - 1 + r, q if c.kl == "unbiased" else 1.0
            loss += weight * c.beta * factor * k3
            # the gradient of q k3 is q (k3 + 1 - e^-r) = q r
            g_logps[t] += weight * c.beta * (q * r if c.kl == "unbiased" else 1 - math.exp(-r))
        start += length
    assert got == pytest.approx(loss, rel=1e-6)
    assert gradients[0].tolist() == pytest.approx(g_logps, rel=1e-5, abs=1e-9)
    assert gradients[1].tolist() == pytest.approx(g_entropies, rel=1e-6, abs=1e-12)
    assert not c.delta or bounded


@pytest.mark.parametrize("name", CASES)
def test_trl_computes_the_same_loss_and_gradient(name):
    trl = pytest.importorskip("trl")
    c = settings(**CASES[name])
    method, batch, leaves = drawn(**CASES[name])
    got, gradients = own(method, batch, leaves)
    lengths = batch.lengths.tolist()
    padded = torch.nn.utils.rnn.pad_sequence

    def rows(flat):
        return padded(list(flat.split(lengths)), batch_first=True)

    mask = rows(torch.ones(len(leaves[0]), dtype=torch.float64))
    gathered = SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True,
        pad_across_processes=lambda x, dim, pad_index: x, num_processes=1,
    )  # fmt: skip
    theirs = SimpleNamespace(
        accelerator=gathered, aux_loss_enabled=False, top_entropy_quantile=c.top_entropy, beta=c.beta,
        off_policy_mask_threshold=None, importance_sampling_level="token", loss_type=c.variant, epsilon_low=c.clip,
        epsilon_high=c.clip_high or c.clip, use_vllm=False, use_adaptive_entropy=False, entropy_coef=c.entropy_coef,
        _entropy_bonus_enabled=c.entropy_coef != 0, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=c.kl == "unbiased", delta=c.delta),
        _metrics={"train": __import__("collections").defaultdict(list)}, model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (rows(leaves[0]), rows(leaves[1]), None),
    )  # fmt: skip
    theirs.get_high_entropy_mask = lambda *a: trl.GRPOTrainer.get_high_entropy_mask(theirs, *a)
    ids = mask.long()
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask,
        "advantages": batch["advantages"], "old_per_token_logps": rows(batch["old_logps"]),
        "ref_per_token_logps": rows(batch.reference_logps),
    }  # fmt: skip
    loss = trl.GRPOTrainer._compute_loss(theirs, None, inputs)
    wanted = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert got == pytest.approx(loss.item(), rel=1e-6)
    for mine, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(mine, torch.zeros_like(mine) if want is None else want, rtol=1e-5, atol=1e-9)


def test_off_policy_only_the_unbiased_estimator_has_the_gradient_of_the_kl():
    """Over all that the older policy may sample, weighted by its probability, for a policy that has moved since."""
    generator = torch.Generator().manual_seed(3)
    logits, older, reference = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    old, reference = older.log_softmax(0), reference.log_softmax(0)
    logits = logits.requires_grad_()
    policy = logits.log_softmax(0)
    divergence = (policy.exp() * (policy - reference)).sum()
    (want,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    r = policy - reference
    estimates = {
        "k1": r,
        "k2": r.square() / 2,
        "k3": torch.expm1(-r) + r,
        "unbiased": unbiased_kl(policy, old, reference),
    }
    for kind, estimate in estimates.items():
        expected = (old.exp() * estimate).sum()
        (got,) = torch.autograd.grad(expected, logits, retain_graph=True)
        assert torch.allclose(got, want) == (kind == "unbiased"), kind
        assert torch.isclose(expected, divergence).item() == (kind == "unbiased"), kind


def test_on_policy_the_unbiased_estimator_has_the_gradient_of_k2():
    method, batch, leaves = drawn(stale=0.0, kl="unbiased")
    assert "old_logps" not in batch
    _, (unbiased, _) = own(method, batch, leaves)
    _, (k2, _) = own(GRPO(settings(kl="k2")), batch, leaves)
    assert torch.allclose(unbiased, k2, rtol=1e-5, atol=1e-9)
    _, (k3, _) = own(GRPO(settings(kl="k3")), batch, leaves)
    assert not torch.allclose(unbiased, k3, rtol=1e-2, atol=1e-9)


def test_extreme_ratios_stay_finite():
    far = torch.tensor([200.0, -200.0, 0.0])
    logps = torch.zeros(3, requires_grad=True)
    kl = unbiased_kl(logps, -far, far.flip(0))
    assert bool(kl.isfinite().all())
    kl.sum().backward()
    assert bool(logps.grad.isfinite().all())


def test_the_second_clip_acts_on_bad_answers_only():
    logps, borders = torch.tensor([3.0, 3.0, 1.4, 0.5]).log(), torch.tensor([0, 1, 4])
    advantages = torch.tensor([-2.0, 2.0, -2.0, -2.0])
    assert beyond(logps, torch.zeros(4), advantages, borders, "token", 1.5).tolist() == [True, False, False, False]
    # the second sequence's ratio is the geometric mean of 3, 1.4 and 0.5, 1.28
    assert beyond(logps, torch.zeros(4), -advantages.abs(), borders, "sequence", 1.25).tolist() == [True] * 4
    assert beyond(logps, torch.zeros(4), -advantages.abs(), borders, "sequence", 1.3).tolist() == [True] + [False] * 3


@pytest.mark.parametrize(
    ("fraction", "want"), [(0.0, [3]), (0.2, [3]), (0.25, [3, 1]), (0.5, [3, 1, 4]), (1.0, [0, 1, 3, 4, 5])]
)
def test_the_highest_are_those_of_a_quantile(fraction, want):
    values = torch.tensor([0.0, 2.0, 9.0, 3.0, 1.0, 0.5])
    counted = torch.tensor([True, True, False, True, True, True])
    mask = highest(values, counted, fraction, lambda t: t)
    assert mask.nonzero().flatten().tolist() == sorted(want)
    limit = torch.quantile(values[counted], 1 - fraction)
    assert torch.equal(mask, (values >= limit) & counted)
    assert not highest(values, torch.zeros(6, dtype=torch.bool), fraction, lambda t: t).any()


@pytest.mark.parametrize("cut", [Cut(ranks=2), Cut(ranks=3), Cut(layout=Layout("padded"))])
def test_the_tokens_of_high_entropy_are_those_of_the_whole_step(cut):
    bench, examples = Bench(GRPO(settings(top_entropy=0.3, beta=0.0))), TestShapedGRPO().examples()
    (whole,) = bench.collect(examples)
    parts = bench.collect(examples, cut)
    assert sum(int(b["acted"].sum()) for b in parts) == int(whole["acted"].sum())
    rows = {e.row: part for b in parts for e, part in zip(b.examples, by_example(b), strict=True)}
    for example, part in zip(whole.examples, by_example(whole), strict=True):
        assert torch.equal(rows[example.row], part)


def by_example(batch):
    sizes = [sum(len(c.tokens) for c in e.completions) for e in batch.examples]
    return batch["acted"].split(sizes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": 1.2}, r"delta is 1\.2, not above 1 \+ clip_high = 1\.2; raise it"),
        ({"delta": 1.25, "variant": "dapo"}, r"not above 1 \+ clip_high = 1\.28"),
        ({"delta": 2.0, "variant": "cispo"}, "variant: cispo has clip_high only"),
    ],
)
def test_a_second_clip_without_effect_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        GRPO.Config(**wrong)
