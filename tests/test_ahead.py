"""One step off-policy: sampling that overlaps with learning, the version that sampled, and a resumption to the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samplers import Double, uses
from test_engine import same

import alignkit
from alignkit.engine.ahead import Ahead, Ask
from alignkit.engine.ahead_state import decoded, encoded, interleaved
from alignkit.engine.loop import Loop
from alignkit.engine.rollouts import Online
from alignkit.errors import ConfigError, RolloutError
from alignkit.models.earlier_weights import EarlierWeights
from alignkit.models.ranks import Ranks
from alignkit.rollout import Request, Sampled, Sampler
from alignkit.rollout_settings import Sampling
from alignkit.runs.folder import read_metrics
from alignkit.types import Batch
from helpers import make_rows

LETTERS = "samplers:letters"
ASKS: dict[str, dict[str, Any]] = {
    "nash": {"judge": {"bradley_terry": LETTERS}},
    "ppo": {"reward": LETTERS, "epochs_per_batch": 2, "minibatches": 2},
    "grpo": {"reward": LETTERS, "group_size": 3},
    "rloo": {"reward": LETTERS, "group_size": 3},
    "reinforce": {"reward": LETTERS},
    "online_dpo": {"reward": LETTERS, "group_size": 3},
}


@pytest.fixture
def online(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a short run that samples one step ahead."""
    rows = [{"prompt": r["prompt"]} for r in make_rows("text", 10)]
    sampling = {"max_new_tokens": 8, "batch_size": 16}
    own = {"max_steps": 4, "sampling": sampling, "learning_rate": 3e-3, "save_every": 1, "schedule": "constant"}
    return settings | own | {"data": rows, "health": {"enabled": False}, "rollout": {"backend": "double", "ahead": 1}}


