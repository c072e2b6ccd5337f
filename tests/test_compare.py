"""Methods side by side: who can be compared, what is measured, and that one's failure is its own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import cli, data, registry
from alignkit.cli import console
from alignkit.compare import Comparison, check_matplotlib, compare, draw, notes, table, write_json
from alignkit.compare import comparison as comparisons
from alignkit.compare.comparison import Row
from alignkit.compare.jobs import Job, Task, check_settings, jobs_of, rows_of
from alignkit.compare.worker import run_job
from alignkit.data import tokenise
from alignkit.demo import policy_metrics, recipes, world
from alignkit.errors import ConfigError, PluginError, RewardError
from alignkit.rollout import Sampled
from alignkit.testing.world import blend, tiny_model, tiny_tokenizer
from helpers import make_rows

BREVITY = {"use": "brevity", "limit": 3}
METHODS = ("sft", "reward", "dpo", "kto", "grpo", "nash")


def chosen(task: Task, *names: str) -> tuple[list[Job], dict[str, str]]:
    return jobs_of(task, {name: registry.get(name) for name in names or METHODS}, Path("out"), 3)


def task(tiny: str, source: Any, **more: Any) -> Task:
    settings = {"max_steps": 2, "batch_size": 4, "sampling": {"max_new_tokens": 5}, "learning_rate": 1e-2}
    return Task(tiny, source, settings={**settings, "device": "cpu", **more.pop("settings", {})}, **more)


@pytest.fixture
def pairs(write_rows: Any) -> str:
    return str(write_rows(make_rows("pairs", 30)))


# ------------------------------------------------------------------------------------------------- who takes part


@pytest.mark.parametrize(
    ("kind", "asks", "compared"),
    [
        ("pairs", {}, ["sft", "dpo", "kto"]),
        ("pairs", {"judge": {"bradley_terry": BREVITY}}, ["sft", "dpo", "kto", "nash"]),
        ("unpaired", {}, ["sft", "kto"]),
        ("text", {"reward": BREVITY}, ["sft", "grpo", "nash"]),
    ],
)
def test_the_rows_and_what_scores_answers_decide_who_takes_part(
    kind: str, asks: dict[str, Any], compared: list[str], tiny: str, write_rows: Any
) -> None:
    jobs, left_out = chosen(task(tiny, write_rows(make_rows(kind, 8)), **asks))
    assert [job.name for job in jobs] == ["base", *compared]
    assert sorted(left_out) == sorted(set(METHODS) - set(compared))
    assert left_out["reward"] == "trains reward and no policy: it has no answers to compare"
    if not asks:
        assert left_out["grpo"] == "needs a reward: give --reward"
    if kind == "unpaired":
        assert "found rows of the form 'unpaired'" in left_out["dpo"]


def test_a_reward_is_nashs_judge_by_bradley_terry_and_the_judges_verdict_comes_first(
    tiny: str, write_rows: Any
) -> None:
    pairs = write_rows([{**row, "fact": 0} for row in make_rows("pairs", 30)])
    jobs, _ = chosen(task(tiny, pairs, reward=BREVITY), "grpo", "nash")
    assert [job.settings.get("reward") for job in jobs] == [None, BREVITY, None]
    assert jobs[2].settings["judge"] == {"bradley_terry": BREVITY}
    assert {json.dumps(job.verdict) for job in jobs} == {json.dumps({"reward": BREVITY})}
    both, _ = chosen(task(tiny, pairs, reward=BREVITY, judge="alignkit.demo.verdict:judge"), "grpo", "nash")
    assert both[2].settings["judge"] == both[0].verdict["judge"] == "alignkit.demo.verdict:judge"


@pytest.mark.parametrize("asks", [{"reward": "exact"}, {"judge": {"bradley_terry": "exact"}}])
def test_a_missing_column_is_named_before_anything_trains(
    asks: dict[str, Any], tiny: str, pairs: str, write_rows: Any
) -> None:
    says = "reward 'exact' needs the column 'answer'"
    with pytest.raises(RewardError, match=says):
        chosen(task(tiny, pairs, **asks), "dpo")  # trains without a reward, and is compared by it
    answered = write_rows([{**row, "answer": "red"} for row in make_rows("pairs", 8)], "answered.jsonl")
    with pytest.raises(RewardError, match=says):
        chosen(task(tiny, answered, eval_data=pairs, **asks), "dpo")
    jobs, _ = chosen(task(tiny, answered, eval_data=answered, **asks), "dpo")
    assert len(jobs) == 2
    rows = [{"q": row["prompt"], "chosen": "a", "rejected": "b", "answer": "a"} for row in make_rows("pairs", 8)]
    named = {"columns": {"prompt": "q"}}
    assert len(chosen(task(tiny, write_rows(rows, "named.jsonl"), settings=named, **asks), "dpo")[0]) == 2


def test_a_setting_goes_to_the_methods_that_have_it(tiny: str, pairs: str) -> None:
    given = task(tiny, pairs, settings={"beta": 0.3, "seed": 5}, recipes={"dpo": {"beta": 0.9, "epochs": 4}})
    (base, sft, dpo), _ = chosen(given, "sft", "dpo")
    assert "beta" not in sft.settings
    assert (dpo.settings["beta"], dpo.settings["epochs"]) == (0.3, 4)  # what was given wins over the recipe
    assert base.config().sampling.max_new_tokens == 5
    assert Job.read(dpo.write(Path(pairs).with_name("job.json"))) == dpo


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bta": 1}, "unknown setting 'bta'. Did you mean 'beta'"),
        ({"reward": BREVITY}, "--set reward: compare sets this itself"),
        ({"output": "x"}, "--set output: compare sets this itself"),
    ],
)
def test_a_setting_that_nobody_has_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings(settings, {"sft": registry.get("sft"), "dpo": registry.get("dpo")})
    check_settings({"lambda": 0.1, "sampling.top_p": 1}, {"orpo": registry.get("orpo")})


def test_a_setting_of_a_mapping_can_be_named_alone(
    tiny: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = task(tiny, pairs)  # max_new_tokens is 5
    jobs = []
    monkeypatch.setattr(comparisons, "demo_task", lambda *_: given)
    monkeypatch.setattr(comparisons, "_row", lambda job, folder: jobs.append(job) or Row(job.name, {}))
    compare({}, {"sampling.temperature": 0.5}, ["dpo"], tmp_path)
    sampling = [job.config().sampling for job in jobs]
    assert [(s.max_new_tokens, s.temperature) for s in sampling] == [(5, 0.5), (5, 0.5)]


def test_files_may_lie_in_the_folder_of_the_runs_which_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: str, pairs: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "show_log", lambda: None)
    monkeypatch.setattr(comparisons, "demo_task", lambda *_: task(tiny, pairs))
    monkeypatch.setattr(comparisons, "_row", lambda job, folder: Row(job.name, dict(FIGURES)))
    command = ["compare", "--methods", "dpo", "--json", "runs/c.json"]
    typer.main.get_command(cli.app)(command, standalone_mode=False)
    assert json.loads((tmp_path / "runs/c.json").read_text())["rows"][0]["method"] == "base"


def test_a_method_with_faulty_demo_settings_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr(recipes, "train_base", lambda *_: trained)
    monkeypatch.setattr(registry.get("kto"), "demo_settings", {"epochs": 0})
    monkeypatch.setattr(registry.get("ipo"), "demo_settings", {"epochs": 0})  # is not compared
    monkeypatch.setattr(comparisons, "_row", lambda job, folder: Row(job.name, {}))
    done = compare({}, {}, ["kto", "dpo"], tmp_path)
    assert [row.method for row in done.rows] == ["base", "dpo"]
    assert list(done.left_out) == ["kto"]
    assert done.left_out["kto"].startswith("the demo_settings of 'kto' cannot be used: epochs: ")


def test_where_nothing_is_left_the_reasons_are_said(tiny: str, pairs: str) -> None:
    with pytest.raises(ConfigError, match="no method can be compared: grpo: needs a reward: give --reward"):
        chosen(task(tiny, pairs), "grpo")
    with pytest.raises(ConfigError, match="reward 'brevity': limit: Field required"):
        chosen(task(tiny, pairs, reward="brevity"), "dpo")
    with pytest.raises(ConfigError, match="beta: Input should be greater than"):
        chosen(task(tiny, pairs, settings={"beta": -1}), "dpo")


# ------------------------------------------------------------------------------------------------------ held out


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_tenth_of_the_prompts_is_held_out(suffix: str, tiny: str, tmp_path: Path) -> None:
    rows = [row for row in make_rows("unpaired", 20) for _ in range(2)]  # every prompt twice
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        lines = [
            "prompt,completion,label",
            *(f"{r['prompt']},{r['completion']},{str(r['label']).lower()}" for r in rows),
        ]
        path.write_text("\n".join(lines))
    else:
        world.write_jsonl(path, rows)
    (_, job), _ = chosen(task(tiny, str(path)), "kto")
    train, held_out = rows_of(job, AutoTokenizer.from_pretrained(tiny))
    sides = [{cells["prompt"] for _, cells in side} for side in (train, held_out)]
    assert [len(side) for side in (train, held_out)] == [36, 4]
    assert not sides[0] & sides[1]
    assert len(data.load(train, "unpaired")) == 36  # a CSV's labels are still read as text
    (_, job), _ = chosen(task(tiny, str(path), settings={"eval_fraction": 0.5}), "kto")
    assert len(rows_of(job, AutoTokenizer.from_pretrained(tiny))[1]) == 20


# ------------------------------------------------------------------------------------------------------ measures


def _logps(model: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Log-probabilities in float64, from logits one token at a time."""
    found = []
    with torch.no_grad():
        for i in range(len(tokens)):
            logits = model.double()(torch.cat([prompt, tokens[:i]])[None].long()).logits[0, -1].tolist()
            top = max(logits)
            found.append(logits[int(tokens[i])] - top - math.log(math.fsum(math.exp(x - top) for x in logits)))
    model.float()
    return found


