"""The conformance kit finds what it promises to find: one broken method for each check."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn.functional import logsigmoid

import alignkit.testing
from alignkit import Batch, Method, MethodConfig, Term, pair_metrics
from alignkit.errors import PluginError
from alignkit.testing import Conformance, log_sigmoid
from alignkit.testing.suite import applies
from alignkit_kernels import preference_loss, sequence_sum

pytest_plugins = ("pytester",)


class Sound(Method["Sound.Config"]):
    """DPO without options: each test below breaks one thing about it."""

    name = "sound"
    data = "pairs"
    uses = frozenset({"policy", "reference"})

    class Config(MethodConfig):
        beta: float = Field(0.1, gt=0, description="scale")

    def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
        logps_C = models.policy(batch).logps
        out = preference_loss(logps_C, batch.reference_logps, batch.cu_seqlens, beta=self.config.beta)
        return {"sound": Term(out.losses), **pair_metrics(batch, logps_C, out.rewards)}


def check(method: type[Method[Any]], name: str, **arguments: Any) -> None:
    """Run one check of the kit on a method."""

    class Checks(Conformance):
        def expected(self, config: Any, row: Any) -> float:
            return -log_sigmoid(config.beta * (row.chosen.h - row.rejected.h))

    Checks.method = method
    getattr(Checks(), name)({}, **arguments)


def fails(method: type[Method[Any]], name: str, match: str, **arguments: Any) -> None:
    with pytest.raises((AssertionError, PluginError, pytest.fail.Exception), match=match):
        check(method, name, **arguments)


def checks_of(method: type[Method[Any]]) -> list[str]:
    return sorted(n for n in dir(Conformance) if n.startswith("test_") and applies(getattr(Conformance, n), method))


CHECKS = checks_of(Sound)


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_method_passes(name: str, tmp_path: Path) -> None:
    needs_folder = name in ("test_config_round_trip", "test_resume_full", "test_resume_lora", "test_bf16")
    check(Sound, name, **({"tmp_path": tmp_path} if needs_folder else {}))


def test_wrong_formula() -> None:
    class Doubled(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            terms = super().loss(batch, models)
            return {**terms, "sound": Term(2 * terms["sound"].value)}

    fails(Doubled, "test_expected_values", "by hand")


def test_average_taken_in_the_loss() -> None:
    class Averages(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            return {"sound": Term(super().loss(batch, models)["sound"].value.mean())}

    fails(Averages, "test_micro_batches", r"must be \[7\]")


def test_batch_statistic_in_the_loss() -> None:
    class Centred(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            h_S = sequence_sum(models.policy(batch).logps - batch.reference_logps, batch.cu_seqlens)
            gap = h_S[0::2] - h_S[1::2]
            return {"sound": Term(-logsigmoid(gap - gap.mean()))}

    fails(Centred, "test_micro_batches", "depends on the micro-batches")
    fails(Centred, "test_ranks", "depends on the number of ranks")


def test_statistic_of_one_rank_in_collect() -> None:
    class OwnRank(Sound):
        def collect(self, batch: Batch, ctx: Any) -> Batch:
            h_S = sequence_sum(ctx.models.policy(batch).logps, batch.cu_seqlens)
            return batch.attach(per_example={"centre": h_S.mean().expand(len(batch))})

        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            h_S = sequence_sum(models.policy(batch).logps, batch.cu_seqlens)
            return {"sound": Term((h_S[0::2] - batch["centre"]) ** 2)}

    check(OwnRank, "test_micro_batches")
    fails(OwnRank, "test_ranks", "depends on the number of ranks")


def test_dependence_on_the_place_in_the_batch() -> None:
    class First(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            weight = torch.arange(1.0, len(batch) + 1)
            return {"sound": Term(super().loss(batch, models)["sound"].value * weight)}

    fails(First, "test_row_order", "depends on the order of rows")


def test_dependence_on_the_layout() -> None:
    class Peeks(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            return {"sound": Term(super().loss(batch, models)["sound"].value * batch.rows.input_ids.numel())}

    fails(Peeks, "test_layout", "depends on the layout")
    fails(Peeks, "test_row_width", "depends on the width of rows")


def test_undeclared_role() -> None:
    class Forgets(Sound):
        uses = frozenset({"policy"})

    fails(Forgets, "test_roles", "does not cover")


def test_role_declared_in_vain() -> None:
    class Vain(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            return {"sound": Term(-sequence_sum(models.policy(batch).logps, batch.cu_seqlens)[0::2])}

    fails(Vain, "test_roles", "another reference changes no term")


def test_state_kept_by_the_loss() -> None:
    class Counts(Sound):
        calls = 0

        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            self.calls += 1
            return super().loss(batch, models)

    fails(Counts, "test_loss_is_pure", "keeps state")


def test_randomness_in_the_loss() -> None:
    class Noisy(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            return {"sound": Term(super().loss(batch, models)["sound"].value * random.random())}

    fails(Noisy, "test_loss_is_pure", "generator was used")


def test_batch_changed_by_the_loss() -> None:
    class Writes(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            batch.reference_logps.mul_(0.5)
            return super().loss(batch, models)

    fails(Writes, "test_loss_is_pure", "changes the batch")


def test_gradient_out_of_collect() -> None:
    class Leaks(Sound):
        def collect(self, batch: Batch, ctx: Any) -> Batch:
            with torch.enable_grad():
                return batch.attach(per_token={"old_logps": ctx.models.policy(batch).logps})

    fails(Leaks, "test_collect", "with a gradient")


def test_global_generator_in_collect() -> None:
    class Draws(Sound):
        def collect(self, batch: Batch, ctx: Any) -> Batch:
            return batch.attach(per_example={"noise": torch.rand(len(batch))})

    fails(Draws, "test_collect", "generator was used")


def test_infinite_loss() -> None:
    class Naive(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            h_S = sequence_sum(models.policy(batch).logps - batch.reference_logps, batch.cu_seqlens)
            return {"sound": Term(-torch.log(torch.sigmoid(h_S[0::2] - h_S[1::2])))}

    fails(Naive, "test_extreme_log_probabilities", "not finite for 1 tokens, policy")
    fails(Naive, "test_extreme_rows", "not finite")


def test_infinite_gradient_of_a_finite_loss() -> None:
    class Root(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            mean_S = sequence_sum(models.policy(batch).logps, batch.cu_seqlens, mean=True)
            return {"sound": Term((-mean_S[0::2]).clamp(min=0).sqrt())}

    fails(Root, "test_extreme_log_probabilities", "gradient is not finite at a log-probability of")


def test_frozen_weights_touched() -> None:
    class Trains(Sound):
        def after_update(self, ctx: Any, metrics: Any) -> None:
            with torch.no_grad():
                next(ctx.models.reference_scorer.parameters()).add_(1.0)

    fails(Trains, "test_frozen_roles_stay", "changed the reference")


def test_reference_moved_without_saying() -> None:
    class Moves(Sound):
        def after_update(self, ctx: Any, metrics: Any) -> None:
            ctx.update_reference(0.5)

    fails(Moves, "test_frozen_roles_stay", "reference_need")


def test_ties_that_count_as_losses() -> None:
    class Strict(Sound):
        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            terms = super().loss(batch, models)
            won = (terms["rewards/margin"].value > 0).float()
            return {**terms, "rewards/accuracy": Term(won, coef=0.0)}

    fails(Strict, "test_ties_count_half", "0.0")


def test_setting_without_description() -> None:
    class Mute(Sound):
        class Config(MethodConfig):
            beta: float = 0.1

    fails(Mute, "test_declaration", "without a description")


def test_settings_that_take_anything(tmp_path: Path) -> None:
    class Loose(Sound):
        class Config(MethodConfig):
            model_config = ConfigDict(extra="allow", frozen=False)
            beta: float = Field(0.1, description="scale")

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(Loose, "test_unknown_settings_are_refused")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(Loose, "test_config_round_trip", tmp_path=tmp_path)
    assert issubclass(MethodConfig, BaseModel)


def test_state_missing_from_the_checkpoint(tmp_path: Path) -> None:
    class Adapts(Sound):
        weight = 1.0

        def after_update(self, ctx: Any, metrics: Any) -> None:
            self.weight += 0.5

        def loss(self, batch: Batch, models: Any) -> dict[str, Term]:
            terms = super().loss(batch, models)
            return {**terms, "sound": Term(terms["sound"].value * self.weight)}

    class Remembers(Adapts):
        def state_dict(self) -> dict[str, Any]:
            return {"weight": self.weight}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.weight = state["weight"]

    fails(Adapts, "test_resume_full", "weights differ|assert", tmp_path=tmp_path / "forgetful")
    check(Remembers, "test_resume_full", tmp_path=tmp_path / "mindful")


SUITE = """
    from pydantic import Field
    from alignkit import Method, MethodConfig, Term
    from alignkit.testing import *

    class Plain(Method):
        name = "plain"
        data = "text"
        class Config(MethodConfig):
            scale: float = Field(1.0, description="scale")
        def loss(self, batch, models):
            return {"nll": Term(-self.config.scale * models.policy(batch).logps, over="tokens")}

    class TestPlain(Conformance):
        method = Plain
        configs = ({}, {"scale": 2.0})
        expected_failures = {FAILURES}
        def expected_step(self, c, rows, bench):
            logps = [p for row in rows for p in row.only.policy]
            return -WRONG * c.scale * sum(logps) / len(logps)
