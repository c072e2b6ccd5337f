"""The benchmark: right before fast, fair ratios, reasons for whoever is absent, and figures that a program can read."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit_kernels.bench import cases, chart, main, measure, report, rivals, run
from alignkit_kernels.bench.contenders import WAYS, eager, planned_path, ways
from alignkit_kernels.bench.exact import errors, exact_results, results

CPU, ALTERNATE = torch.device("cpu"), measure.alternate
FIELDS = {
    "case", "contender", "shape", "dtype", "ms", "ms_min", "ms_max", "peak_mib", "peak_beyond_gradients_mib",
    "floor_ms", "to_floor", "time_to", "least_to", "peak_to", "error", "largest_error", "error_to_eager", "errors",
    "approximate", "red",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time one round: these tests are about what is measured and told."""
    monkeypatch.setattr(measure, "alternate", lambda calls, device, seconds, _=0: ALTERNATE(calls, device, seconds, 1))


def tiny(*arguments: str) -> int:
    return main(["--quick", "--device", "cpu", "--threads", "1", *arguments])


def small(name: str, shape: tuple[int, int, int] = (24, 8, 40)) -> cases.Case:
    return cases.build(name, shape, torch.float32, CPU)


def planted(contender: str, ms: float, peak: float | None = None, case: str = "path1", **more: Any) -> dict[str, Any]:
    blank = run.blank(small(case), contender, {"out": run.Error(1e-7, 1e-6)}, None, None)
    return {**blank, "ms": ms, "ms_min": ms, "ms_max": ms, "peak_mib": peak, **more}


def test_a_tiny_run_gives_every_field_of_every_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("--json", str(tmp_path / "k.json")) == 0
    found = json.loads((tmp_path / "k.json").read_text())
    assert {"device", "driver", "cuda", "torch", "triton", "python", "threads", "date"} <= set(found["machine"])
    own = {row["case"]: row for row in found["rows"] if row["contender"] == "alignkit"}
    assert set(own) == set(cases.NAMES)
    for row in found["rows"]:
        assert set(row) == FIELDS
        assert row["red"] is None
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
    for row in own.values():
        assert row["time_to"]["eager"] > 0
    assert own["path1"]["to_floor"] == pytest.approx(own["path1"]["ms"] / own["path1"]["floor_ms"])
    assert set(own["path3"]["errors"]) == {"out", "d_hidden", "d_weight"}
    assert {"case", "contender", "why"} == set(found["skipped"][0])
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in cases.NAMES)


@pytest.mark.parametrize("name", cases.NAMES)
def test_eager_is_as_right_as_float32_allows(name: str) -> None:
    case = small(name)
    inputs = cases.make(case, 3)
    for error in errors(results(case, eager(case), inputs), exact_results(case, inputs)).values():
        assert error.relative < 1e-5


def test_the_exact_results_are_those_of_the_whole_computation_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit_kernels.bench.exact.COLUMNS", 7)
    monkeypatch.setattr("alignkit_kernels.bench.exact.ROWS", 5)
    case = small("path3")
    x = cases.make(case, 1)
    hidden, weight = (x[k].detach().double().requires_grad_() for k in ("hidden", "weight"))
    z = hidden @ weight.T
    logps = z[torch.arange(24), x["targets"]] - z.exp().sum(1).log()
    d_hidden, d_weight = torch.autograd.grad(logps, [hidden, weight], x["upstream"].double())
    got = exact_results(case, x)
    torch.testing.assert_close(got["out"].values, logps.detach())
    for name, gradient in {"d_hidden": d_hidden, "d_weight": d_weight}.items():
        at = got[name].at
        assert at is not None
        assert 5 <= len(at) < len(gradient)
        torch.testing.assert_close(got[name].values, gradient[at])


def test_what_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # the right value with a gradient that is off by a hundredth of a percent
    monkeypatch.setattr(run, "own", lambda case: lambda x: Skewed.apply(eager(case)(x)))
    assert tiny("--only", "sequence_sum", "--json", str(tmp_path / "k.json")) == 1
    rows = {row["contender"]: row for row in json.loads((tmp_path / "k.json").read_text())["rows"]}
    assert rows["alignkit"]["ms"] is None
    assert rows["alignkit"]["peak_mib"] is None
    assert rows["alignkit"]["red"].startswith("d_values: error 0.0001, allowed ")
    assert rows["eager"]["ms"] > 0
    assert rows["eager"]["time_to"] == {}