def test_accuracy_and_kl_are_those_of_a_computation_by_hand() -> None:
    base, model = tiny_model(0), tiny_model(0)
    blend(model, tiny_model(1), 0.3)
    rows = [
        {"prompt": "who? ", "chosen": "me.", "rejected": "you!"},
        {"prompt": "a: ", "chosen": "b", "rejected": "cd"},
    ]
    rows.append({"prompt": "x ", "chosen": "yes.", "rejected": "no."})
    pairs, _ = tokenise.tokenise(data.load(rows, "pairs"), tiny_tokenizer())
    ratios = [
        [
            math.fsum(_logps(model, e.prompt, c.tokens)) - math.fsum(_logps(base, e.prompt, c.tokens))
            for c in e.completions
        ]
        for e in pairs
    ]
    right = [chosen > rejected for chosen, rejected in ratios]
    assert 0 < sum(right) < 3
    assert policy_metrics.preference_accuracy(model, base, pairs) == pytest.approx(sum(right) / 3)
    assert policy_metrics.preference_accuracy(base, base, pairs) == 0.5
    sampled = [[Sampled(c.tokens.tolist(), True) for c in e.completions] for e in pairs]
    want = sum(r for both in ratios for r in both) / 6
    assert policy_metrics.kl_of_samples(model, base, pairs, sampled) == pytest.approx(want, abs=1e-5)
    assert policy_metrics.kl_of_samples(base, base, pairs, sampled) == 0


