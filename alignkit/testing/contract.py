"""Checks of what a method declares: its settings, its roles, its purity, what it must not change."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from alignkit.config import read_yaml, split, write_yaml
from alignkit.engine.averages import Averages, counts, term_sums
from alignkit.errors import ConfigError, PluginError
from alignkit.plugin_checks import check_class
from alignkit.testing.bench import Bench
from alignkit.testing.models import TinyModels
from alignkit.testing.suite import Suite
from alignkit.types import Batch, Term


class ContractChecks(Suite):
    """The part of the suite that checks the contract."""

    def test_declaration(self, config: dict[str, Any]) -> None:
        """The registry accepts the class, and every setting has a description."""
        cls = self.method
        check_class(cls)
        assert cls.name.islower(), f"users type the name: '{cls.name}' should be lower case"
        assert set(cls.trains) <= cls.uses, f"trains = {cls.trains} has roles that are not in uses = {set(cls.uses)}"
        assert cls.learning_rate > 0
        assert cls.lora_learning_rate > 0
        undescribed = [n for n, f in cls.Config.model_fields.items() if not (f.description or "").strip()]
        assert not undescribed, f"settings without a description: {undescribed}"

    def test_config_round_trip(self, config: dict[str, Any], tmp_path: Any) -> None:
        """Settings survive Python, JSON and YAML, and cannot be changed afterwards."""
        made = self.method.Config(**config)
        assert self.method.Config(**made.model_dump()) == made
        assert self.method.Config(**json.loads(json.dumps(made.model_dump(mode="json")))) == made
        run = {"method": self.method.name, "model": "m", "data": "d"}
        write_yaml(tmp_path / "config.yaml", {**run, **made.model_dump(mode="json")})
        assert split(read_yaml(tmp_path / "config.yaml"), self.method.Config)[1] == made
        for name in self.method.Config.model_fields:
            with pytest.raises(ValidationError):
                setattr(made, name, getattr(made, name))

    def test_unknown_settings_are_refused(self, config: dict[str, Any]) -> None:
        """A misspelt key is an error, in Python and in a file."""
        with pytest.raises(ValidationError):
            self.method.Config(**{**config, "no_such_setting": 1})
        with pytest.raises(ConfigError, match="no_such_setting"):
            split({"method": self.method.name, "model": "m", "data": "d", "no_such_setting": 1}, self.method.Config)

    def test_roles(self, config: dict[str, Any]) -> None:
        """The method uses only declared roles, and the reference changes its terms if it is declared."""
        bench = Bench(self.made(config))
        try:
            (batch,) = bench.collect(self.examples())
            terms = bench.method.loss(batch, bench.models)
        except (PluginError, KeyError) as error:
            pytest.fail(f"uses = {set(self.method.uses)} does not cover the roles that the method uses: {error}")
        if "reference" not in bench.method.roles():
            return
        other = Bench(self.made(config))
        other.models.reference_scorer = other.models.policy_scorer
        (moved,) = other.collect(self.examples())
        changed = other.method.loss(moved, other.models)
        same = all(torch.equal(t.value, changed[n].value) for n, t in terms.items() if n in changed)
        assert not same, "uses has 'reference', but another reference changes no term"

    def test_loss_is_pure(self, config: dict[str, Any]) -> None:
        """The same batch gives the same bits, and nothing else changes."""
        bench = Bench(self.made(config))
        (batch,) = bench.collect(self.examples())
        before = _kept(bench.method), _bits_of_batch(batch)
        with _untouched(bench.models):
            first = bench.method.loss(batch, bench.models)
            again = bench.method.loss(batch, bench.models)
        changed = _changed(before[0], bench.method)
        assert not changed, f"loss keeps state in self: {changed}"
        assert _bits_of_batch(batch) == before[1], "loss changes the batch"
        assert first.keys() == again.keys(), "loss returns other terms in a second call"
        for name, term in first.items():
            assert isinstance(term, Term), f"'{name}' is a {type(term).__name__}, not a Term"
            assert torch.equal(term.value, again[name].value), f"'{name}' differs in a second call of loss"

    def test_collect(self, config: dict[str, Any]) -> None:
        """`collect` attaches no gradient, trains nothing, draws only from ctx.generator, and keeps the examples."""
        bench = Bench(self.made(config))
        examples = self.examples()
        state, kept = json.loads(json.dumps(bench.method.state_dict())), _kept(bench.method)
        with _untouched(bench.models):
            (batch,) = bench.collect(examples)
            changed = _changed(kept, bench.method)
            bench.method.load_state_dict(state)
            (again,) = bench.collect(examples)
        prompts = [(e.row, _raw(e.prompt)) for e in batch.examples]
        assert prompts == [(e.row, _raw(e.prompt)) for e in examples], "collect changes the order of the prompts"
        numbers = {**batch.per_example, **batch.per_completion, **batch.per_token}
        assert not [n for n, v in numbers.items() if v.requires_grad], "collect attached numbers with a gradient"
        for name, value in numbers.items():
            if not torch.equal(value, again[name]) and changed:
                pytest.fail(
                    f"collect changes {changed}, which '{name}' depends on and load_state_dict(state_dict()) does not "
                    "restore; a resumed run would differ"
                )
            assert torch.equal(value, again[name]), f"'{name}' uses randomness that is not from ctx.generator"

    def test_evaluation_changes_no_state(self, config: dict[str, Any]) -> None:
        """While held-out rows are evaluated, `collect` changes nothing of the method."""
        bench, examples = Bench(self.made(config)), self.examples()
        ctx, kept = bench.context(examples), _kept(bench.method)
        ctx.training = False
        with torch.no_grad():
            bench.method.collect(ctx.shard(examples), ctx)
        changed = _changed(kept, bench.method)
        assert not changed, f"collect changes {changed} while ctx.training is False: an evaluation would change the run"

    def test_frozen_roles_stay(self, config: dict[str, Any]) -> None:
        """A whole training step changes the policy and no bit of a frozen weight."""
        bench = Bench(self.made(config))
        examples = self.examples()
        policy, reference = bench.models.trained, bench.models.reference_scorer
        before_policy, before_reference = _bits(policy), _bits(reference)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        ctx = bench.context(examples)
        with torch.no_grad():
            batch = bench.method.collect(ctx.shard(examples), ctx)
        denominators, averages = counts(batch, lambda t: t), Averages()
        averages.expect(denominators)
        summed = term_sums(bench.method, batch, bench.models)
        averages.add(summed)
        summed.loss_share(denominators).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        metrics = averages.means(lambda t: t) | {"grad_norm": float(norm)} | ctx.logged  # as in a run
        bench.method.after_update(ctx, metrics)
        assert _bits(reference) == before_reference, "a training step changed the reference"
        assert all(p.grad is None for p in reference.parameters()), "the reference got a gradient"
        assert _bits(policy) != before_policy, "a training step did not change the policy"
        if ctx.moved:
            assert bench.method.reference_need() == "moving", "update_reference needs reference_need() == 'moving'"

    def test_state_round_trip(self, config: dict[str, Any]) -> None:
        """The method's state in a checkpoint is JSON, and is equal when it is loaded."""
        method = self.made(config)
        state = json.loads(json.dumps(method.state_dict()))
        fresh = self.made(config)
        fresh.load_state_dict(state)
        assert fresh.state_dict() == method.state_dict()


