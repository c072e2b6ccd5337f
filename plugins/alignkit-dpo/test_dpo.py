"""DPO and its variants: conformance, and every formula by hand in float64."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import alignkit_dpo
from alignkit.reference.reference import Reference
from alignkit.testing import *
from alignkit.types import Completion, Example, Layout
from alignkit_dpo import DPO
from alignkit_dpo.ratios import derivative


class TestDPO(Conformance):
    method = DPO
    configs = (
        {},
        {"beta": 0.5, "label_smoothing": 0.1},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": "hinge"},
        {"loss_type": "exo_pair", "label_smoothing": 0.05},
        {"loss_type": "nca_pair"},
        {"loss_type": "sppo_hard", "beta": 0.4},
        {"loss_type": "apo_zero"},
        {"loss_type": "apo_down"},
        {"loss_type": "cal", "beta": 0.4},
        {"loss_weights": {"hinge": 0.3, "apo_zero": 0.7}},
        {"loss_weights": {"sigmoid": 0.8, "hinge": 0.2}, "label_smoothing": 0.1},
        {"length_normalised": True, "beta": 5.0},
        {"ld_alpha": 0.3},
        {"ld_alpha": 0.0, "length_normalised": True},
        {"divergence": "forward_kl"},
        {"divergence": "js"},
        {"divergence": "alpha", "divergence_alpha": 0.3},
        {"rpo_alpha": 0.7},
        {"sync_every": 1, "sync_alpha": 0.4},
    )
    expected_failures: ClassVar = {
        "test_resume_lora[sync_every=1,sync_alpha=0.4]": "mixing adapters is not mixing weights, so it is refused",
    }

    def expected(self, c, row):
        """2305.18290 eq. 7, with what each variant changes about it."""
        h_chosen, h_rejected = (log_ratio(c, row, answer) for answer in row.answers)
        x, u, v = c.beta * (slope(c, h_chosen) - slope(c, h_rejected)), h_chosen, h_rejected
        e = c.label_smoothing
        right, flipped = -log_sigmoid(x), -log_sigmoid(-x)
        of = {
            "sigmoid": (1 - e) * right + e * flipped,  # conservative DPO
            "robust": ((1 - e) * right - e * flipped) / (1 - 2 * e),  # 2403.00409
            "hinge": max(0.0, 1 - x),  # 2305.10425
            "exo_pair": _kl((s(x), s(-x)), (1 - e, e)),  # 2402.00856
            # 2402.05369
            "nca_pair": -math.log(s(c.beta * u)) - 0.5 * math.log(s(-c.beta * u)) - 0.5 * math.log(s(-c.beta * v)),
            "sppo_hard": (u - 0.5 / c.beta) ** 2 + (v + 0.5 / c.beta) ** 2,  # 2405.00675
            "apo_zero": 1 - s(c.beta * u) + s(c.beta * v),  # 2408.06266 eq. 7
            "apo_down": s(c.beta * u) + 1 - s(x),  # eq. 8
            "cal": -math.log(s(u - v)) + (u - 0.5 / c.beta) ** 2 + (v + 0.5 / c.beta) ** 2,  # 2412.14516
        }
        loss = sum(weight * of[kind] for kind, weight in (c.loss_weights or {c.loss_type: 1.0}).items())
        return loss - c.rpo_alpha * row.chosen.mean_logp  # 2404.19733


def s(x):
    return 1 / (1 + math.exp(-x))


def _kl(p, q):
    """KL(p || q); a weight of 0 for what no loss type asks for."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) if all(q) else 0.0


def log_ratio(c, row, answer):
    """2409.06411: tokens past the length that both answers have count ld_alpha."""
    shared = min(a.n for a in row.answers)
    ratios = [p - r for p, r in zip(answer.policy, answer.reference, strict=True)]
    h = math.fsum(ratios[:shared]) + c.ld_alpha * math.fsum(ratios[shared:])
    return h / answer.n if c.length_normalised else h


def slope(c, h):
    """2309.16240, table 1: f'(u) at u = e^h, up to a constant that cancels between chosen and rejected."""
    u = math.exp(h)
    a = c.divergence_alpha
    return {
        "reverse_kl": math.log(u) + 1,
        "forward_kl": -1 / u,
        "js": math.log(2 * u / (1 + u)),
        "alpha": (1 - u**-a) / a,
    }[c.divergence]


def numeric_derivative(f, u):
    step = 1e-6 * u
    return (f(u + step) - f(u - step)) / (2 * step)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@given(h=st.floats(-4, 4))
