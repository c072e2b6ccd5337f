"""The reference of a run: which form it takes, and that no row is scored twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import alignkit
from alignkit.engine.roles import Roles
from alignkit.errors import CacheError, ConfigError, PluginError
from alignkit.models.packing import batch_of
from alignkit.models.passes import scored
from alignkit.models.scoring import Scorer, plain_logps
from alignkit.reference.cache import LogpCache
from alignkit.reference.reference import Reference
from alignkit.runs.folder import read_metrics
from alignkit.types import Completion, Example, Layout
from exact import assert_rounding_only, exact_copy
from helpers import make_rows


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each reference forward pass of the test scored."""
    seen: list[int] = []
    score = Reference._score

    def counted(self: Reference, examples: Any, *more: Any) -> torch.Tensor:
        seen.append(len(examples))
        return score(self, examples, *more)

    monkeypatch.setattr(Reference, "_score", counted)
    return seen


def example(prompt: list[int], *completions: list[int]) -> Example:
    def ids(tokens: list[int]) -> torch.Tensor:
        return torch.tensor(tokens, dtype=torch.int32)

    return Example(ids(prompt), tuple(Completion(ids(c)) for c in completions))


def test_a_second_run_with_another_method_rate_order_and_folder_asks_the_reference_nothing(
    settings: dict[str, Any], passes: list[int], tmp_path: Any
) -> None:
    rows = make_rows("pairs", 12)
    alignkit.run("dpo", data=rows, **settings)
    assert sum(passes) == 12
    passes.clear()
    other = settings | {"learning_rate": 1e-4, "output": tmp_path / "elsewhere", "seed": 5, "max_steps": 9}
    alignkit.run("ipo", data=rows[::-1], tau=0.3, **other)
    assert passes == []


def test_a_new_row_alone_is_scored(settings: dict[str, Any], passes: list[int]) -> None:
    rows = make_rows("pairs", 12)
    alignkit.run("dpo", data=rows[:-1], **settings)
    passes.clear()
    alignkit.run("dpo", data=rows, **settings)
    assert passes == [1]


@pytest.mark.parametrize(
    "changed",
    [
        {"lora": 4, "reference": "full"},
        {"reference": "int8"},
        {"precision": "bf16"},
        {"dtype": "bfloat16"},
        {"model": ""},
    ],
)
def test_another_adapter_quantisation_dtype_or_weight_misses(
    changed: dict[str, Any], settings: dict[str, Any], passes: list[int], tmp_path: Any
) -> None:
    rows = make_rows("pairs", 8)
    alignkit.run("dpo", data=rows, **settings)
    passes.clear()
    if "model" in changed:
        model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
        model.save_pretrained(tmp_path / "moved")
        changed = {"model": str(tmp_path / "moved"), "tokenizer": settings["model"]}
    alignkit.run("dpo", data=rows, **settings | changed)
    assert sum(passes) == 8


def test_fresh_adapters_share_the_cache_of_their_base(settings: dict[str, Any], passes: list[int]) -> None:
    rows = make_rows("pairs", 8)
    alignkit.run("dpo", data=rows, **settings)
    passes.clear()
    alignkit.run("dpo", data=rows, lora=4, **settings)
    assert passes == []


def test_the_mismatched_rows_of_kto_are_scored_but_not_kept(settings: dict[str, Any], passes: list[int]) -> None:
    alignkit.run("kto", data=make_rows("unpaired", 8), **settings)
    assert sum(passes) == 8 + 6 * 4  # the data once, and 4 lent answers in each of 6 steps
    with LogpCache(settings["cache_file"]) as cache:
        assert cache.info()["entries"] == 8


@pytest.mark.parametrize("form", ["full", "int8", "cached"])
def test_every_form_trains(form: str, settings: dict[str, Any]) -> None:
    result = alignkit.run("dpo", data=make_rows("pairs", 8), reference=form, **settings)
    written = read_metrics(result.folder)
    assert written[-1]["loss"] < written[0]["loss"]


@pytest.mark.parametrize("form", ["full", "adapter-off", "cached"])
def test_the_exact_forms_agree_to_the_bit(form: str, settings: dict[str, Any]) -> None:
    rows = make_rows("pairs", 8)
    settings |= {"lora": 4, "reference_cache": form == "cached"}
    plain = alignkit.run("dpo", data=rows, reference="full", **settings | {"reference_cache": False})
    other = alignkit.run("dpo", data=rows, reference=form, **settings)
    a, b = read_metrics(plain.folder)[-1], read_metrics(other.folder)[-1]
    # fresh adapters are zero, so a copy of the policy, the base, and the first policy are one model
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)


def test_cached_lets_go_of_the_model(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Reference] = []
    release = Reference.release
    monkeypatch.setattr(Reference, "release", lambda self: (release(self), kept.append(self))[0])
    alignkit.run("dpo", data=make_rows("pairs", 8), **settings)
    assert kept[0].mode == "cached"
    assert kept[0]._scorer is None
    with pytest.raises(CacheError, match=r"the cache was cleared, or failed during the run. Continue with --resume"):
        kept[0]._score([])


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("dpo", {"reference": "adapter-off"}, "adapter-off needs new adapters"),
        ("kto", {"reference": "cached"}, "'kto' cannot use reference: cached"),
        ("dpo", {"reference": "cached", "reference_cache": False}, "needs reference_cache"),
        ("dpo", {"reference": "int8", "sync_every": 2}, "moves its reference, which needs reference: full"),
    ],
)
def test_a_form_that_cannot_serve_is_refused(
    method: str, given: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        alignkit.run(method, data=make_rows("pairs", 8), **settings, **given)


def test_a_moving_reference_is_alpha_policy_and_the_rest_itself(tiny: str) -> None:
    torch.manual_seed(0)
    policy = Scorer(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    reference = Reference(
        "full", policy, layout=Layout(), device=torch.device("cpu"), max_tokens=100, cache=None,
        compute_dtype=torch.float32,
    )  # fmt: skip
    before = policy.model.lm_head.weight.detach().clone()
    with torch.no_grad():
        policy.model.lm_head.weight += 1.0
    reference.update(policy, 0.25)
    torch.testing.assert_close(reference._scorer.model.lm_head.weight, before + 0.25)


def test_scored_in_parts_keeps_the_order(tiny: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    examples = [example([5, 6], [7, 8, 9], [10]), example([11], [12]), example([13, 14, 15], [16, 17], [18, 19])]
    answers = [(torch.cat([e.prompt, c.tokens]), len(e.prompt)) for e in examples for c in e.completions]
    with torch.no_grad():
        own, exact = (torch.cat([plain_logps(m, *answer) for answer in answers]) for m in (model, exact_copy(model)))
        got = scored(Scorer(model), batch_of(examples, Layout()), max_tokens=6)
    assert_rounding_only(got, own, exact)


def test_a_role_that_was_not_declared_is_refused(tiny: str) -> None:
    import alignkit_sft

    method = alignkit_sft.SFT(alignkit_sft.SFT.Config())
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    roles = Roles(method, scorer, scorer, None, 100)
    with pytest.raises(PluginError, match=r"used the role 'reference' without declaring it"):
        roles.reference(batch_of([example([5], [6])], Layout()))