@pytest.mark.parametrize(
    ("off", "own_red", "rival_red"), [(0.0, False, False), (4e-7, True, False), (1e-4, True, True)]
)
def test_a_rival_is_given_more_room_than_this_package(
    off: float, own_red: bool, rival_red: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(case: cases.Case) -> Any:
        return lambda x: eager(case)({**x, "logps": x["logps"].clone()}) * (1 + off)

    monkeypatch.setattr(run, "own", wrong)
    monkeypatch.setitem(rivals._ADAPTERS, "preference_loss", {"trl": wrong})
    tiny("--only", "preference_loss", "--json", str(tmp_path / "k.json"))
    rows = {row["contender"]: row for row in json.loads((tmp_path / "k.json").read_text())["rows"]}
    assert (rows["alignkit"]["red"] is not None, rows["trl"]["red"] is not None) == (own_red, rival_red)


class Skewed(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 1.0001


@pytest.mark.parametrize(
    ("mine", "eagers", "limit", "red"),
    [
        (2e-6, 1e-6, 2.0, False), (3e-6, 1e-6, 2.0, True), (1.9e-5, 1e-6, 20.0, False), (3e-5, 1e-6, 20.0, True),
        (5e-8, 0.0, 2.0, False), (7e-8, 0.0, 2.0, True), (float("nan"), 1.0, 2.0, True), (float("inf"), 1.0, 9.0, True),
    ],
)  # fmt: skip
def test_an_error_is_judged_by_eagers(mine: float, eagers: float, limit: float, red: bool) -> None:
    said = run.verdict({"out": run.Error(mine, 0)}, {"out": run.Error(eagers, 0)}, limit, {"out": 2**-23})
    assert (said is not None) == red


def test_a_result_that_is_not_finite_or_not_of_the_shape_is_infinitely_wrong() -> None:
    case = small("path4")
    x = cases.make(case, 0)
    exact = exact_results(case, x)
    nan = exact["out"].values.float().index_fill(0, torch.tensor([3]), float("nan"))
    assert errors({"out": nan}, exact)["out"].relative == float("inf")
    assert errors({"out": nan[:, None]}, exact)["out"].relative == float("inf")


def test_ratios_are_those_of_the_planted_times() -> None:
    rows = [planted("alignkit", 3.0, 10.0), planted("eager", 6.0, 40.0), planted("trl", 4.0)]
    rows.append({**planted("liger", 0.0), "ms": None, "red": "out: wrong"})
    run.compare(rows, 2.0)
    assert rows[0]["time_to"] == {"eager": 0.5, "trl": 0.75}
    assert rows[0]["peak_to"] == {"eager": 0.25}
    assert [row["to_floor"] for row in rows] == [1.5, 3.0, 2.0, None]
    assert rows[1]["time_to"] == {"alignkit": 2.0, "trl": 1.5}
    assert rows[3]["time_to"] == {}


def test_bars_of_a_cpu_are_judged_on_their_shape_alone() -> None:
    shape = {"N": 2048, "H": 512, "V": 32000}
    rows = [planted("alignkit", 0.81, 20.0, shape=shape), planted("eager", 1.0, 100.0, shape=shape)]
    run.compare(rows, None)
    (line,) = report.bars(rows, "CPU x86_64")
    assert line == (
        "path1 N2048 H512 V32000: 0.81x eager's time (bar 1.00; least times 0.81x), 0.20x its peak (bar 0.25): holds"
    )
    rows[0]["peak_to"]["eager"] = 0.26
    assert report.bars(rows, "CPU x86_64")[0].endswith("BROKEN")
    assert report.bars([{**rows[0], "shape": {"N": 96, "H": 32, "V": 500}}], "CPU x86_64") == []
    assert report.bars(rows, "some other device") == []


def test_bars_of_an_h200_are_floor_rivals_and_memory() -> None:
    shape = {"shape": {"N": 8192, "H": 2048, "V": 128256}, "dtype": "bfloat16"}
    rows = [planted("alignkit", 13.0, **shape), planted("eager", 12.0, **shape), planted("trl", 26.0, **shape)]
    rows += [planted(name, 1.0, **shape) for name in ("cut-cross-entropy", *WAYS)]
    rows[0]["peak_beyond_gradients_mib"] = 700.0
    run.compare(rows, 10.9)
    lines = [line.split(": ", 1)[1] for line in report.bars(rows, "NVIDIA H200")]
    assert lines == [
        "1.19x its floor (bar 1.30): holds",
        "1.08x eager's time (bar 1.00): BROKEN",
        "0.50x trl's time (bar 1.00): holds",
        "700 MiB beyond the gradients (bar 1024): holds",
    ]


def test_floors_of_an_h200_are_those_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "rates", lambda device: measure.RATES["NVIDIA H200"])
    bench = run.Bench(CPU, 0.0, False, 0.0)
    cased = [cases.build(name, cases.GPU_SHAPES[0], torch.bfloat16, CPU) for name in (*cases.PATHS, "selective_logps")]
    floors = [bench._floor_ms(case) for case in cased]
    assert floors == pytest.approx([10.9, 16.3, 21.8, 5.45, 1.47], rel=0.01)


def test_contenders_take_turns() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: (lambda i, name=name: seen.append((name, i))) for name in "ab"}
    times = ALTERNATE(calls, CPU, 0.0, 3)  # type: ignore[arg-type]
    order = [name for i, (name, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != name]
    assert order == ["a", "b"] * 4  # one round is for the estimate
    assert times["a"].least <= times["a"].median <= times["a"].most


def test_the_peak_is_what_a_call_held_beyond_what_there_was() -> None:
    kept = torch.ones(1 << 22)
    peak = measure.peak_bytes(lambda: torch.ones(1 << 24).sum() + kept.sum(), CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 60 * measure.MIB < peak < 80 * measure.MIB


def test_rivals_that_are_not_there_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        raise ModuleNotFoundError(name="triton" if module.startswith("cut") else module.split(".")[0])

    monkeypatch.setattr(rivals.importlib, "import_module", absent)
    found, reasons = rivals.rivals(small("path1"), "not now")
    assert found == {}
    assert reasons == {
        "torch.compile": "not now",
        "trl": "not installed",
        "liger": "not installed",
        "cut-cross-entropy": "needs 'triton', not installed",
    }


def test_a_rival_that_refuses_a_case_is_skipped_with_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(x: cases.Inputs) -> torch.Tensor:
        raise RuntimeError("not this one\nat all")

    monkeypatch.setitem(rivals._ADAPTERS, "sequence_sum", {"trl": lambda case: refuse})
    assert tiny("--only", "sequence_sum") == 0
    assert "without trl: fails: RuntimeError: not this one (sequence_sum)" in capsys.readouterr().out


def test_no_time_left_is_said_and_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("--only", "gae", "--minutes", "0") == 1
    assert "without all: out of time (gae)" in capsys.readouterr().out


def test_the_picture_shows_both_paths_against_both_sizes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep = [
        planted(name, size * scale, 100.0 * scale, case=case, axis=axis, floor_ms=size / 2, logits_mib=50.0)
        | {"shape": {"N": 64, "H": 8, "V": 500, axis: size}}
        for case in chart.TITLES
        for axis in chart.AXES
        for size in (1000, 2000)
        for name, scale in (("alignkit", 1.0), ("eager", 2.0))
    ]
    about = measure.machine(CPU, 1)
    assert chart.draw(tmp_path / "k.png", sweep, about) == f"picture: {tmp_path / 'k.png'}"
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    assert chart.draw(tmp_path / "none.png", [], about).startswith("no picture: nothing was measured")


def test_without_matplotlib_there_is_no_picture_and_a_hint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert tiny("--only", "sequence_sum", "--png", str(tmp_path / "k.png")) == 0
    assert "no picture: matplotlib is not installed; try: pip install 'alignkit-kernels[bench]'" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "path9"], "unknown case 'path9'"),
        (["--shapes", "3x4"], "N x H x V"),
        (["--shapes", "axbxc"], "N x H x V"),
        (["--shapes", "0x5x6"], "each at least 1"),
        (["--shapes", "5x6x7,5x-6x7"], "each at least 1"),
        (["--json", "/nonexistent/x.json"], "--json /nonexistent/x.json: the folder /nonexistent does not exist"),
        (["--png", "/nonexistent/x.png"], "--png /nonexistent/x.png: the folder /nonexistent does not exist"),
        (["--json", "/"], "is a folder, not a file"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tiny(*arguments)
    assert words in capsys.readouterr().err


def test_the_cases_of_the_bars_come_first_on_every_shape() -> None:
    args = run.arguments(["--shapes", "24x8x40,32x8x40"])
    planned = [(case.name, case.sizes.get("N")) for case in run.plan(args, CPU)]
    n_foremost = 2 * len(cases.FOREMOST)
    assert planned[:n_foremost] == list(itertools.chain(*([(name, n) for name in cases.FOREMOST] for n in (24, 32))))
    assert [name for name, _ in planned[n_foremost:]] == ["linear_dpo", *cases.VECTORS, "linear_dpo"]


def test_torch_compile_takes_part_in_the_first_shape_alone_and_in_nothing_ragged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def compiled(function: Any, dynamic: bool) -> Any:
        asked.append(current.label)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(measure, "alternate", lambda calls, *_: dict.fromkeys(calls, measure.Times(1.0, 1.0, 1.0)))
    bench = run.Bench(CPU, 0.0, True, float("inf"))
    current = small("path4")
    for current in (small("path4"), small("path4", (32, 8, 40)), small("path1"), *map(small, cases.VECTORS)):
        assert bench.measure(current)
    assert asked == [small("path4").label, small("path1").label]
    why = {s["case"]: s["why"] for s in bench.skipped if s["contender"] == "torch.compile"}
    assert set(why) == {small("path4", (32, 8, 40)).label, *(small(name).label for name in cases.VECTORS)}


def test_a_stopped_run_leaves_and_tells_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = run.Bench.measure

    def stopped(bench: run.Bench, case: cases.Case, without: Any = ()) -> list[dict[str, Any]]:
        if case.name == "gae" or len(bench.sweep) >= 2:
            raise KeyboardInterrupt
        return measured(bench, case, without)

    monkeypatch.setattr(run.Bench, "measure", stopped)
    assert tiny("--only", "path4,gae", "--json", str(tmp_path / "k.json")) == 1
    said = capsys.readouterr()
    assert "\npath4 " in said.out
    assert "stopped before its end" in said.err
    assert {row["case"] for row in json.loads((tmp_path / "k.json").read_text())["rows"]} == {"path4"}
    pytest.importorskip("matplotlib")
    assert tiny("--only", "path4", "--json", str(tmp_path / "k.json"), "--png", str(tmp_path / "k.png")) == 1
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "k.json").read_text())["sweep"]) >= 2


