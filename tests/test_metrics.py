"""What methods on pairs log, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit import log_ratios, pair_metrics
from alignkit.models.packing import batch_of
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
