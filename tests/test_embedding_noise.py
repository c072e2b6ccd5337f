"""NEFTune: noise of the right size, in passes that are learned from only, repeated by a resumed run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import examples, fresh

import alignkit
from alignkit.errors import ConfigError
from alignkit.models.embedding_noise import ALPHA
from alignkit.models.packing import batch_of
from alignkit.models.scoring import trunk
from alignkit.runs.folder import read_metrics
from alignkit.types import Completion, Example, Layout
from helpers import killed_before, make_rows


def seen(model: Any, batch: Any) -> torch.Tensor:
    """What the first layer receives, [R, T, H]."""
    found: list[torch.Tensor] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, given, named: found.append(
        given[0] if given else named["hidden_states"]), with_kwargs=True)  # fmt: skip
    try:
        trunk(model, batch.rows)
    finally:
        hook.remove()
    return found[0].detach()


@pytest.mark.parametrize("kind", ["forest", "padded"])
def test_the_noise_is_uniform_within_alpha_over_the_root_of_length_and_width(kind: Any) -> None:
    model = fresh("llama").train()
    ids = torch.arange(1, 9, dtype=torch.int32)
    one = Example(ids[:3], (Completion(ids[:5]),), row=1)  # 8 tokens
    two = Example(ids[:2], (Completion(ids[:4]), Completion(ids[:6])), row=2)  # 12 in one tree, or 6 and 8
    batch = batch_of([one, two], Layout(kind, 64))
    plain, width = seen(model, batch), model.config.hidden_size
    setattr(model.get_input_embeddings(), ALPHA, 5.0)
    trees = batch.rows.tree_ids
    noise = torch.stack([seen(model, batch) - plain for _ in range(200)])
    for tree in trees[trees >= 0].unique().tolist():
        here = trees == tree
        bound = 5.0 / (int(here.sum()) * width) ** 0.5
        of_tree = noise[:, here]
        assert float(of_tree.abs().max()) == pytest.approx(bound, rel=0.02)
        assert float(of_tree.square().mean()) == pytest.approx(bound**2 / 3, rel=0.05)  # the variance of a uniform
        assert abs(float(of_tree.mean())) < bound / 50
    assert float(noise[:, trees < 0].abs().sum()) == 0


def test_only_passes_that_are_learned_from_are_noisy() -> None:
    model, batch = fresh("llama").train(), batch_of(examples(), Layout())
    plain = seen(model, batch)
    setattr(model.get_input_embeddings(), ALPHA, 5.0)
    assert not torch.equal(seen(model, batch), plain)
    with torch.no_grad():
        assert torch.equal(seen(model, batch), plain)
    assert torch.equal(seen(model.eval(), batch), plain)


def test_a_run_with_noise_differs_and_is_repeated(settings: dict[str, Any]) -> None:
    rows = make_rows("text", 12)
    losses = [
        alignkit.run("sft", **settings, data=rows, neftune_alpha=alpha).metrics["loss"] for alpha in (None, 5.0, 5.0)
    ]
    assert losses[0] != losses[1] == losses[2]


def test_a_run_that_was_killed_repeats_its_noise(settings: dict[str, Any]) -> None:
    settings |= {"data": make_rows("text", 12), "neftune_alpha": 5.0, "save_every": 2}
    whole = alignkit.run("sft", name="whole", **settings)
    with killed_before(4):
        alignkit.run("sft", name="halves", **settings)
    halves = alignkit.run("sft", name="halves", resume=True, **settings)
    losses = [[line.get("loss") for line in read_metrics(run.folder)] for run in (whole, halves)]
    assert losses[0] == losses[1]


def test_a_method_that_computes_a_ratio_has_no_noise(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"neftune_alpha is 5.0, but 'dpo' compares .* noise would make them"):
        alignkit.run("dpo", **settings, data=make_rows("pairs", 12), neftune_alpha=5.0)