def test_a_win_rate_counts_ties_half() -> None:
    assert policy_metrics.win_rate([1, 2, 0, 1], [0, 2, 1, 1]) == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)


def test_a_policy_that_is_the_base_is_measured_as_such(tiny: str, pairs: str, tmp_path: Path) -> None:
    jobs, _ = jobs_of(task(tiny, pairs, reward=BREVITY), {"dpo": registry.get("dpo")}, tmp_path, 0)
    figures = run_job(jobs[0])
    assert (figures["kl"], figures["accuracy"], figures["seconds"]) == (0, 0.5, None)
    assert 0 < figures["distinct_2"] <= 1  # type: ignore[operator]
    assert figures["win_rate"] == pytest.approx(0.5, abs=0.25)


def test_one_method_is_trained_and_measured(tiny: str, pairs: str, tmp_path: Path) -> None:
    given = task(tiny, pairs, settings={"max_steps": 6, "lora": 4})
    jobs, _ = jobs_of(given, {"sft": registry.get("sft")}, tmp_path, 0)
    figures = run_job(jobs[1])
    assert figures["win_rate"] is None
    assert figures["kl"] > 0  # type: ignore[operator]
    assert figures["seconds"] > 0  # type: ignore[operator]
    assert figures["peak_mib"] > 100  # type: ignore[operator]
    aligned = AutoModelForCausalLM.from_pretrained(tmp_path / "sft/model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    held_out = tokenise.tokenise(data.load(rows_of(jobs[1], tokenizer)[1], "pairs"), tokenizer)[0]
    assert figures["accuracy"] == policy_metrics.preference_accuracy(aligned, base, held_out)


# ------------------------------------------------------------------------------------------------------- together


@pytest.mark.slow
def test_the_demos_task_from_the_command_line_where_one_method_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = registry.get("sft")
    monkeypatch.setattr(base, "demo_base", {**base.demo_base, "epochs": 2})
    monkeypatch.setitem(recipes.SHARED, "epochs", 1)
    monkeypatch.setattr(registry.get("kto"), "demo_settings", {"batch_size": 1})  # it needs two
    monkeypatch.setattr(world, "CREATURES", world.CREATURES[:6])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(console, "show_log", lambda: None)  # the log stays as the other tests have it
    runs = tmp_path / "compare-001"
    files = ["--json", str(tmp_path / "c.json"), "--png", str(tmp_path / "c.png")]
    monkeypatch.setattr(
        sys, "argv", ["alignkit", "compare", "--methods", "kto,dpo,grpo,reward", "--output", str(tmp_path), *files]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 1
    assert "left out: reward: trains reward and no policy" in printed
    assert "failed: batch_size 1 is too small: 'kto'" in printed
    written = json.loads((tmp_path / "c.json").read_text())
    rows = {row["method"]: row["figures"] for row in written["rows"]}
    assert list(rows) == ["base", "kto", "dpo", "grpo"]
    assert set(rows["kto"].values()) == {None}
    assert all(value is not None for name in ("dpo", "grpo") for value in rows[name].values())
    assert (runs / "dpo/model/model.safetensors").is_file()
    assert f"{rows['grpo']['kl']:.2f}" in printed
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------- shown

FIGURES = {"win_rate": 0.75, "accuracy": None, "kl": 0.6931, "distinct_2": 0.25, "seconds": 12.3, "peak_mib": 512.0}


def comparison(*rows: Row) -> Comparison:
    return Comparison(rows, {"reward": "trains no policy"}, Path("runs/compare-001"))


def test_why_there_is_no_win_rate() -> None:
    def with_rate(name: str, rate: float | None, failed: str | None = None) -> Row:
        return Row(name, {**dict.fromkeys(FIGURES), "win_rate": rate}, failed)

    rows = (with_rate("base", 0.5), with_rate("dpo", None), with_rate("kto", None, "killed"))
    assert notes(Comparison(rows, {}, Path("out"))) == [
        "no win rate of dpo: to no prompt does the reward score both answers, it returned None"
    ]
    assert notes(Comparison(rows, {}, Path("out"), judged=False))[0].endswith("give a --reward or a --judge")
    assert notes(Comparison(rows[:1], {}, Path("out"))) == []


def test_a_small_negative_figure_is_not_shown_as_minus_zero() -> None:
    shown = table(comparison(Row("dpo", {**FIGURES, "kl": -0.001})))
    assert list(shown.columns[3].cells)[-1] == "0.00"


def test_the_table() -> None:
    shown = table(comparison(Row("dpo", dict(FIGURES)), Row("kto", dict.fromkeys(FIGURES), "killed by signal 9")))
    cells = list(zip(*(column.cells for column in shown.columns), strict=True))
    assert cells[0] == ("dpo", "75.0%", "-", "0.69", "0.250", "12", "512")
    assert cells[1][:2] == ("kto", "failed: killed by signal 9")


def test_the_json_has_every_number(tmp_path: Path) -> None:
    write_json(comparison(Row("dpo", dict(FIGURES))), tmp_path / "c.json")
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["rows"] == [{"method": "dpo", "figures": FIGURES, "failed": None}]
    assert written["left_out"] == {"reward": "trains no policy"}


def test_every_method_is_a_labelled_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    labels = []
    annotate = Axes.annotate
    monkeypatch.setattr(
        Axes, "annotate", lambda self, text, at, **k: labels.append((text, at)) or annotate(self, text, at, **k)
    )
    rows = [Row(name, {**FIGURES, "kl": kl}) for name, kl in (("dpo", 0.5), ("base", 0.0))]
    draw(comparison(*rows, Row("kto", dict.fromkeys(FIGURES), "why")), tmp_path / "c.png")
    assert labels == [("base", (0.0, 75.0)), ("dpo", (0.5, 75.0))]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no plot: no method has a win rate; give --reward or --judge"):
        draw(comparison(Row("dpo", {**FIGURES, "win_rate": None})), tmp_path / "d.png")


def test_a_picture_without_matplotlib_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"need matplotlib; try: pip install 'alignkit\[report\]'"):
        check_matplotlib()


# --------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--data", "d.jsonl"], ConfigError, "no --model given; leave out all of them"),
        (["--reward", "brevity"], ConfigError, "no --model and no --data given"),
        (["--methods", "dop"], PluginError, "no method is called 'dop'.*Did you mean 'dpo'"),
        (["--set", "bta=1"], ConfigError, "unknown setting 'bta'"),
        (["--set", "smpling.top_p=1"], ConfigError, "unknown setting 'smpling'. Did you mean 'sampling'"),
        (["--json", "nodir/x.json"], ConfigError, "--json 'nodir/x.json': there is no folder 'nodir'"),
        (["--png", "nodir/x.png"], ConfigError, "--png 'nodir/x.png': there is no folder 'nodir'"),
        (["--json", "."], ConfigError, "--json '.' is a folder; give a file"),
        (["--model", "m", "--data", "d", "--png", "x.png"], ConfigError, "--png .*need a --reward or a --judge"),
    ],
)
def test_what_cannot_be_compared_is_said_first(
    arguments: list[str], error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "show_log", lambda: None)
    with pytest.raises(error, match=words):
        typer.main.get_command(cli.app)(["compare", *arguments], standalone_mode=False)
    assert list(tmp_path.iterdir()) == []