def lines(folder: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "seconds/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in read_metrics(folder)]


def completions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------- overlap and versions


def test_the_next_step_is_sampled_while_this_one_is_learned(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the two can go on without the other: one after the other, both would wait for ever."""
    sampling, learning = ([threading.Event() for _ in range(4)] for _ in range(2))
    late: list[str] = []

    class Waiting(Double):
        def sample(self, request: Request) -> Any:
            step = len(self.asked)
            sampling[step].set()
            if step and not learning[step - 1].wait(20):
                late.append(f"step {step - 1} was not learned while step {step} was sampled")
            return super().sample(request)

    original = Loop._update

    def update(self: Loop, minibatch: Any, weight: float, step: int) -> Any:
        if step < 3 and not sampling[step + 1].wait(20):
            late.append(f"step {step + 1} was not sampled while step {step} was learned")
        learning[step].set()
        return original(self, minibatch, weight, step)

    uses(monkeypatch, Waiting(online["model"]))
    monkeypatch.setattr(Loop, "_update", update)
    alignkit.run("grpo", **online | ASKS["grpo"])
    assert late == []


@pytest.mark.parametrize("method", list(ASKS))
def test_a_step_learns_from_the_version_before_it_with_its_own_log_probabilities(
    method: str, online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    double = Double(online["model"], noise=0.0)
    uses(monkeypatch, double)
    seen: list[tuple[Batch, torch.Tensor]] = []
    original = Online.rollouts

    def watched(self: Online, ctx: Any, *args: Any) -> Batch:
        batch = original(self, ctx, *args)
        seen.append((batch, ctx.models.policy(batch).logps))
        return batch

    monkeypatch.setattr(Online, "rollouts", watched)
    result = alignkit.run(method, **online | ASKS[method])
    assert double.updates == [0, 1, 2]
    assert [version for version, _ in double.asked] == [0, 0, 1, 2]  # at most one step old
    for step, (batch, now) in enumerate(seen):
        old, sampler = batch["old_logps"], batch["sampler_logps"]
        assert float((old - sampler).abs().max()) < 2e-5  # the same weights, although those of the policy have moved
        assert (float((now - sampler).abs().max()) > 1e-3) == (step > 0)
    for line in read_metrics(result.folder):
        assert line["rollout/kl"] == pytest.approx(0, abs=1e-9)  # what is learned ahead is no mismatch
        if method not in ("ppo", "online_dpo"):  # no ratio is logged, or one of further updates
            assert (line["ratio/max"] > 1.001) == (line["step"] > 1)


def test_rows_seeds_and_metrics_are_those_of_a_run_without_it(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for ahead in (0, 1):
        double = Double(online["model"])
        uses(monkeypatch, double)
        given = online | ASKS["grpo"] | {"rollout": {"backend": "double", "ahead": ahead}, "name": f"ahead-{ahead}"}
        folder = alignkit.run("grpo", **given).folder
        runs.append((double, folder))
    (plain, a), (early, b) = runs
    assert [seed for _, seed in plain.asked] == [seed for _, seed in early.asked]
    assert [version for version, _ in plain.asked] == [0, 1, 2, 3]
    key = ("step", "row", "number", "prompt")
    assert [[s[k] for k in key] for s in completions(a)] == [[s[k] for k in key] for s in completions(b)]
    assert [line.keys() for line in lines(a)] == [line.keys() for line in lines(b)]
    first, second = lines(a), lines(b)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_evaluations_in_between_change_nothing(online: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = online | ASKS["grpo"] | {"eval_data": [{"prompt": "9 red:"}, {"prompt": "8 blue:"}]}
    found = []
    for name, every in (("often", 1), ("rarely", 4)):
        double = Double(online["model"])
        uses(monkeypatch, double)
        folder = alignkit.run("grpo", **own, eval_every=every, name=name).folder
        found.append([line for line in lines(folder) if "loss" in line])
        evaluated = [x["eval/reward/mean"] for x in lines(folder) if "eval/reward/mean" in x]
        assert len(evaluated) == 1 + 4 // every
        assert double.updates == ([0, 1, 2, 3, 4] if every == 1 else [0, 1, 2, 4])
    assert found[0] == found[1]


def ask(step: int, prompts: list[list[int]], n: int = 1) -> Ask:
    return Ask(step, 0, Request(prompts, Sampling(), n, 7, list(range(len(prompts)))))


def alone(doing: str, call: Callable[[], Any]) -> Any:
    """The calls of a single rank."""
    return call()


class Counting(Sampler):
    """A sampler whose completions say what was asked."""

    def __init__(self) -> None:
        self.fails = False

    def update(self, version: int, model: Any) -> None:
        self.version = version

    def sample(self, request: Request) -> list[list[Sampled]]:
        if self.fails:
            raise ConnectionError("nobody listens")
        assert self.version is not None
        made = [Sampled([*prompt, self.version], True, [0.0] * (len(prompt) + 1)) for prompt in request.prompts]
        return [[one] * request.n for one in made]


def test_what_a_method_does_not_ask_for_again_is_sampled_anew() -> None:
    sampler = Counting()
    ahead = Ahead(sampler, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), 1)
    assert ahead.sample(ask(0, [[1]]), lambda: ask(1, [[2]]), alone)[0][0].tokens == [1, 0]
    assert ahead.sample(ask(1, [[2]]), lambda: ask(2, [[3]]), alone)[0][0].tokens == [2, 0]
    assert len(ahead.sample(ask(2, [[3]], n=2), lambda: ask(3, [[4]], n=2), alone)[0]) == 2  # another number
    assert ahead.sample(ask(3, [[5]], n=2), lambda: None, alone)[0][0].tokens == [5, 3]  # another prompt
    ahead.close()


def test_a_step_ahead_has_the_log_probabilities_of_its_version_also_by_an_exact_sampler(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that returns no log-probabilities: what was learned meanwhile is in the ratio all the same."""

    class Exact(Double):
        def sample(self, request: Request) -> list[list[Sampled]]:
            return [[replace(s, logps=None) for s in some] for some in super().sample(request)]

    uses(monkeypatch, Exact(online["model"], noise=0.0))
    folder = alignkit.run("grpo", **online | ASKS["grpo"]).folder
    for line in read_metrics(folder):
        assert (line["ratio/max"] > 1.001) == (line["step"] > 1)


def test_a_sampler_is_asked_for_one_thing_at_a_time_and_all_ranks_take_what_is_ahead_or_none() -> None:
    class Alone(Counting):
        busy = 0

        def sample(self, request: Request) -> list[list[Sampled]]:
            self.busy += 1
            time.sleep(0.05)
            assert self.busy == 1
            self.busy -= 1
            return super().sample(request)

    class Others(Ranks):
        lack = 0

        def most(self, n: int) -> int:
            return max(n, self.lack)

    sampler, ranks = Alone(), Others()
    ahead = Ahead(sampler, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), 1, ranks)
    first, second = ask(0, [[1]]), replace(ask(0, [[9]]), call=1)
    ahead.sample(first, lambda: ask(1, [[2]]), alone)
    assert ahead.sample(second, lambda: None, alone)[0][0].tokens == [9, 0]
    ranks.lack = 1  # another rank asks for other prompts than it said
    assert ahead.sample(ask(1, [[2]]), lambda: None, alone)[0][0].tokens == [2, 1]
    with ahead.as_sampled(ask(1, [[2]])):
        assert not ahead.early
    ahead.close()


def test_a_failure_ahead_is_raised_in_the_step_that_needs_it() -> None:
    sampler = Counting()
    ahead = Ahead(sampler, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), 1)
    ahead.sample(ask(0, [[1]]), lambda: None, alone)
    sampler.fails = True
    with pytest.raises(ConnectionError):  # sampled at once
        ahead.sample(ask(1, [[1]]), lambda: None, alone)
    sampler.fails = False
    later = threading.Event()

    def following() -> Ask:
        later.set()
        sampler.fails = True
        return ask(2, [[2]])

    with pytest.raises(ConnectionError):  # noqa: PT012
        assert ahead.sample(ask(1, [[1]]), lambda: None, alone)
        ahead.sample(ask(1, [[1]]), following, alone)
        ahead.sample(ask(2, [[2]]), lambda: None, alone)
    assert later.is_set()
    ahead.close()