def test_the_sweep_is_saved_after_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Bench, "measure", lambda *_: [planted("alignkit", 1.0)])
    bench = run.Bench(CPU, 0.0, False, float("inf"))
    seen: list[int] = []
    run.swept(bench, None, True, lambda: seen.append(len(bench.sweep)))
    assert seen == list(range(1, 9))


def test_a_gpus_clock_starts_behind_the_flush_and_a_millisecond_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self) -> None:
            done.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    monkeypatch.setattr(measure, "FLUSH_BYTES", 8)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"sleep {cycles}"))
    assert measure._cuda_clock(CPU)(lambda _: done.append("call"), 0, 1) == 2.0
    assert done == ["synchronize", "sleep 2000000", "record", "call", "record", "synchronize"]


def test_both_ways_of_path_4_are_taken_and_the_usual_choice_is_restored(
    device: torch.device, triton_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser, operation = (
        importlib.import_module(f"alignkit_kernels.{name}") for name in ("linear_lse", "linear_logps")
    )
    usual, fused = chooser.LARGEST_HIDDEN, []
    case = cases.build("path4", (24, 16, 40), torch.float16, device)
    inputs = cases.make(case, 0)
    monkeypatch.setattr(
        operation, "fold_product", lambda *given: (fused.append(given[1].shape), chooser.fold_product(*given))
    )
    exact = exact_results(case, inputs)
    found = {}
    for name, way in ways(case).items():
        before = len(fused)
        assert errors(results(case, way, inputs), exact)["out"].relative < 1e-3
        found[name] = len(fused) > before
        assert usual == chooser.LARGEST_HIDDEN
    assert found == {"fused": True, "folded": False}
    with pytest.raises(KeyError):
        ways(case)["fused"]({})
    assert usual == chooser.LARGEST_HIDDEN
    assert planned_path(case) == 4
    assert ways(cases.build("path4", (24, 16, 40), torch.float32, device)) == {}
    assert ways(cases.build("path1", (24, 16, 40), torch.float16, device)) == {}
    monkeypatch.setenv("ALIGNKIT_KERNELS", "eager")
    assert ways(case) == {}


def test_the_ways_are_held_to_this_packages_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    way: Any = lambda x: eager(small("path4"))(x) * (1 + 5e-7)  # noqa: E731
    monkeypatch.setattr(run, "ways", lambda case: {"fused": way})
    rows = {row["contender"]: row for row in run.Bench(CPU, 0.0, False, float("inf")).measure(small("path4"))}
    assert rows["fused"]["red"] is not None
    assert rows["fused"]["ms"] is None
    assert rows["alignkit"]["red"] is None
