"""Optimisers and schedules: what a step does, what the state takes, that a run resumes with it, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_engine import lines, same
from torch import nn
from transformers import AutoModelForCausalLM
from zoo import config, fresh

import alignkit
from alignkit.data.stream import learning_rate
from alignkit.engine.optimizers import SMALL, build_optimizer, matrices, state_bytes
from alignkit.errors import ConfigError
from alignkit.models.loading import load_model
from alignkit.models.scoring import Scorer
from alignkit.runs.folder import read_metrics
from helpers import killed_before, make_rows

pytest.importorskip("bitsandbytes")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw-8bit": {},
    "adafactor": {"learning_rate": 1e-2},
    "muon": {},
    "sgd": {"learning_rate": 1e-2},
    "sgd, momentum": {"learning_rate": 1e-2, "momentum": 0.9},
}


def asked(name: str) -> dict[str, Any]:
    return {"optimizer": name.split(",")[0], **OPTIMIZERS[name]}


def stepped(name: str, steps: int = 1, **settings: Any) -> tuple[Any, dict[str, torch.Tensor], list[Any]]:
    """A tiny Llama after some steps on random gradients; its weights before, and the gradients of each step."""
    scorer = Scorer(fresh("llama, tied" if settings.pop("tied", False) else "llama"))
    before = {n: p.detach().clone() for n, p in scorer.named_parameters()}
    optimizer = build_optimizer(scorer, config(**asked(name) | settings), 1e-2)
    generator, gradients = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        for p in scorer.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        gradients.append({n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None})
        optimizer.step()
    scorer.optimizer = optimizer
    return scorer, before, gradients


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "muon"])
def test_adams_epsilon_is_added_to_the_root_of_the_second_moment(name: str) -> None:
    """In the first step both moments are those of one gradient: the update is rate g / (|g| + epsilon)."""
    scorer, before, (gradients,) = stepped(name, adam_epsilon=0.5)
    inside = matrices(scorer) if name == "muon" else set()
    of_adam = {n: p for n, p in scorer.named_parameters() if id(p) not in inside}
    assert of_adam
    for n, p in of_adam.items():
        g = gradients[n].double()
        want = -1e-2 * g / (g.abs() + 0.5)
        coarse = name.endswith("8bit") and p.numel() >= SMALL
        torch.testing.assert_close(
            p.detach().double() - before[n].double(), want, rtol=0, atol=3e-4 if coarse else 1e-6
        )


def test_gradients_are_clipped_unless_the_norm_is_0(settings: dict[str, Any]) -> None:
    settings |= {"data": make_rows("pairs", 8), "max_steps": 1, "optimizer": "sgd", "learning_rate": 1e-2}
    clipped, free, far = (alignkit.run("simpo", **settings, max_grad_norm=norm) for norm in (1e-3, 0, 1e9))
    norms = [lines(r.folder)[0]["grad_norm"] for r in (clipped, free, far)]
    assert norms[0] == norms[1] == norms[2] > 1e-2
    assert same(free.model, far.model)
    start = Scorer(AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)).model.state_dict()

    def moved(result: Any) -> float:
        """The length of the update."""
        now = result.model.state_dict()
        return math.sqrt(sum(float((now[n] - start[n]).double().square().sum()) for n in start))

    assert moved(free) == pytest.approx(1e-2 * norms[1], rel=1e-3)
    assert moved(clipped) == pytest.approx(1e-2 * 1e-3, rel=1e-2)


# -------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))]),
        ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]),
        ("inverse-sqrt", [0.5, 1, *(math.sqrt(2 / n) for n in range(3, 11))]),
    ],
)
def test_schedules_by_hand(schedule: str, want: list[float]) -> None:
    got = [learning_rate(schedule, 0.2, step, 10, decay_fraction=0.3) for step in range(10)]
    assert got == pytest.approx(want, abs=1e-15)


def test_schedules_at_their_ends() -> None:
    assert [learning_rate("wsd", 0.0, s, 4, decay_fraction=1.0) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [learning_rate("wsd", 0.5, s, 4, decay_fraction=0.0) for s in range(4)] == [0.5, 1, 1, 1]
    assert learning_rate("inverse-sqrt", 0.0, 3, 4) == 0.5
    assert learning_rate("inverse-sqrt", 1.0, 3, 4) == 1


def test_a_run_follows_its_schedule(settings: dict[str, Any]) -> None:
    changes = {"schedule": "wsd", "warmup_fraction": 0.2, "decay_fraction": 0.4, "max_steps": 5}
    result = alignkit.run("sft", data=make_rows("text", 8), **settings | changes)
    assert [line["lr"] for line in read_metrics(result.folder)] == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.005])


# ------------------------------------------------------------------------------------------------------------ steps


def test_sgd_with_momentum_by_hand() -> None:
    scorer, before, (first, second) = stepped("sgd, momentum", steps=2, weight_decay=0.1)
    for name, p in scorer.named_parameters():
        decay = 0.1 if p.dim() >= 2 else 0.0
        velocity = first[name].double() + decay * before[name].double()
        want = before[name].double() - 0.01 * velocity
        velocity = 0.9 * velocity + second[name].double() + decay * want
        want = want - 0.01 * velocity
        torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=1e-6)


def test_adafactors_first_step_by_hand() -> None:
    scorer, before, (gradient,) = stepped("adafactor")
    for name, p in scorer.named_parameters():
        g, w = gradient[name].double(), before[name].double()
        square = g * g
        if p.dim() == 2:  # at the first step the means are those of this gradient
            square = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
        update = g / square.sqrt()
        update = update / max(1.0, float(update.norm()) / math.sqrt(update.numel()))
        size = max(1e-3, float(w.norm()) / math.sqrt(w.numel()))  # a rate relative to the weights
        torch.testing.assert_close(p.detach().double(), w - 0.01 * size * update, rtol=0, atol=2e-6)


def test_8_bit_adamw_moves_as_adamw_does_but_for_rounding_of_its_state() -> None:
    exact, before, _ = stepped("adamw", steps=4)
    rounded, _, _ = stepped("adamw-8bit", steps=4)
    large = 0
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        moved, off = (p - before[name]).abs().mean(), (p - q).abs().mean()
        assert float(off.detach()) < 0.05 * float(moved.detach()), name
        state = rounded.optimizer.state[q]
        assert state["state1"].dtype == (torch.uint8 if q.numel() >= 4096 else torch.float32)
        large += q.numel() >= 4096
    assert large == 2  # embeddings and head
    assert any(not torch.equal(p, q) for p, q in zip(exact.parameters(), rounded.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_muon_makes_updates_of_matrices_orthogonal_and_leaves_the_rest_to_adamw(tied: bool) -> None:
    scorer, before, (gradient,) = stepped("muon", tied=tied)
    plain, _, _ = stepped("adamw", tied=tied)
    by_muon = 0
    for (name, p), q in zip(scorer.named_parameters(), plain.parameters(), strict=True):
        if "embed" in name or "lm_head" in name or p.dim() == 1:
            assert torch.equal(p, q), name
            continue
        by_muon += 1
        update = (before[name] - p.detach()).double() / (0.01 * 0.2 * math.sqrt(max(p.shape)))
        left, values, right = torch.linalg.svd(gradient[name].double(), full_matrices=False)
        sizes = (left.T @ update @ right.T).diagonal()  # five steps of the iteration leave them around 1
        large = sizes[values > values[0] / 10]  # but for the smallest
        assert 0.6 < float(large.min()) <= float(sizes.max()) < 1.3, name
        assert float((update - left @ torch.diag(sizes) @ right).abs().max()) < 0.05, name
    assert by_muon == 3 * 7


def test_muon_takes_the_factors_of_adapters_and_no_head_of_one_row() -> None:
    from alignkit.lora_settings import LoraSettings
    from alignkit.models.adapters import add_lora
    from alignkit.models.values import ActorCritic, value_head

    model = add_lora(fresh("llama"), LoraSettings(r=2, target_modules=["q_proj", "lm_head"]))
    both = ActorCritic(Scorer(model), value_head(model))
    names = {n for n, p in both.named_parameters() if id(p) in matrices(both)}
    assert names == {n for n, p in both.named_parameters() if "q_proj.lora_" in n}


# ----------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("lora", [None, 16])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    name: str, lora: int | None, settings: dict[str, Any]
) -> None:
    settings |= {"data": make_rows("pairs", 4), "save_every": 2, "max_steps": 4, "lora": lora, "learning_rate": 1e-3}
    settings |= asked(name)
    whole = alignkit.run("dpo", name="whole", **settings)
    with killed_before(3):
        alignkit.run("dpo", name="halves", **settings)
    halves = alignkit.run("dpo", name="halves", resume=True, **settings)
    assert lines(halves.folder) == lines(whole.folder)
    assert same(halves.model, whole.model)
    losses = [line["loss"] for line in read_metrics(whole.folder)]
    assert losses[-1] < losses[0]


def test_the_critic_keeps_its_own_rate_under_muon(settings: dict[str, Any]) -> None:
    rows = [{"prompt": r["prompt"]} for r in make_rows("text", 4)]
    changes = {"optimizer": "muon", "critic_learning_rate": 3e-3, "max_steps": 1, "sampling": {"max_new_tokens": 4}}
    from alignkit.engine.phases import Run

    reward = lambda completions, **_: [float(len(c)) for c in completions]  # noqa: E731
    run = Run("ppo", data=rows, reward=reward, **settings | changes)
    run.read()
    groups = run.build().parts.optimizer.param_groups
    assert sorted({g["rate_scale"] for g in groups}) == pytest.approx([0.3, 1.0])
    run.loop.train()
    assert {round(g["lr"], 9) for g in groups} == {0.01, 0.003}


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bytes_of_the_state_are_those_that_it_takes(name: str) -> None:
    scorer, _, _ = stepped(name)
    small = 0  # numbers of each tensor: step counts, and the tables that 8-bit states are read with
    held = 0
    for values in scorer.optimizer.state.values():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                n = value.nbytes
                small, held = (small + n, held) if key == "step" or "qmap" in key else (small, held + n)
    assert held == state_bytes(scorer, config(**asked(name)))
    assert (held == 0) == (name == "sgd")


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd", "learning_rate": None}, "sgd needs learning_rate: the methods' defaults are for AdamW"),
        ({"optimizer": "adafactor", "learning_rate": None}, "optimizer: adafactor needs learning_rate"),
        ({"momentum": 0.9}, "momentum is for optimizer: sgd or muon, not adamw; remove it"),
        ({"optimizer": "muon", "fsdp": True}, "muon needs whole matrices, which fsdp shards; use adamw or sgd"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"schedule": "wsd", "warmup_fraction": 0.6, "decay_fraction": 0.6}, "are more than 1 together; lower one"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(changes: dict[str, Any], message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        alignkit.run("dpo", data=make_rows("pairs", 8), **settings | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_paged_optimiser_needs_a_gpu() -> None:
    module = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"moves states between the memories of GPU and CPU.*use adamw-8bit"):
        build_optimizer(module, config(optimizer="paged-adamw-8bit"), 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_paged_optimiser_moves_as_the_8_bit_one_does(tiny: str) -> None:
    found = []
    for name in ("adamw-8bit", "paged-adamw-8bit"):
        model, _ = load_model(config(model=tiny), torch.device("cuda"))
        optimizer = build_optimizer(model, config(optimizer=name), 1e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.device)
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