def test_earlier_weights_are_put_back_also_after_an_error() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    earlier = EarlierWeights(module)
    before = module[0].weight.clone()
    earlier.take()
    with torch.no_grad():
        module[0].weight.add_(1.0)
    with pytest.raises(KeyError), earlier.in_force():  # noqa: PT012
        assert torch.equal(module[0].weight, before)
        raise KeyError
    assert torch.equal(module[0].weight, before + 1)


# -------------------------------------------------------------------------------------------------- resumption


class _KilledError(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed(point: str, step: int) -> Iterator[None]:
    owner: Any = Online if point == "scoring" else Loop
    name = {"step": "step", "scoring": "_on_all_ranks", "update": "_update"}[point]
    original, begin = getattr(owner, name), Loop.step
    now = -1

    def begun(self: Loop, number: int, total: int) -> Any:
        nonlocal now
        now = number
        if point == "step" and number == step:
            raise _KilledError
        return begin(self, number, total)

    def dies(*args: Any) -> Any:
        if now == step and (point == "update" or args[1] == "scoring"):
            raise _KilledError
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        if point != "step":
            patch.setattr(owner, name, dies)
        patch.setattr(Loop, "step", begun)
        with pytest.raises(_KilledError):
            yield


@pytest.mark.parametrize(
    ("method", "point", "lora"),
    [("grpo", "step", None), ("grpo", "scoring", 4), ("grpo", "update", None), ("ppo", "update", None)],
)
def test_killed_and_resumed_it_equals_the_uninterrupted_run(
    method: str, point: str, lora: int | None, online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch in flight is in the checkpoint: it is not sampled again."""
    online |= ASKS[method] | {"lora": lora}
    uses(monkeypatch, Double(online["model"]))
    whole = alignkit.run(method, **online, name="whole")
    uses(monkeypatch, Double(online["model"]))
    with killed(point, 2):
        alignkit.run(method, **online, name="parts")
    again = Double(online["model"])
    uses(monkeypatch, again)
    parts = alignkit.run(method, **online, name="parts", resume=True)
    assert same(whole.model, parts.model)
    assert lines(whole.folder) == lines(parts.folder)
    assert completions(whole.folder) == completions(parts.folder)
    assert again.asked[0][0] == 2  # step 3, with the weights before step 2; step 2 itself was in the checkpoint
    assert len(again.asked) == 1


def test_a_step_that_fails_before_its_update_is_resumed_with_its_own_completions(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that a dead reward leaves has the completions that the step had taken already."""
    calls = 0

    def fails(completions: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ConnectionError("nobody listens")
        return [float(len(text)) for text in completions]

    def works(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    works.__name__ = works.__qualname__ = fails.__qualname__ = fails.__name__ = "score"
    own = online | ASKS["grpo"] | {"save_every": None}
    uses(monkeypatch, Double(online["model"]))
    whole = alignkit.run("grpo", **own | {"reward": works}, name="whole")
    uses(monkeypatch, Double(online["model"]))
    with pytest.raises(alignkit.AlignkitError, match="Stopped after step 2"):
        alignkit.run("grpo", **own | {"reward": fails}, name="parts")
    again = Double(online["model"])
    uses(monkeypatch, again)
    parts = alignkit.run("grpo", **own | {"reward": works}, name="parts", resume=True)
    assert same(whole.model, parts.model)
    assert lines(whole.folder) == lines(parts.folder)
    assert len(again.asked) == 1


def test_a_sampler_that_fails_ahead_loses_no_checkpoint(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that needs it raises the error, after the checkpoint of the step before; it is then sampled anew."""

    class Failing(Double):
        def sample(self, request: Request) -> Any:
            if len(self.asked) == 2:
                raise RolloutError("the server does not answer")
            return super().sample(request)

    uses(monkeypatch, Failing(online["model"]))
    with pytest.raises(RolloutError, match=r"(?s)does not answer.*Stopped after step 2; continue with"):
        alignkit.run("grpo", **online | ASKS["grpo"], name="parts")
    again = Double(online["model"])
    uses(monkeypatch, again)
    parts = alignkit.run("grpo", **online | ASKS["grpo"], name="parts", resume=True)
    assert [version for version, _ in again.asked] == [2, 2]  # steps 2 and 3
    assert [line["step"] for line in read_metrics(parts.folder)] == [1, 2, 3, 4]


def test_an_update_that_is_skipped_leaves_the_version_in_force(
    online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights were copied, since none moved: the next step is scored with those that there are."""
    uses(monkeypatch, Double(online["model"], noise=0.0))
    original, seen = Online.rollouts, list[float]()

    def poisoned(self: Online, ctx: Any, *args: Any) -> Batch:
        batch = original(self, ctx, *args)
        seen.append(float((batch["old_logps"] - batch["sampler_logps"]).abs().max()))
        return batch.attach(per_completion={"rewards": batch["rewards"] * (float("nan") if ctx.step == 1 else 1.0)})

    monkeypatch.setattr(Online, "rollouts", poisoned)
    result = alignkit.run("rloo", **online | ASKS["rloo"])
    assert result.metrics["skipped"] == 1
    assert max(seen) < 2e-5


SCRIPT = """
import json, os, signal, sys, threading
sys.path.insert(0, {tests!r})
import pytest
from samplers import Double, uses
import alignkit

class Dying(Double):
    def sample(self, request):
        if len(self.asked) == 3:  # in the thread, while step 2 is learned
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(request)

given = json.load(open({file!r}))
uses(pytest.MonkeyPatch(), Dying(given["model"]))
alignkit.run("grpo", **given)
"""


def test_a_real_sigkill_while_it_samples_ahead_is_survived(
    online: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Any
) -> None:
    given = online | ASKS["grpo"] | {"data": write_rows(online["data"])}
    given |= {"output": str(online["output"]), "cache_file": str(online["cache_file"])}
    uses(monkeypatch, Double(online["model"]))
    whole = alignkit.run("grpo", **given, name="whole").folder
    file = tmp_path / "given.json"
    file.write_text(json.dumps(given | {"name": "parts"}))
    code = SCRIPT.format(tests=str(Path(__file__).parent), file=str(file))
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    newest = sorted(p.name for p in (online["output"] / "parts/checkpoints").iterdir())[-1]
    assert newest in ("step-00000001", "step-00000002")  # step 2's completions are in flight, or step 3's are begun
    again = Double(online["model"])
    uses(monkeypatch, again)
    parts = alignkit.run("grpo", **given, name="parts", resume=True).folder
    assert lines(parts) == lines(whole)
    assert completions(parts) == completions(whole)
    assert (parts / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


OF_TWO = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
import pytest
from samplers import Double, uses
import alignkit
from alignkit.engine.loop import Loop

original = Loop.step
def step(self, number, total):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, number, total)

given = json.load(open({file!r}))
uses(patch := pytest.MonkeyPatch(), Double(given["model"]))
patch.setattr(Loop, "step", step)
alignkit.run("grpo", **given)
"""


@pytest.mark.slow
def test_two_processes_sample_ahead_what_one_does_and_one_resumes_what_two_began(
    online: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Any
) -> None:
    given = online | ASKS["grpo"] | {"data": write_rows(online["data"]), "learning_rate": 1e-4}
    given |= {"output": str(online["output"]), "cache_file": str(online["cache_file"])}
    uses(monkeypatch, Double(online["model"]))
    whole = alignkit.run("grpo", **given, name="whole").folder
    file, script = tmp_path / "given.json", tmp_path / "two.py"
    file.write_text(json.dumps(given | {"name": "parts"}))
    script.write_text(OF_TWO.format(tests=str(Path(__file__).parent), file=str(file)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert (online["output"] / "parts/checkpoints/step-00000002").is_dir(), done.stderr[-3000:]
    again = Double(online["model"])
    uses(monkeypatch, again)
    parts = alignkit.run("grpo", **given, name="parts", resume=True).folder
    assert len(again.asked) == 1  # step 2 of all ranks was in the checkpoint
    for a, b in zip(lines(whole), lines(parts), strict=True):
        for name in set(a) - {"completion/distinct_2"}:  # counted on each rank
            assert b[name] == pytest.approx(a[name], abs=2e-5, rel=2e-5), name


def test_completions_survive_the_checkpoint_and_another_number_of_ranks() -> None:
    made = [
        (11, [Sampled([1, 2], True, [-0.1, -2.5]), Sampled([3], False, [-1e-9])]),
        (22, [Sampled([4], True, [-0.3]), Sampled([5, 6, 7], True, [-1.0, -2.0, -3.0])]),
        (33, [Sampled([8], True, [-0.0]), Sampled([9], True, [-7.25])]),
    ]
    of_two = [made[0::2], made[1::2]]
    assert interleaved([decoded(encoded(part)) for part in of_two]) == made
    assert decoded(encoded([(1, [Sampled([1], True)])])) == [(1, [Sampled([1], True)])]
    assert decoded(encoded([])) == []


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_what_samples_with_the_trained_model_cannot_be_ahead(backend: str) -> None:
    settings: dict[str, Any] = {"model": "no/such", "data": [], "reward": "numeric"}
    with pytest.raises(ConfigError, match=rf"backend: {backend} samples with that model; remove rollout.ahead"):
        alignkit.run("grpo", **settings, rollout={"backend": backend, "ahead": 1})


def test_other_settings_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    uses(monkeypatch, Counting())
    settings: dict[str, Any] = {
        "model": tiny,
        "data": [],
        "reward": "numeric",
        "rollout": {"backend": "double", "ahead": 1},
    }
    with pytest.raises(ConfigError, match="but streaming reads each step's rows once; remove one of them"):
        alignkit.run("grpo", **settings, streaming=True, max_steps=3)
    with pytest.raises(ConfigError, match=r"rollout\.ahead: Input should be less than or equal to 1"):
        alignkit.run("grpo", **settings | {"rollout": {"backend": "double", "ahead": 2}})
