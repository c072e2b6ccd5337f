"""Terms to numbers: what a step divides by, what is differentiated, and what a plugin did wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.engine.averages import Averages, counts, sum_terms
from alignkit.errors import PluginError
from alignkit.models.packing import batch_of
from alignkit.types import Batch, Completion, Example, Layout, Term, metric


def alone(value: torch.Tensor) -> torch.Tensor:
    return value


def batch(lengths: list[int], mask: list[bool] | None = None) -> Batch:
    """One example a length pair: two completions of that many tokens."""
    token = lambda n: Completion(torch.ones(n, dtype=torch.int32))  # noqa: E731
    made = [Example(torch.ones(2, dtype=torch.int32), (token(n), token(1)), row=i) for i, n in enumerate(lengths)]
    out = batch_of(made, Layout())
    return out if mask is None else out.attach(per_completion={"good": torch.tensor(mask)})


def test_what_a_step_divides_by_is_counted_over_all_ranks() -> None:
    given_ = batch([3, 2], [True, False, True, True]).attach(per_example={"margin": torch.zeros(2)})
    assert counts(given_, alone) == {"examples": 2.0, "completions": 4.0, "tokens": 7.0, "good": 3.0}
    assert counts(given_, lambda t: t * 3)["tokens"] == 21.0


def test_a_mask_that_nothing_fulfils_adds_nothing_to_the_loss_and_has_no_mean() -> None:
    given_ = batch([1], [False, False])
    value = torch.tensor([3.0, math.nan], requires_grad=True)
    terms = {"x": Term(value, over="good"), "y": Term(torch.tensor([2.0]))}
    denominators, total, averages = counts(given_, alone), sum_terms(terms, given_, "mine"), Averages()
    assert denominators["good"] == 0.0
    loss = total.loss_share(denominators)
    assert loss.item() == 2.0
    loss.backward()
    assert value.grad.tolist() == [0.0, 0.0]
    averages.expect(denominators)
    averages.add(total)
    assert averages.means(alone) == {"loss": 2.0, "y": 2.0}


def test_terms_are_summed_over_what_they_name() -> None:
    given_ = batch([2, 1], [True, False, False, True])
    terms = {
        "a": Term(torch.tensor([1.0, 2.0])),
        "b": Term(torch.tensor([1.0, 2.0, 3.0, 4.0]), over="completions"),
        "c": Term(torch.ones(5) * 0.5, over="tokens"),
        "d": Term(torch.tensor([1.0, 2.0, 3.0, 4.0]), over="good"),
    }
    got = {n: float(v) for n, v in sum_terms(terms, given_, "mine").sums.items()}
    assert got == {"a": 3.0, "b": 10.0, "c": 2.5, "d": 5.0}


@pytest.mark.parametrize(
    ("value", "over", "wanted"),
    [
        (torch.zeros(3), "examples", 2),
        (torch.zeros(()), "examples", 2),
        (torch.zeros(2, 1), "examples", 2),
        (torch.zeros(2), "completions", 4),
        (torch.zeros(4), "tokens", 5),
        (torch.zeros(2), "good", 4),
    ],
)
def test_a_value_of_the_wrong_shape_names_method_term_and_shape(value: torch.Tensor, over: str, wanted: int) -> None:
    message = rf"method 'mine' returned the term 'x' of shape .* over '{over}'; .* must be \[{wanted}\]"
    with pytest.raises(PluginError, match=message):
        sum_terms({"x": Term(value, over)}, batch([2, 1], [True] * 4), "mine")


@pytest.mark.parametrize("over", ["tokns", "margin"])
def test_averaging_over_what_is_no_mask_names_those_that_are(over: str) -> None:
    given_ = batch([2, 1], [True] * 4).attach(per_example={"margin": torch.zeros(2)})
    message = f"method 'mine' averages the term 'x' over '{over}', .* examples, completions, tokens, good"
    with pytest.raises(PluginError, match=message):
        sum_terms({"x": Term(torch.zeros(2), over)}, given_, "mine")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_a_mask_leaves_out_may_be_anything(bad: float) -> None:
    given_ = batch([1], [True, False])
    value = torch.tensor([2.0, bad], requires_grad=True)
    terms = {"x": Term(value, over="good")}
    total = sum_terms(terms, given_, "mine")
    assert float(total.sums["x"].detach()) == 2.0
    total.loss_share(counts(given_, alone)).backward()
    assert value.grad.tolist() == [1.0, 0.0]


def test_the_loss_is_every_coefficient_times_its_mean() -> None:
    given_ = batch([2, 1])
    a, b = torch.tensor([1.0, 3.0], requires_grad=True), torch.ones(5, requires_grad=True)
    terms = {"a": Term(a, coef=0.5), "b": Term(b, over="tokens", coef=-2.0)}
    loss = sum_terms(terms, given_, "mine").loss_share(counts(given_, alone))
    assert loss.item() == pytest.approx(0.5 * 2.0 - 2.0 * 1.0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert a.grad.tolist() == pytest.approx([0.25, 0.25])
    assert b.grad.tolist() == pytest.approx([-0.4] * 5)


def test_a_coefficient_of_zero_is_never_differentiated_not_even_where_it_is_nan() -> None:
    given_ = batch([1, 1])
    learned, watched = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    terms = {"loss": Term(learned), "seen": Term(watched * math.nan, coef=0.0), "told": metric(watched)}
    loss = sum_terms(terms, given_, "mine").loss_share(counts(given_, alone))
    assert loss.item() == 1.0
    loss.backward()
    assert watched.grad is None


def test_a_loss_without_any_coefficient_is_refused() -> None:
    given_, terms = batch([1]), {"x": metric(torch.zeros(1))}
    with pytest.raises(PluginError, match="no term with a coefficient; there is nothing to train on"):
        sum_terms(terms, given_, "mine").loss_share(counts(given_, alone))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=7), st.integers(1, 20), st.integers(0, 2**31))
def test_neither_loss_nor_gradient_nor_metrics_depend_on_how_a_step_is_cut(
    lengths: list[int], budget: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    n, n_tokens = len(lengths), sum(lengths) + len(lengths)
    paraaverages = torch.ones((), requires_grad=True)
    mask = (torch.rand(2 * n, generator=g) < 0.5).tolist()
    e, c, s = (torch.randn(k, generator=g) for k in (n, n_tokens, 2 * n))
    whole = batch(lengths, mask).attach(per_example={"e": e}, per_token={"c": c}, per_completion={"s": s})

    denominators, averages, loss = counts(whole, alone), Averages(), 0.0
    averages.expect(denominators)
    for micro in whole.micro_batches(budget):
        terms = {
            "e": Term(paraaverages * micro["e"], coef=2.0),
            "c": Term(paraaverages**2 * micro["c"], over="tokens"),
            "s": Term(paraaverages * micro["s"], over="good", coef=0.5),
            "watched": metric(micro["s"], over="completions"),
        }
        summed = sum_terms(terms, micro, "mine")
        part = summed.loss_share(denominators)
        part.backward()
        loss += part.item()
        averages.add(summed)

    kept = [x for x, m in zip(s.tolist(), mask, strict=True) if m]
    mean_s = sum(kept) / max(len(kept), 1)
    mean_e, mean_c = sum(e.tolist()) / n, sum(c.tolist()) / n_tokens
    by_hand = 2 * mean_e + mean_c + 0.5 * mean_s
    assert loss == pytest.approx(by_hand, abs=1e-5)
    assert paraaverages.grad.item() == pytest.approx(2 * mean_e + 2 * mean_c + 0.5 * mean_s, abs=1e-5)
    means = averages.means(alone)
    want = {"loss": by_hand, "e": mean_e, "c": mean_c, "watched": sum(s.tolist()) / (2 * n)}
    if kept:
        want["s"] = mean_s
    assert means == pytest.approx(want, abs=1e-5)


def test_a_pass_that_only_keeps_the_ranks_in_step_counts_for_nothing() -> None:
    given_ = batch([1, 1])
    terms = {"x": Term(torch.tensor([1.0, 3.0]))}
    averages = Averages()
    averages.expect(counts(given_, alone))
    averages.add(sum_terms(terms, given_, "mine"))
    averages.add(sum_terms(terms, given_, "mine"), weight=0.0)
    assert averages.means(alone) == {"loss": 2.0, "x": 2.0}


def test_means_over_several_batches_weigh_each_by_its_count() -> None:
    averages = Averages()
    for lengths, value in (([1, 1, 1], 1.0), ([1], 5.0)):
        given_ = batch(lengths)
        terms = {"x": Term(torch.full((len(lengths),), value))}
        averages.expect(counts(given_, alone))
        averages.add(sum_terms(terms, given_, "mine"))
    assert averages.means(alone)["x"] == pytest.approx((3 * 1.0 + 5.0) / 4)


def test_the_name_loss_belongs_to_the_sum_and_totals_are_reduced_over_ranks() -> None:
    given_ = batch([1, 1])
    terms = {"loss": Term(torch.tensor([1.0, 1.0])), "more": Term(torch.tensor([2.0, 2.0]))}
    averages = Averages()
    two_ranks = lambda t: t * 2  # noqa: E731
    averages.expect(counts(given_, two_ranks))
    averages.add(sum_terms(terms, given_, "mine"))
    assert averages.means(two_ranks) == {"loss": 3.0, "more": 2.0}


def test_a_value_that_is_not_finite_shows_in_its_mean_and_in_the_loss() -> None:
    given_ = batch([1, 1])
    terms = {"x": Term(torch.tensor([1.0, math.nan])), "seen": metric(torch.tensor([1.0, math.inf]))}
    averages = Averages()
    averages.expect(counts(given_, alone))
    averages.add(sum_terms(terms, given_, "mine"))
    means = averages.means(alone)
    assert math.isnan(means["loss"])
    assert means["seen"] == math.inf