def test_slopes_are_derivatives_of_the_divergences(divergence, h):
    """The derivatives in the table are those of f in D_f = E_reference[f(policy / reference)], not misprints."""
    a, u = 0.3, math.exp(h)
    f = {
        "reverse_kl": lambda u: u * math.log(u),
        "forward_kl": lambda u: -math.log(u),
        "js": lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        "alpha": lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
    }[divergence]
    config = DPO.Config(divergence=divergence, **({"divergence_alpha": a} if divergence == "alpha" else {}))
    assert numeric_derivative(f, u) == pytest.approx(slope(config, h), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@given(h=st.floats(-19, 15, width=32))
def test_slopes_in_float32(divergence, h):
    """No digit is lost to cancellation where policy and reference are far apart."""
    config = DPO.Config(divergence=divergence)
    constant = math.log(2) if divergence == "js" else 0.0  # cancels between chosen and rejected
    got = float(derivative(torch.tensor([h], dtype=torch.float32), divergence, config.divergence_alpha))
    assert got == pytest.approx(slope(config, h) - constant, rel=2e-5, abs=1e-14)


def test_a_pair_by_hand():
    """Two tokens against one, with simple numbers: D = 1.5 - (-0.5) = 2, so the loss is log(1 + e^-0.2)."""
    chosen, rejected = (Completion(torch.zeros(n, dtype=torch.int32)) for n in (2, 1))
    pair = Example(torch.tensor([1], dtype=torch.int32), (chosen, rejected))
    says = ScriptedModels({chosen: -0.25, rejected: -1.5}, {chosen: -1.0, rejected: -1.0})
    bench = Bench(DPO(DPO.Config()), says)
    (batch,) = bench.collect([pair])
    terms = {name: term.value.mean().item() for name, term in bench.method.loss(batch, says).items()}
    assert terms["sigmoid"] == pytest.approx(math.log(1 + math.exp(-0.2)))
    assert terms["rewards/chosen"] == pytest.approx(0.15)
    assert terms["rewards/rejected"] == pytest.approx(-0.05)
    assert terms["rewards/margin"] == pytest.approx(0.2)
    assert terms["rewards/accuracy"] == 1.0
    assert terms["logps/chosen"] == -0.5
    assert terms["length/chosen"] == 2.0
    # k3 of KL(reference || policy): r - 1 - log r a token
    k3_chosen, k3_rejected = 2 * (math.exp(0.75) - 1 - 0.75), math.exp(-0.5) - 1 + 0.5
    assert terms["kl"] == pytest.approx((k3_chosen + k3_rejected) / 2)


def test_reference_moves_every_so_many_steps():
    """2404.09656: after steps 2, 4, 6 where sync_every is 2."""
    method = DPO(DPO.Config(sync_every=2, sync_alpha=0.4))
    bench = Bench(method)
    moved = {}
    for step in range(6):
        ctx = bench.context(tiny_examples("pairs", 2))
        ctx.step = step
        method.after_update(ctx, {})
        moved[step + 1] = ctx.moved
    assert moved == {1: [], 2: [0.4], 3: [], 4: [0.4], 5: [], 6: [0.4]}
    assert method.reference_need() == "moving"
    assert DPO(DPO.Config()).reference_need() == "rows"


def test_reference_moves_by_alpha():
    bench = Bench(DPO(DPO.Config(sync_every=1)))
    policy, before = bench.models.policy_scorer, bench.models.reference_scorer
    reference = Reference(
        "full",
        before,
        layout=Layout(),
        device=torch.device("cpu"),
        max_tokens=64,
        cache=None,
        compute_dtype=torch.float64,
    )
    reference.update(policy, 0.25)
    moved, old, new = reference.state(), before.state_dict(), policy.state_dict()
    for name, weight in moved.items():
        assert torch.allclose(weight, 0.25 * new[name] + 0.75 * old[name], rtol=1e-12, atol=1e-15)


def test_reference_moves_in_a_run(tmp_path):
    """With alpha 1 after every step, policy and reference are one at the start of each: the loss stays at log 2."""
    still = train(DPO, tmp_path, name="still", learning_rate=1e-2)
    moved = train(DPO, tmp_path, name="moved", learning_rate=1e-2, sync_every=1, sync_alpha=1.0)
    assert moved.metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(still.metrics["loss"] - math.log(2)) > 1e-3


def test_smoothing_of_a_hinge_is_refused():
    with pytest.raises(ValueError, match="no effect on loss_type: hinge"):
        DPO.Config(loss_type="hinge", label_smoothing=0.1)


def test_the_plugin_brings_both_methods():
    assert alignkit_dpo.register_methods() == [DPO, alignkit_dpo.OnlineDPO]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sync_alpha": 0.3}, "sync_alpha has an effect with sync_every only"),
        ({"divergence_alpha": 0.3}, "divergence_alpha has an effect with divergence: alpha only"),
        ({"loss_type": "hinge", "loss_weights": {"sigmoid": 1.0}}, "loss_weights takes the place of loss_type"),
        ({"loss_type": "apo_zero", "label_smoothing": 0.1}, "no effect on loss_type: apo_zero"),
        ({"loss_type": "cal", "divergence": "js"}, "loss_type: cal is not of a margin alone; remove divergence"),
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing above 0, such as 0.001"),
        ({"loss_weights": {"hinge": 1.0}, "label_smoothing": 0.1}, "label_smoothing has no effect"),
    ],
)
def test_settings_without_an_effect_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DPO.Config(**settings)