def _kept(method: Any) -> dict[str, Any]:
    """Return a copy of the method's attributes, and of the attributes of objects in them."""
    kept = {k: v if isinstance(v, Tensor) else getattr(v, "__dict__", v) for k, v in vars(method).items()}
    return copy.deepcopy(kept)


def _changed(before: dict[str, Any], method: Any) -> str:
    """Return the attributes that are no longer as they were, as "self.a, self.b", or ""."""
    now = _kept(method)
    return ", ".join(f"self.{n}" for n in sorted({*before, *now}) if _plain(before.get(n)) != _plain(now.get(n)))


def _plain(value: Any) -> Any:
    """Return a value in a form that is equal where the value is: tensors as bytes, objects as their attributes."""
    if isinstance(value, Tensor):
        return _raw(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    attributes = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    return value if attributes is None else {name: _plain(one) for name, one in attributes.items()}


@contextmanager
def _untouched(models: TinyModels) -> Iterator[None]:
    """Fail if weights, their gradients, or a global random generator change."""
    scorers = {"trained model": models.trained, "reference": models.reference_scorer}
    before = {name: _bits(s) for name, s in scorers.items()}
    drawn = _generators()
    yield
    for name, scorer in scorers.items():
        assert _bits(scorer) == before[name], f"the {name}'s weights were changed"
        assert all(p.grad is None for p in scorer.parameters()), f"the {name} got a gradient"
    assert _generators() == drawn, "a global random generator was used; draw from ctx.generator in collect"


def _generators() -> tuple[Any, ...]:
    numpy_state = np.random.get_state(legacy=True)
    return _raw(torch.get_rng_state()), str(numpy_state), random.getstate()


def _bits(module: torch.nn.Module) -> dict[str, bytes]:
    return {n: _raw(t) for n, t in module.state_dict().items()}


def _bits_of_batch(batch: Batch) -> tuple[Any, ...]:
    numbers = {**batch.per_example, **batch.per_completion, **batch.per_token}
    tokens = [_raw(t) for e in batch.examples for t in (e.prompt, *(c.tokens for c in e.completions))]
    rows = batch.rows
    read = [_raw(t) for t in (rows.input_ids, rows.position_ids, rows.predict_at, batch.targets, batch.cu_seqlens)]
    return {n: _raw(v) for n, v in numbers.items()}, tokens, read, [dict(e.numbers) for e in batch.examples]


def _raw(t: Tensor) -> bytes:
    return bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
