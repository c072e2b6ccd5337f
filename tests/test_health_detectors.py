"""The detectors: each raises its alarm on a planted history, at the limit and not before, and none on healthy ones."""

from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit import Alarm, registry
from alignkit.alarms import ALARMS, Health
from alignkit.config import RunConfig
from alignkit.insight.health import Monitor, detectors
from alignkit.insight.health.alarm_messages import DETECTORS
from alignkit.insight.health.completion_stats import dead_groups, repetition, same_opening, spreads, words
from alignkit.insight.health.history import History
from alignkit.insight.health.monitor import held_out
from alignkit.rollout_settings import Rollout, Sampling

STEPS = 60
OFFLINE = ("dpo", "ipo", "kto", "bco", "orpo", "simpo", "cpo")
Change = Callable[[int, dict[str, float], list[dict[str, Any]]], None]


def online_line(step: int, rng: random.Random) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """A line as GRPO and PPO log it on the demo's task: the reward rises from 0.7 to 0.9, the KL to 1."""
    part = min(step / 40, 1)
    words = ("the", "fox", "owl", "eats", "moss", "lives", "there", "red", "king", "hill")
    rows = [
        {"step": step, "training": True, "row": prompt, "completion": " ".join(rng.choices(words, k=8)), "number": i,
         "reward": float(rng.random() < 0.7 + 0.2 * part), "reward/right": float(rng.random() < 0.7 + 0.2 * part)}
        for prompt in range(8) for i in range(4)
    ]  # fmt: skip
    rewards = [r["reward"] for r in rows]
    metrics = {
        "kl": part + rng.gauss(0, 0.1), "entropy": 0.09 - 0.03 * part, "clip_fraction": 0.05 + rng.random() / 20,
        "grad_norm": rng.lognormvariate(0, 0.5), "completion/length": 15 - 4 * part + rng.gauss(0, 0.5),
        "completion/eos_rate": 1 - rng.random() / 20, "completion/distinct_2": 0.07 + 0.02 * part,
        "reward/mean": statistics.fmean(rewards), "reward/std": statistics.pstdev(rewards),
        "reward/right/mean": statistics.fmean(r["reward/right"] for r in rows),
        "value": 0.3 + rng.random() / 5, "value/explained_variance": 0.1 + rng.gauss(0, 0.1),
        "lr": 1e-4 * min(step / 6, 1), "rollout/kl": 0.001 + 0.001 * part,
    }  # fmt: skip
    return metrics, rows


def offline_line(step: int, rng: random.Random) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """A line as DPO logs it: the margin grows, mostly because the rejected answers become less likely."""
    part = step / STEPS
    length = 11 + rng.gauss(0, 0.5)
    metrics = {
        "loss": 0.69 - 0.5 * part, "kl": 7 * part, "logps/chosen": length * (-0.07 - 0.08 * part),
        "logps/rejected": -1 - 17 * part, "length/chosen": length, "length/rejected": 10.0,
        "rewards/margin": 1.6 * part, "grad_norm": rng.lognormvariate(0, 0.4), "lr": 1e-4 * min(step / 6, 1),
    }  # fmt: skip
    return metrics, []


def history(
    line: Callable[..., Any], change: Change | None = None, seed: int = 0, steps: int = STEPS, **limits: Any
) -> list[tuple[int, Alarm]]:
    """The alarms of a made-up run, each name once."""
    rng, found = random.Random(seed), dict[str, tuple[int, Alarm]]()
    settings = {"reward": [{"use": "numeric", "name": "right", "weight": 0}], "beta": 0.1}
    monitor = Monitor(Health(**limits), settings)
    for step in range(1, steps + 1):
        metrics, rows = line(step, rng)
        if change:
            change(step, metrics, rows)
        for alarm in monitor.see(step, metrics, rows):
            found.setdefault(alarm.name, (step, alarm))
    return list(found.values())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("line", [online_line, offline_line])
def test_healthy_histories_raise_nothing(line: Any, seed: int) -> None:
    assert history(line, seed=seed) == []


def sets(**values: Any) -> Change:
    """A change of metrics (with "__" for "/"): numbers, or functions of the step."""

    def change(step: int, metrics: dict[str, float], rows: list[dict[str, Any]]) -> None:
        metrics.update({k.replace("__", "/"): v(step) if callable(v) else v for k, v in values.items()})

    return change


def rising(step: int, metrics: dict[str, float], rows: list[dict[str, Any]]) -> None:
    metrics["reward/mean"] = 0.3 + 0.01 * step