"""


def outcomes(pytester: pytest.Pytester, failures: str, wrong: str = "1") -> dict[str, int]:
    pytester.makepyfile(SUITE.replace("{FAILURES}", failures).replace("WRONG", wrong))
    return pytester.runpytest_inprocess("-k", "expected_values or layout", "-p", "no:xdist").parseoutcomes()


def test_every_configuration_goes_through_every_check(pytester: pytest.Pytester) -> None:
    class Text(Sound):
        data = "text"

    assert outcomes(pytester, "{}") == {"passed": 4, "deselected": 2 * (len(checks_of(Text)) - 2)}


def collected(cls: type[Conformance]) -> set[str]:
    return {n for n in dir(cls) if n.startswith("test_") and callable(getattr(cls, n))}


def test_only_the_checks_that_apply_are_collected_and_a_subclass_has_those_of_its_own_method() -> None:
    class Prompts(Sound):
        data = "prompts"

    class OfPairs(Conformance):
        method = Sound

    class OfPrompts(OfPairs):
        method = Prompts

    class Later(Conformance):
        pass

    class OfPairsAgain(OfPrompts):
        method = Sound

    assert collected(OfPairs) == collected(OfPairsAgain) == set(CHECKS)
    assert collected(OfPrompts) == set(checks_of(Prompts))
    assert not set(checks_of(Prompts)) <= set(CHECKS)
    assert collected(Later) == collected(Conformance)


def test_a_check_that_does_not_apply_to_a_method_set_later_does_not_run(pytester: pytest.Pytester) -> None:
    late = SUITE.replace("        method = Plain\n", "") + "\n    TestPlain.method = Plain\n"
    pytester.makepyfile(late.replace("{FAILURES}", "{}").replace("WRONG", "1"))
    found = pytester.runpytest_inprocess("-k", "kl_is_unbiased or layout", "-p", "no:xdist").parseoutcomes()
    assert (found["passed"], found.get("failed", 0), found["skipped"]) == (2, 0, 1)


def test_declared_failure_is_tolerated(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, '{"test_expected_values": "the formula is another"}', wrong="3")
    assert (found["passed"], found["xfailed"]) == (2, 2)


def test_declared_failure_that_passes_is_an_error(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, '{"test_expected_values[scale=2.0]": "it was broken once"}')
    assert (found["passed"], found["failed"]) == (3, 1)


def test_declared_failure_must_name_a_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE.replace("{FAILURES}", '{"test_lay_out": "misspelt"}').replace("WRONG", "1"))
    pytester.runpytest_inprocess("-p", "no:xdist").stdout.fnmatch_lines(["*unknown checks ?'test_lay_out'?*"])


def test_public_names() -> None:
    assert alignkit.testing.__all__ == sorted(alignkit.testing.__all__, key=str)
    assert all(hasattr(alignkit.testing, n) for n in alignkit.testing.__all__)
