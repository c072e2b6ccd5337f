"""The best of n: the curve against all subsets counted one by one, and the command on a tiny model."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit import data
from alignkit.errors import ConfigError, RewardError
from alignkit.insight.best_of_n import BestOfN, best_of_n, draw, table, write_best, write_json, write_pairs
from alignkit.insight.best_of_n.curve import best_of, curve, kl, ordered
from alignkit.insight.best_of_n.selection import Samples
from helpers import write_tiny

SHORT = {"sampling.max_new_tokens": 6, "sampling.stop": ["e", "a", "s"]}


# ------------------------------------------------------------------------------------------------------- curve


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=7))
def test_best_of_k_is_the_mean_over_all_subsets(values: list[int]) -> None:
    proxy = [float(v) for v in values]
    for k in range(1, len(values) + 1):
        want = statistics.fmean(max(some) for some in combinations(proxy, k))
        assert best_of(k, np.array(sorted(proxy))) == pytest.approx(want)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-5, 5)), min_size=1, max_size=6))
def test_gold_is_that_of_the_best_by_the_proxy_any_of_equals(pairs: list[tuple[int, int]]) -> None:
    proxy, gold = [float(p) for p, _ in pairs], [float(g) for _, g in pairs]
    _, ranked = ordered(proxy, gold)
    assert ranked is not None
    for k in range(1, len(pairs) + 1):
        means = []
        for some in combinations(range(len(pairs)), k):
            top = max(proxy[i] for i in some)
            means.append(statistics.fmean(gold[i] for i in some if proxy[i] == top))
        assert best_of(k, np.array(ranked)) == pytest.approx(statistics.fmean(means))


def test_the_estimator_is_unbiased() -> None:
    """Over all that a reward of three values may say of four samples: E max of two draws."""
    values, chances = (0.0, 1.0, 5.0), (0.5, 0.3, 0.2)
    want = sum(pa * pb * max(a, b) for (a, pa), (b, pb) in product(zip(values, chances, strict=True), repeat=2))
    got = sum(
        math.prod(p for _, p in drawn) * best_of(2, np.array(sorted(v for v, _ in drawn)))
        for drawn in product(zip(values, chances, strict=True), repeat=4)
    )
    assert got == pytest.approx(want)


def test_many_samples_are_no_trouble() -> None:
    values = np.arange(1.0, 1025)
    assert best_of(1, values) == pytest.approx(512.5)
    assert best_of(512, values) == pytest.approx(512 * 1025 / 513)  # the largest of k of 1..n is k (n + 1) / (k + 1)
    assert best_of(1024, values) == 1024
    assert best_of(2000, np.arange(1.0, 4001)) == pytest.approx(2000 * 4001 / 2001)  # its binomials are no floats


def test_the_curve_of_many_samples_of_many_prompts() -> None:
    proxy = [[float((i * 7919 + p) % 1024) for i in range(1024)] for p in range(100)]  # 0 to 1023 in some order
    points = curve(proxy, [[-v for v in values] for values in proxy])
    want = [k * 1025 / (k + 1) - 1 for k in range(1, 1025)]
    assert [p.proxy.value for p in points] == pytest.approx(want)
    assert [p.gold.value for p in points if p.gold] == pytest.approx([-v for v in want])


@pytest.mark.parametrize(("k", "nats"), [(1, 0.0), (2, 0.193147), (16, 1.835089), (1024, 5.932449)])
def test_kl(k: int, nats: float) -> None:
    assert kl(k) == pytest.approx(nats, abs=1e-6)


def test_kl_is_that_of_the_best_of_k() -> None:
    """The best of 3 of 500 equally likely samples without ties, summed: a little below the formula of a continuum."""
    m, k = 500, 3
    best = [(i / m) ** k - ((i - 1) / m) ** k for i in range(1, m + 1)]
    assert sum(p * math.log(p * m) for p in best) == pytest.approx(kl(k), abs=2e-3)


def test_the_curve_is_a_mean_over_prompts_with_its_interval() -> None:
    points = curve([[1, 2], [3, 5], [0, 4]], [[10, 0], [5, 5], [1, 2]])
    assert [p.k for p in points] == [1, 2]
    assert [p.proxy.value for p in points] == pytest.approx([2.5, 11 / 3])
    assert [p.gold.value for p in points if p.gold] == pytest.approx([23 / 6, 7 / 3])
    half = 4.302653 * statistics.stdev([2, 5, 4]) / math.sqrt(3)  # Student's t, 2 degrees of freedom
    assert points[1].proxy.high == pytest.approx(11 / 3 + half, rel=1e-5)
    alone = curve([[1.0, 2.0]], None)[0]
    assert (alone.gold, alone.proxy.low) == (None, None)


# ------------------------------------------------------------------------------------------------------- files


def samples(row: int, rewards: tuple[float, ...], ended: tuple[bool, ...], **changes: Any) -> Samples:
    texts = tuple(f" answer {i}" for i in range(len(rewards)))
    return Samples(**{"row": row, "prompt": f"p{row}", "completions": texts, "rewards": rewards, "golds": None,
                    "ended": ended, "prompt_cut": False, **changes})  # fmt: skip


def found_of(*some: Samples) -> BestOfN:
    golds = [a.golds for a in some if a.golds is not None]
    return BestOfN(
        "m",
        len(some[0].rewards),
        "proxy",
        "gold" if golds else None,
        some,
        curve([a.rewards for a in some], golds or None),
    )


def test_the_files_are_rows_that_methods_read(tmp_path: Path) -> None:
    chat = ([{"role": "user", "content": "hi"}], tuple([{"role": "assistant", "content": f"a{i}"}] for i in range(3)))
    found = found_of(
        samples(1, (1.0, 3.0, 2.0), (True, True, False)),
        samples(4, (2.0, 2.0, 2.0), (True, True, True)),
        samples(5, (0.0, 1.0, 2.0), (True, True, False)),
        samples(6, (5.0, 1.0, 5.0), (True, True, True), prompt=chat[0], completions=chat[1]),
    )
    write_best(found, tmp_path / "best.jsonl")
    best = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [(b["row"], b["reward"], b["ended"]) for b in best] == [
        (1, 3.0, True), (4, 2.0, True), (5, 2.0, False), (6, 5.0, True),
    ]  # fmt: skip
    assert [b["completion"] for b in best[:2]] == [" answer 1", " answer 0"]
    assert write_pairs(found, tmp_path / "pairs.jsonl") == {"written": 2, "equal": 1, "cut": 1}
    for file, kind, n in (("best.jsonl", "text", 3), ("pairs.jsonl", "pairs", 1)):
        lines = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
        assert len(data.load([row for row in lines if isinstance(row["prompt"], str)], kind)) == n  # type: ignore[arg-type]
        assert len(data.load([row for row in lines if not isinstance(row["prompt"], str)], kind)) == 1  # type: ignore[arg-type]
    pairs = data.load(tmp_path / "pairs.jsonl", "pairs").rows
    assert (pairs[0].completions, pairs[0].numbers) == ((" answer 1", " answer 0"), {})
    assert pairs[1].completions == (chat[1][0], chat[1][1])


def test_gold_stands_beside(tmp_path: Path) -> None:
    found = found_of(samples(1, (1.0, 3.0), (True, True), golds=(7.0, 8.0)))
    write_best(found, tmp_path / "best.jsonl")
    assert json.loads((tmp_path / "best.jsonl").read_text())["gold"] == 8.0
    write_json(found, tmp_path / "c.json")
    read = json.loads((tmp_path / "c.json").read_text())
    assert [p["gold"]["value"] for p in read["curve"]] == [7.5, 8.0]
    assert read["gold"] == "gold"


def test_the_table_has_the_powers_of_two_and_n() -> None:
    found = found_of(samples(1, tuple(map(float, range(11))), (True,) * 11))
    assert list(table(found).columns[0].cells) == ["1", "2", "4", "8", "11"]
    nine = BestOfN("m", 9, "proxy", None, (), curve([[float(i) for i in range(9)]] * 2, None))
    assert list(table(nine).columns[0].cells) == ["1", "2", "4", "8", "9"]
    assert next(iter(table(nine).columns[2].cells)) == "4"


@pytest.mark.parametrize("golds", [None, (1.0, 2.0)])
def test_the_picture(golds: tuple[float, float] | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(found_of(samples(1, (1.0, 3.0), (True, True), golds=golds)), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match=r"none/c\.png: No such file or directory"):
        draw(found_of(samples(1, (1.0, 3.0), (True, True), golds=golds)), tmp_path / "none" / "c.png")


# -------------------------------------------------------------------------------------------------- the whole


def longest(completions: list[str], lengths: list[int]) -> list[float]:
    return [float(n) for n in lengths]


def shortest(lengths: list[int]) -> list[float]:
    return [-float(n) for n in lengths]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "model"
    write_tiny(folder)
    return str(folder)


ROWS = [{"prompt": f"{i} red fox:", "fact": str(i)} for i in range(3)]


def test_samples_are_scored_and_chosen(base: str) -> None:
    found = best_of_n(base, ROWS, longest, n=5, gold=shortest, settings=SHORT)
    assert [a.row for a in found.asked] == [1, 2, 3]
    assert (found.reward, found.gold, len(found.curve)) == ("longest", "shortest", 5)
    for a in found.asked:
        assert len(a.completions) == len(a.rewards) == len(a.ended) == 5
        assert a.rewards[a.best] == max(a.rewards)
        assert a.rewards[a.worst] == min(a.rewards)
        assert a.golds == tuple(-r for r in a.rewards)
        assert all(end or r == 6 for end, r in zip(a.ended, a.rewards, strict=True))
    assert len({text for a in found.asked for text in a.completions}) > 10
    mine = [p.proxy.value for p in found.curve]
    assert mine == pytest.approx(sorted(mine))
    assert mine[-1] > mine[0]
    assert [p.gold.value for p in found.curve if p.gold] == pytest.approx([-v for v in mine])
    again = best_of_n(base, ROWS, longest, n=5, settings=SHORT)
    assert [a.completions for a in again.asked] == [a.completions for a in found.asked]
    other = best_of_n(base, ROWS, longest, n=5, settings={**SHORT, "seed": 1})
    assert [a.completions for a in other.asked] != [a.completions for a in found.asked]


def test_prompts_that_are_asked_together_change_nothing(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignkit.insight.best_of_n import selection

    whole = best_of_n(base, ROWS, longest, n=2, settings=SHORT).asked
    monkeypatch.setattr(selection, "CHUNK", 2)
    assert best_of_n(base, ROWS, longest, n=2, settings=SHORT).asked == whole
    assert best_of_n(base, ROWS, longest, n=2, settings=SHORT, limit=1).asked == whole[:1]


def test_columns_reach_the_reward(base: str) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, fact: Any) -> list[float]:
        seen.extend(zip(prompts, fact, strict=True))
        return [0.0] * len(completions)

    best_of_n(base, ROWS, reward, n=2, settings=SHORT)
    assert seen == [(row["prompt"], row["fact"]) for row in ROWS for _ in range(2)]


def test_what_is_cut_and_dropped_is_logged(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS[:1], {"prompt": "x"}, *ROWS[1:]]
    with caplog.at_level("INFO", "alignkit"):
        found = best_of_n(base, rows, longest, n=2, settings={**SHORT, "max_prompt_tokens": 4}, limit=3)
    assert "2 prompts cut to their last 4 tokens" in caplog.text
    assert "4 rows of the form 'prompt', read as prompts" in caplog.text
    assert [a.prompt_cut for a in found.asked] == [True, False, True]
    write_best(found, tmp_path / "best.jsonl")
    write_pairs(found, tmp_path / "pairs.jsonl")
    cut = {1: True, 2: False, 3: True}
    for file in ("best.jsonl", "pairs.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
        assert [line["prompt_cut"] for line in lines] == [cut[line["row"]] for line in lines]
    best = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in best] == [row["prompt"] for row in rows[:3]]


@pytest.mark.parametrize("name", ["learning_rate", "columns", "method", "health.stop_on", "precision", "attention"])
def test_settings_that_do_nothing_here_are_refused(base: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"no setting '{name.partition('.')[0]}'.* It has seed, max_prompt_tokens"):
        best_of_n(base, ROWS, longest, settings={name: 1})


def test_what_cannot_be_done(base: str) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'max_prompt_tokens'"):
        best_of_n(base, ROWS, longest, settings={"max_promt_tokens": 1})
    with pytest.raises(ConfigError, match="n is 0; give 1 or more"):
        best_of_n(base, ROWS, longest, n=0)
    with pytest.raises(ConfigError, match="Did you mean 'length'"):
        best_of_n("a/none", ROWS, "lenght")
    with pytest.raises(ConfigError, match="temperature"):
        best_of_n(base, ROWS, longest, settings={"sampling.temperature": 0})
    with pytest.raises(
        ConfigError, match=r"best-of-n samples in its own process, which rollout.backend: vllm does not"
    ):
        best_of_n(base, ROWS, longest, settings={"rollout.backend": "vllm", "rollout.urls": ["http://a:1"]})
    with pytest.raises(RewardError, match="needs the column 'answer'"):
        best_of_n(base, ROWS, "exact", n=1, settings=SHORT)


@pytest.fixture
def call(command: Callable[..., Any]) -> Callable[..., Any]:
    """Run `alignkit best-of-n ARGUMENTS`."""
    return partial(command, "best-of-n")


def test_the_command(call: Callable[..., Any], base: str, write_rows: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "bon_rewards.py").write_text("def short(lengths):\n    return [-n for n in lengths]\n")
    given = ("--model", base, "--data", write_rows(ROWS), "--reward", "bon_rewards:short", "--n", 4)
    code, out, _ = call(
        *given, "--pairs", "pairs.jsonl", "--json", "c.json", "--set", "sampling={max_new_tokens: 6, stop: [e, a, s]}"
    )
    assert code == 0
    assert "best of  KL, nats  reward" in out
    best = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert f"best: best.jsonl, {sum(not b['ended'] for b in best)} of 3 cut before their end" in out
    pairs = data.load("pairs.jsonl", "pairs").rows
    assert f"pairs: pairs.jsonl, {len(pairs)}; left out: " in out
    assert {pair.row for pair in pairs} <= {1, 2, 3}
    assert len(json.loads((tmp_path / "c.json").read_text())["curve"]) == 4


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--pairs", "no/p.jsonl"], "there is no folder 'no'"),
        (["--output", "/proc/b.jsonl"], "--output '/proc/b.jsonl': cannot be written"),
        (["--set", "beta=1"], "best-of-n has no setting 'beta'"),
        (["--set", "sampling.temperatur=1"], "temperatur"),
        (["--gold", "lenght"], "Did you mean 'length'?"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], problem: str, call: Callable[..., Any], base: str, write_rows: Callable[..., str]
) -> None:
    code, out, err = call("--model", base, "--data", write_rows(ROWS), "--reward", "json", *arguments)
    assert (code, out) == (2, "")
    assert problem in err