def together(*changes: Change) -> Change:
    def change(*given: Any) -> None:
        for one in changes:
            one(*given)

    return change


def writes(text: str) -> Change:
    def change(step: int, metrics: dict[str, float], rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if step > 20:
                row["completion"] = text.format(row["row"], row["number"])

    return change


def scores(name: str, value: Callable[[int, dict[str, Any]], float]) -> Change:
    def change(step: int, metrics: dict[str, float], rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row[name] = value(step, row)
        metrics[f"{name}/mean"] = statistics.fmean(row[name] for row in rows)

    return change


PLANTED: list[tuple[str, Any, Change]] = [
    ("kl_high", online_line, sets(kl=lambda step: step / 2)),
    ("kl_high", offline_line, sets(kl=lambda step: step / 2)),
    ("kl_low", online_line, sets(kl=1e-4)),
    ("kl_low", offline_line, sets(kl=1e-9)),
    ("reward_kl", online_line, together(rising, sets(kl=lambda step: step / 5))),
    ("reward_length", online_line, together(rising, sets(completion__length=lambda step: 15 + step))),
    ("reward_held_out", online_line, together(rising, scores("reward/right", lambda s, r: (r["number"] % 2) - s / 60))),
    ("distinct", online_line, sets(completion__distinct_2=lambda step: 0.07 if step < 20 else 0.02)),
    ("entropy", online_line, sets(entropy=lambda step: 0.09 * 0.9**step)),
    ("repetition", online_line, writes("{0} {1} red red red red red red red red red red")),
    ("opening", online_line, writes("What a lovely question, {0} {1}")),
    ("displacement", offline_line, sets(logps__chosen=lambda step: -1.0 - step / 10)),
    ("displacement", offline_line, sets(logratios__chosen=lambda s: -s / 90, logratios__rejected=lambda s: -s / 40)),
    ("same_reward", online_line, sets(reward__mean=0.1, reward__std=3e-9)),
    ("zero_variance", online_line, scores("reward", lambda step, row: 0.5)),
    ("zero_variance", online_line, scores("reward", lambda step, row: float(step == 1 and row["number"] == 0))),
    ("clip_fraction", online_line, sets(clip_fraction=lambda step: step / 60)),
    ("value_loss", online_line, sets(value=lambda step: 0.3 * 1.2**step)),
    ("explained_variance", online_line, sets(value__explained_variance=lambda step: -step / 30)),
    ("grad_spike", online_line, sets(grad_norm=lambda step: 40.0 if step == 33 else 1 + step % 3)),
    ("truncation", online_line, sets(completion__eos_rate=lambda step: 1 - step / 100)),
    ("mismatch", online_line, sets(rollout__kl=lambda step: 0.0005 * 1.2**step)),
]


@pytest.mark.parametrize(("name", "line", "change"), PLANTED, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(PLANTED)])
def test_a_planted_failure_raises_its_alarm_with_step_value_and_limit(name: str, line: Any, change: Change) -> None:
    found = {alarm.name: (step, alarm) for step, alarm in history(line, change)}
    assert name in found
    step, alarm = found[name]
    assert alarm.message.startswith(f"step {step}: ")
    assert alarm.limit == getattr(Health(), name)
    assert not {"{", "}"} & set(alarm.message + alarm.remedy)
    assert "`" in alarm.remedy
    assert name not in [alarm.name for _, alarm in history(line, change, **{name: None})]  # switched off


def test_every_alarm_has_a_planted_failure_a_detector_and_a_limit() -> None:
    assert [d.name for d in DETECTORS] == list(ALARMS)
    assert {name for name, *_ in PLANTED} == set(ALARMS)


def test_the_page_has_every_alarm_with_its_limit() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/health.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([-\d.]+) \|$", page.split("## Alarms")[1].split("##")[0], re.MULTILINE)
    assert {name: float(limit) for name, limit in rows} == {name: getattr(Health(), name) for name in ALARMS}
    assert [name for name, _ in rows] == list(ALARMS)


# -------------------------------------------------------------------------------------------- limits, by hand


def alarms(lines: Sequence[dict[str, Any]], **limits: Any) -> list[tuple[int, str, float]]:
    """What is wrong at each line of a history, with a window of 2."""
    monitor, given = Monitor(Health(window=2, **limits)), [dict(line) for line in lines]
    return [(i, a.name, a.value) for i, line in enumerate(given, 1) for a in monitor.see(i, line)]


def test_the_mean_of_the_window_is_held_to_the_limit() -> None:
    assert alarms([{"kl": v} for v in (40, 0, 15, 15, 16, 15)]) == [(1 + 1, "kl_high", 20.0), (5, "kl_high", 15.5),
                                                                    (6, "kl_high", 15.5)]  # fmt: skip
    assert alarms([{"clip_fraction": v} for v in (0.125, 0.25, 0.25, 0.5)]) == [(4, "clip_fraction", 0.375)]
    assert alarms([{"completion/eos_rate": v} for v in (0.875, 1, 0.875, 0.75)]) == [(4, "truncation", 0.1875)]
    assert alarms([{"rollout/kl": v} for v in (0.03125, 0.0625, 0.03125, 0.125)]) == [(4, "mismatch", 0.078125)]


def test_a_change_is_looked_at_when_two_windows_are_behind_it() -> None:
    assert alarms([{"entropy": v} for v in (1, 1, 0)]) == []
    assert alarms([{"entropy": v} for v in (1, 3, 0, 0.25)], entropy=0.2) == [(4, "entropy", 0.125)]
    assert alarms([{"entropy": v} for v in (0.25, 0.25, 0, 0.25)], entropy=0.2) == []  # a half exactly


def test_the_reward_has_risen_where_it_is_a_part_of_its_spread_higher() -> None:
    def lines(reward: float) -> list[dict[str, float]]:
        means = (0.5, 0.5, reward, reward)
        return [{"reward/mean": m, "reward/std": 0.4, "completion/length": n} for m, n in zip(means, (4, 4, 8, 8),
                                                                                             strict=True)]  # fmt: skip

    assert alarms(lines(0.6)) == []  # a quarter of 0.4 exactly
    assert alarms(lines(0.61)) == [(4, "reward_length", 2.0)]
    assert alarms(lines(0.61), reward_length=2) == []


def test_a_held_out_reward_falls_by_the_larger_of_its_spreads() -> None:
    """All 16 right at first, then one of 16 wrong: a mean of 15/16, whose spread is the root of 15, by 16."""
    monitor = Monitor(Health(window=1, reward_held_out=0.2), {"reward": [{"use": "right", "weight": 0}]})

    def line(step: int, n_right: int) -> list[float]:
        rows = [{"row": i, "reward": 0.0, "reward/right": float(i < n_right)} for i in range(16)]
        metrics = {"reward/mean": float(step), "reward/std": 1.0, "reward/right/mean": n_right / 16}
        return [a.value for a in monitor.see(step, metrics, rows) if a.name == "reward_held_out"]

    assert line(1, 16) == []
    assert line(2, 15) == [pytest.approx((1 / 16) / (math.sqrt(15) / 16))]
    assert line(3, 0) == [pytest.approx(1)]  # no spread at all, then and now


def test_rewards_are_the_same_from_the_first_step_on() -> None:
    def lines(*rewards: tuple[float, float]) -> list[dict[str, float]]:
        return [{"reward/mean": mean, "reward/std": std} for mean, std in rewards]

    assert alarms(lines((0, 0), (0, 0), (0, 0.1), (0, 0))) == [(1, "same_reward", 1.0), (2, "same_reward", 2.0)]
    assert alarms(lines((0, 0), (0, 0), (0, 0)), same_reward=3) == [(3, "same_reward", 3.0)]
    assert alarms(lines((0, 0.1), (0, 0), (0, 0))) == []
    assert alarms(lines((0, 0), (1, 0), (1, 0)), same_reward=2) == []
    (alarm,) = Monitor(Health()).see(1, {"reward/mean": 0.0, "reward/std": 0.0})
    assert alarm.message == "step 1: all rewards since the first step are 0: the reward may not read the completions"
    assert "completions.jsonl" in alarm.remedy
    assert Monitor(Health()).see(1, {"eval/reward/mean": 0.0, "eval/reward/std": 0.0, "loss": 1.0}) == []


def test_a_policy_that_does_not_move_is_left_in_peace_for_twenty_steps_after_the_warmup() -> None:
    def at(rates: list[float], **settings: Any) -> list[int]:
        monitor = Monitor(Health(window=2), settings)
        return [i for i, lr in enumerate(rates, 1) for a in monitor.see(i, {"kl": 0.0, "lr": lr}) if a.name == "kl_low"]

    assert at([1.0] * 22)[0] == 21
    assert at([0.2, 0.4, 0.6, 0.8, 1.0] + [1.0 - i / 40 for i in range(30)])[0] == 25  # the peak is at step 5
    assert at([1.0] * 40, critic_warmup_steps=10)[0] == 30


def test_a_gradient_spikes_against_the_median_and_not_where_norms_vary_anyway() -> None:
    def norms(*values: float | None) -> list[dict[str, Any]]:
        return [{"grad_norm": v} for v in values]

    assert alarms(norms(1, 2, 3, 16)) == []  # eight times the median exactly
    assert alarms(norms(1, 2, 3, 17)) == [(4, "grad_spike", 8.5)]
    assert alarms(norms(10, 10, 1, 1, 1, 60)) == []  # sixty times the median, and six times the second largest
    assert alarms(norms(10, 10, 1, 1, 1, 61)) == [(6, "grad_spike", 61.0)]
    assert alarms(norms(1, 1, 1, 20, 1, 1, 30)) == [(4, "grad_spike", 20.0), (7, "grad_spike", 30.0)]
    assert alarms(norms(0, 0, 0, 0, 5)) == []  # steps that taught nothing are no measure
    assert alarms(norms(1, 2, 3, None, 17)) == [(5, "grad_spike", 8.5)]


def test_the_critics_loss_is_held_to_its_median_and_not_to_what_it_fell_to() -> None:
    def losses(*values: float) -> list[dict[str, Any]]:
        return [{"value": v} for v in values]

    assert alarms(losses(1, 3, 1, 40)) == [(4, "value_loss", 10.25)]  # the mean of 1 and 40, by 2
    assert alarms(losses(1, 3, 1, 39)) == []
    assert alarms(losses(1, 3, *[0.01] * 9, 1, 1)) == []  # a task that is learned
    assert alarms(losses(1, 3, *[5] * 9, 60, 60)) == [(13, "value_loss", 12.0)]


def test_a_critic_is_not_blamed_where_nothing_varies() -> None:
    def lines(std: float) -> list[dict[str, Any]]:
        return [{"value/explained_variance": -3.0, "reward/std": std, "reward/mean": 1.0}] * 4

    assert alarms(lines(0.0), same_reward=None) == []
    assert alarms(lines(0.1)) == [(4, "explained_variance", -3.0)]


def test_the_chosen_answers_may_fall_where_the_margin_or_the_rejected_ones_do_not() -> None:
    def lines(chosen: float, rejected: float, margin: float) -> list[dict[str, float]]:
        start = {"logps/chosen": -10.0, "logps/rejected": -10.0, "rewards/margin": 0.0}
        start |= {"length/chosen": 10.0, "length/rejected": 10.0}
        later = {**start, "logps/chosen": chosen, "logps/rejected": rejected, "rewards/margin": margin}
        return [start, start, later, later]

    assert alarms(lines(-15, -30, 1), displacement=0.3) == [(4, "displacement", 0.5)]
    assert alarms(lines(-15, -30, 1), displacement=0.5) == []
    assert alarms(lines(-15, -5, 1), displacement=0.3) == []
    assert alarms(lines(-15, -30, -1), displacement=0.3) == []
    assert alarms(lines(-15, -14, 1), displacement=0.3) == []  # the rejected ones fell less


def test_answers_fall_by_the_token_however_long_the_rejected_ones_are() -> None:
    def lines(length: float, rejected: float) -> list[dict[str, float]]:
        start = {"logps/chosen": -10.0, "logps/rejected": -40.0, "length/chosen": 10.0, "length/rejected": 40.0}
        later = {**start, "logps/chosen": -15.0, "logps/rejected": rejected * length, "length/rejected": length}
        return [{**line, "rewards/margin": float(i)} for i, line in enumerate((start, start, later, later))]

    assert alarms(lines(10, -2.0)) == [(4, "displacement", 0.5)]  # a sum of -20, above the start's -40
    assert alarms(lines(80, -0.6)) == []  # a sum of -48, below the start's, of tokens that became likelier


def test_a_few_unlikely_rows_are_no_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen answers that only become likelier, of 4 rows a step that differ by 0.7 nats a token; no reference."""

    def raised(seed: int) -> bool:
        rng, monitor, names = random.Random(seed), Monitor(Health()), set()
        for step in range(1, STEPS + 1):
            rows = statistics.fmean(rng.gauss(-2, 0.7) for _ in range(4))  # both answers to a hard prompt are unlikely
            line = {"logps/chosen": rows + step / 500, "logps/rejected": rows - step / 100, "rewards/margin": step / 9}
            names |= {alarm.name for alarm in monitor.see(step, {**line, "length/chosen": 1.0, "length/rejected": 1.0})}
        return "displacement" in names

    assert sum(map(raised, range(40))) <= 4
    monkeypatch.setattr(detectors, "NOISE", 0)
    assert sum(map(raised, range(40))) >= 12


def test_log_ratios_are_preferred_to_log_probabilities() -> None:
    start = {"logps/chosen": -10.0, "logps/rejected": -10.0, "length/chosen": 10.0, "length/rejected": 10.0}
    start |= {"logratios/chosen": 0.0, "logratios/rejected": 0.0, "rewards/margin": 0.0}
    other_rows = {**start, "logps/chosen": -30.0, "logps/rejected": -60.0, "rewards/margin": 1.0}
    assert alarms([start, start, other_rows, other_rows]) == []
    fallen = {**other_rows, "logratios/chosen": -0.5, "logratios/rejected": -0.75}
    assert alarms([start, start, fallen, fallen]) == [(4, "displacement", 0.5)]


def test_longer_answers_repeat_more_of_their_pairs_and_that_is_no_collapse() -> None:
    def lines(length: float) -> list[dict[str, float]]:
        return [{"completion/distinct_2": d, "completion/length": n} for d, n in ((0.4, 50), (0.4, 50), (0.16, length),
                                                                                  (0.16, length))]  # fmt: skip

    assert alarms(lines(50)) == [(4, "distinct", pytest.approx(0.4))]
    assert alarms(lines(200)) == []  # 0.4 times the root of 4


def test_evaluations_are_a_series_of_their_own_of_which_one_line_is_enough() -> None:
    monitor = Monitor(Health())
    assert monitor.see(0, {"eval/kl": 0.0, "eval/completion/eos_rate": 1.0}) == []
    assert monitor.see(1, {"kl": 99.0}) == []
    (alarm,) = monitor.see(1, {"eval/kl": 16.0, "alarm/other": 5.0})
    assert (alarm.name, alarm.value, alarm.limit) == ("kl_high", 16.0, 15.0)
    assert alarm.message == "step 1: on held-out rows the KL to the reference is 16 nats a sequence, above 15"


def test_a_style_that_the_base_has_is_no_collapse() -> None:
    line = {"row": 0, "completion": "What a lovely day", "reward": 1.0}
    monitor = Monitor(Health(window=2))
    rows = [{**line, "row": i, "reward": float(i)} for i in range(8)]
    assert [a for step in range(20) for a in monitor.see(step, {"loss": 0.0}, rows)] == []


# --------------------------------------------------------------------------------------------------- the texts


def test_repeated_4_grams() -> None:
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("red red red red red") == pytest.approx(1 / 2)
    assert repetition("one two three") == repetition("") == 0
    assert repetition("今天天气很好" * 10) > 0.8  # no spaces: characters
    assert words("  two words ") == ["two", "words"]


def test_the_same_opening_counts_every_prompt_once() -> None:
    def rows(*texts: tuple[int, str]) -> list[dict[str, Any]]:
        return [{"row": row, "completion": text} for row, text in texts]

    four = rows((1, "a b c x"), (1, "a b c y"), (2, "a b c"), (2, "d e f"), (3, "g"), (4, "h"))
    assert same_opening(four) == pytest.approx((1 + 0.5) / 4)
    assert same_opening(rows((1, "a"), (2, "a"), (3, "a"))) is None


def test_steps_of_few_prompts_are_looked_at_together_for_openings() -> None:
    def raised(window: int, steps: int = 30) -> list[int]:
        monitor = Monitor(Health(window=window))
        found = []
        for step in range(1, steps):
            text = "I am sorry, but" if step > 10 else f"{step} different words"
            rows = [{"row": 2 * step + i, "completion": f"{text} {i}"} for i in range(2)]
            found += [step for alarm in monitor.see(step, {"kl": 1.0}, rows) if alarm.name == "opening"]
        return found

    assert raised(4)[0] == 15  # the last four windows of 8 prompts: (0.5 + 0.75 + 1 + 1) / 4 is 0.81
    assert raised(1) == []  # 2 prompts say nothing


def test_groups_that_teach_nothing() -> None:
    def rows(*groups: Sequence[float]) -> list[dict[str, Any]]:
        return [{"row": i, "reward": value} for i, group in enumerate(groups) for value in group]

    assert dead_groups(rows([0, 0], [1, 1], [0, 1], [0, 0]), best=1, worst=0) == 0.5  # the second is solved
    assert dead_groups(rows([1, 1], [1, 1]), best=1, worst=0) == 0
    assert dead_groups(rows([1, 1], [1, 1]), best=1, worst=1) == 1  # the only reward so far
    assert dead_groups(rows([1], [0]), best=1, worst=0) is None
    assert spreads([{"reward/a": 0.0}, {"reward/a": 2.0}, {"wins": 1}]) == {"spread/reward/a": 1.0}


@pytest.mark.parametrize(
    ("reward", "names"),
    [
        (None, ()),
        ("numeric", ()),
        ({"use": "numeric", "weight": 0}, ("numeric",)),
        ([{"use": "numeric"}, {"use": "my_module:right", "weight": 0.0}], ("right",)),
        (
            [{"use": "runs/reward-1/model", "weight": 0}, {"use": "models/judge", "weight": 0}],
            ("reward-1", "judge"),
        ),
        ([{"use": "numeric", "weight": 0, "name": "mine"}], ("mine",)),
        ([{"ensemble": ["a", "b"], "weight": 0}], ("ensemble",)),
        ([{"use": "numeric", "weight": "0"}, {"use": "exact", "weight": "none"}], ("numeric",)),
        ([{"use": "a:b/model", "weight": 0}], ("a:b",)),
    ],
)
def test_rewards_of_weight_0_are_held_out(reward: Any, names: tuple[str, ...]) -> None:
    assert held_out(reward) == names


# ------------------------------------------------------------------------------------------- whatever comes

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=80), st.integers(1, 9))
def test_start_and_now_are_means_of_the_first_and_the_last_lines(values: list[float], window: int) -> None:
    h = History(window)
    for step, value in enumerate(values):
        h.add(step, {"x": value})
    close = lambda mean: pytest.approx(mean, abs=1e-6)  # noqa: E731
    n = len(values)
    assert h.now("x") == (close(math.fsum(values[-window:]) / window) if n >= window else None)
    assert h.start("x") == (close(math.fsum(values[:window]) / window) if n >= 2 * window else None)
    assert h.median("x") == (close(statistics.median(values[-window:])) if n >= 2 * window else None)
    assert h.before("x") == values[-51:-1]
    assert h.last("x") == values[-1]
    assert h.last("y") is None


NAMES = [
    "kl", "entropy", "grad_norm", "reward/mean", "reward/std", "reward/right/mean", "completion/length", "value", "lr",
    "completion/eos_rate", "completion/distinct_2", "logps/chosen", "logps/rejected", "length/chosen", "clip_fraction",
    "rewards/margin", "value/explained_variance", "eval/kl", "eval/reward/mean",
]  # fmt: skip
anything = st.one_of(st.none(), st.floats(), st.integers(), st.booleans(), st.text(max_size=3))
row = st.fixed_dictionaries({}, optional={"row": anything, "completion": anything, "reward": anything,
                                          "reward/right": anything})  # fmt: skip


@given(st.lists(st.tuples(st.dictionaries(st.sampled_from(NAMES), anything), st.lists(row, max_size=5)), max_size=12))
def test_no_line_is_too_strange(lines: list[Any]) -> None:
    monitor = Monitor(Health(window=1), {"reward": [{"use": "right", "weight": 0}]})
    for step, (metrics, rows) in enumerate(lines):
        for alarm in monitor.see(step, metrics, rows):
            assert math.isfinite(alarm.value)


# ------------------------------------------------------------------------------------------------- the remedies


def test_every_remedy_names_settings_that_there_are() -> None:
    groups = {"sampling": Sampling, "rollout": Rollout}
    run = {*RunConfig.model_fields, *(f"{group}.{name}" for group, cls in groups.items() for name in cls.model_fields)}
    methods = {f".{name}" for method in registry.names() for name in registry.get(method).Config.model_fields}
    for detector in DETECTORS:
        for name, what in detector.remedies:
            assert name in (methods if name.startswith(".") else run), (detector.name, name)
            assert "{}" in what


@pytest.mark.parametrize("method", [*OFFLINE, "ppo", "grpo", "rloo", "reinforce", "online_dpo", "nash"])
def test_a_run_is_advised_what_its_method_has(method: str) -> None:
    own = dict.fromkeys(registry.get(method).Config.model_fields)
    for detector in DETECTORS:
        named = re.findall(r"`([\w.]+)`", detector.advice(own))
        assert named
        assert all(name.partition(".")[0] in RunConfig.model_fields or name in own for name in named)
    assert ("`beta`" in DETECTORS[0].advice(own)) == ("beta" in own)
