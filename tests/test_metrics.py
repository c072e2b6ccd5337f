"""What methods on pairs log, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from zoo import fresh

from alignkit import log_ratios, pair_metrics, rounding, wins
from alignkit.models.packing import batch_of
from alignkit.models.scoring import Scorer
from alignkit.types import Batch, Completion, Example, Layout


def pair() -> Batch:
    """A chosen answer of two tokens and a rejected one of four."""
    answers = tuple(Completion(torch.arange(3, 3 + n, dtype=torch.int32)) for n in (2, 4))
    return batch_of([Example(torch.tensor([1, 2], dtype=torch.int32), answers)], Layout("padded"))


def test_pairs_are_summed_and_set_against_the_reference_by_the_token() -> None:
    policy = torch.tensor([-1.0, -2.0, -1.0, -1.0, -1.0, -1.0], requires_grad=True)
    batch = pair().attach(per_token={"reference_logps": torch.tensor([-1.0, -3.0, -0.5, -0.5, -0.5, -0.5])})
    found = pair_metrics(batch, policy, torch.tensor([0.2, -0.3]))
    kl = found.pop("kl").value.tolist()
    assert not any(term.value.requires_grad for term in found.values())
    assert {name: term.value.item() for name, term in found.items()} == pytest.approx(
        {
            "rewards/chosen": 0.2, "rewards/rejected": -0.3, "rewards/margin": 0.5, "rewards/accuracy": 1.0,
            "logps/chosen": -3.0, "logps/rejected": -4.0, "length/chosen": 2.0, "length/rejected": 4.0,
            "logratios/chosen": 0.5, "logratios/rejected": -0.5,
        }
    )  # fmt: skip
    assert kl == pytest.approx([math.e - 2, 4 * (math.exp(-0.5) - 0.5)])  # r - 1 - log r of each token


def test_without_a_reference_nothing_is_set_against_it() -> None:
    found = pair_metrics(pair(), torch.full([6], -1.0), torch.zeros(2))
    assert found["rewards/accuracy"].value.tolist() == [0.5]
    assert not {"kl", "logratios/chosen", "logratios/rejected"} & found.keys()


def test_log_ratios_of_the_reference_itself_are_0() -> None:
    logps = torch.tensor([-1.0, -2.0, -1.0, -4.0, -1.0, -1.0])
    assert log_ratios(pair().attach(per_token={"reference_logps": logps}), logps).tolist() == [0.0, 0.0]


def test_the_rounding_of_a_sum_is_that_of_its_tokens_in_quadrature() -> None:
    policy, reference = torch.tensor([-1.0, -9.0, -100.0]), torch.tensor([-2.0, -8.0, -0.0])
    got = rounding(torch.tensor([0, 2, 3, 3]), policy, reference).tolist()
    # 32 for each logit and log-sum-exp, and 4 units in the last place, 2^-23
    want = [math.hypot(67, 81), 164, 0]
    assert got == pytest.approx([4 * 2.0**-23 * each for each in want], rel=1e-6)


def test_a_tie_is_what_float32_cannot_tell_apart() -> None:
    a = torch.tensor([0.3, 1000.0, 1.0, -1.0, 0.0, math.inf, math.nan])
    b = torch.tensor([0.1 + 0.2, 1000.0002, 1.0 + 1e-5, -1.0, 1e-30, math.inf, 0.0])
    assert wins(a.double(), b.double()).tolist() == [0.5, 0.5, 0, 0.5, 0, 0.5, 0]
    assert wins(b.double(), a.double()).tolist() == [0.5, 0.5, 1, 0.5, 1, 0.5, 0]
    assert wins(torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.8]), torch.tensor([0.15, 0.15])).tolist() == [0.5, 1]


def test_the_tolerance_of_a_pair_is_in_units_of_its_rewards() -> None:
    """The same gap is a tie where a nat is worth that much, and none where it is worth a thousandth of it."""
    batch = pair().attach(per_token={"reference_logps": torch.full([6], -1.0)})
    policy = torch.full([6], -1.0)
    gap = torch.tensor([5e-5, 0.0])
    assert pair_metrics(batch, policy, gap)["rewards/accuracy"].value.tolist() == [0.5]
    assert pair_metrics(batch, policy, gap, 1e-3)["rewards/accuracy"].value.tolist() == [1.0]
    assert pair_metrics(batch, policy, gap, torch.full([2], 1e-3))["rewards/accuracy"].value.tolist() == [1.0]


@pytest.mark.parametrize("name", ["llama", "gemma 3", "gpt 2"])
def test_passes_of_one_model_in_different_layouts_differ_by_less_than_their_rounding(name: str) -> None:
    scorer, generator = Scorer(fresh(name)), torch.Generator().manual_seed(1)

    def tokens(longest: int) -> torch.Tensor:
        return torch.randint(2, 96, (int(torch.randint(1, longest, (1,), generator=generator)),), generator=generator)

    examples = [Example(tokens(30).int(), tuple(Completion(tokens(90).int()) for _ in range(2))) for _ in range(12)]
    together, alone = batch_of(examples, Layout("forest")), [batch_of([e], Layout("padded")) for e in examples]
    with torch.no_grad():
        a = scorer(together.rows, together.targets).logps
        b = torch.cat([scorer(each.rows, each.targets).logps for each in alone])
    assert not torch.equal(a, b)
    batch = together.attach(per_token={"reference_logps": b})
    h = log_ratios(batch, a) * batch.lengths
    assert set(pair_metrics(batch, a, h)["rewards/accuracy"].value.tolist()) == {0.5}
    # a log-ratio of a thousandth of a nat per token is no rounding
    moved = a + torch.where(torch.arange(len(a)) < batch.cu_seqlens[1], 1e-3, 0.0)
    h = log_ratios(batch, moved) * batch.lengths
    assert pair_metrics(batch, moved, h)["rewards/accuracy"].value[0] == 1
