"""Memory in `alignkit recommend`: what is planned for a GPU of a given size, and what would make a run fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit import registry
from alignkit.errors import ConfigError, ModelError
from alignkit.insight.plan import Memory, Plan, Remedy
from alignkit.insight.recommend import Recommendation, fit, recommend
from alignkit.insight.recommend.fit import fitted
from helpers import make_rows, write_tiny

GIB = 2**30


def values(found: Recommendation) -> dict[str, Any]:
    return {choice.name: choice.value for choice in found.settings}


def planned(peak: float, *remedies: tuple[dict[str, Any], float]) -> Callable[..., Plan]:
    def made(settings: Any, *, limit: int, gpu: bool) -> Plan:
        assert gpu
        found = Memory({"learning": {"weights": int(peak * GIB)}}, 1, 1, 1, "full")
        tried = tuple(Remedy(change, int(size * GIB)) for change, size in remedies)
        return Plan("dpo", "one GPU", 1, 0, 1, 1, 1, None, None, found, tried, limit)

    return made


@pytest.mark.parametrize(
    ("plan", "chosen", "said"),
    [
        (planned(17.9), {}, "17.9 GiB at its peak, fits into 20 GiB"),
        (
            planned(18.1, ({"lora": 16}, 5), ({"max_tokens": 64}, 17)),
            {"max_tokens": 64},
            "the peak is 17 GiB, which fits",
        ),
        (planned(30, ({"reference": "int8"}, 9), ({"lora": 16}, 10)), {"lora": 16}, "the peak is 10 GiB, which fits"),
        (
            planned(30, ({"lora": 16}, 25), ({"lora": 16, "reference": "int8"}, 17)),
            {"lora": 16, "reference": "int8"},
            "the peak is 17 GiB, which fits",
        ),
        (planned(30, ({"lora": 16}, 25), ({"max_tokens": 64}, 29)), {"lora": 16}, "25 GiB, which is still more"),
        (planned(30), {}, "no setting that was tried needs less"),
    ],
)
def test_the_gentlest_remedy_is_taken(
    plan: Any, chosen: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "plan", plan)
    found = fitted({}, 20 * GIB)  # of which a tenth is spared
    assert {c.name: c.value for c in found.settings} == chosen
    assert said in found.sentence


def test_what_memory_asks_for_is_in_the_settings(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "plan", planned(30, ({"lora": 16}, 10)))
    found = recommend(make_rows("pairs", 1000), model=tiny, memory=20 * GIB)
    assert values(found)["lora"] == 16
    rate = next(c for c in found.settings if c.name == "learning_rate")
    assert rate.value == registry.get("dpo").lora_learning_rate
    assert rate.why.startswith("the default with adapters of dpo")
    monkeypatch.setattr(fit, "plan", planned(30, ({"sampling.batch_size": 8}, 10)))
    found = recommend(make_rows("pairs", 1000), model=tiny, memory=20 * GIB, reward="json")
    assert values(found)["sampling"] == {"max_new_tokens": 256, "batch_size": 8}


def test_a_model_that_cannot_be_planned_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Plan:
        raise ModelError("too strange")

    monkeypatch.setattr(fit, "plan", refused)
    assert fitted({}, GIB) == ("cannot be estimated: too strange", ())


@pytest.mark.slow
def test_a_real_plan_fits_with_what_it_asks_for(tmp_path: Path, write_rows: Callable[..., str]) -> None:
    write_tiny(tmp_path / "wide", hidden_size=256, intermediate_size=1024)
    data = write_rows(make_rows("pairs", 200))
    # 2 layers of 4 * 256 * 192 (keys and values have half of the heads) and 3 * 256 * 1024 numbers: weights, gradients
    # and two moments in float32 are 32 MB; with adapters the weights alone are 8
    found = recommend(data, model=str(tmp_path / "wide"), memory=30 * 10**6)
    assert found.fit is not None
    assert values(found)["lora"] == 16
    assert "more than is safe in 28.6 MiB" in found.fit.sentence


def test_every_setting_that_a_plan_offers_has_its_reason() -> None:
    from alignkit.insight.plan import remedies
    from alignkit.insight.recommend import fit

    offered = set(re.findall(r'yield \{"([\w.]+)"', Path(remedies.__file__).read_text()))
    assert "quantize" in offered
    assert offered - {"fsdp"} <= set(fit._WHY)  # fsdp is offered to several processes only


def test_memory_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="give --model as well"):
        recommend(make_rows("pairs", 60), memory=GIB)
