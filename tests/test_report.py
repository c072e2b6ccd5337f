"""The report: it reads the folders of runs, reports what is missing, and shows every part in one file."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import alignkit
from alignkit.cli.app import main
from alignkit.config import RunConfig
from alignkit.engine.loop import Loop
from alignkit.errors import AlignkitError, ConfigError
from alignkit.insight.report import report
from alignkit.insight.report.completions import samples
from alignkit.insight.report.curves import groups, names
from alignkit.insight.report.data_audits import audit_sources
from alignkit.insight.report.run_facts import count, memory, span
from alignkit.insight.report.run_files import chapters, read
from alignkit.insight.report.run_tables import results
from alignkit.insight.report.setting_tables import between, changed
from alignkit.lora_settings import LoraSettings
from alignkit.runs.sessions import digest
from helpers import make_rows

EVIL = "<script>document.title='taken'</script><img src=x onerror=\"console.error('taken')\">"


def metric_lines(n: int, **more: Callable[[int], Any]) -> list[dict[str, Any]]:
    first = {"step": 0, "eval/loss": 0.7, "eval/rewards/accuracy": 0.5}
    steps = [{"step": i, "loss": 0.7 / i, "lr": 1e-6, **{k: f(i) for k, f in more.items()}} for i in range(1, n + 1)]
    return [first, *steps, {"step": n, "eval/loss": 0.35, "eval/rewards/accuracy": 0.75}]


def write_run(folder: Path, lines: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """Write the folder of a run that never was."""
    folder.mkdir(parents=True)
    config = RunConfig(**{"method": "dpo", "model": "some/base", "data": "some/pairs", "name": folder.name, **settings})
    (folder / "config.yaml").write_text(yaml.safe_dump({**config.describe(), "beta": 0.1}, sort_keys=False))
    write_lines(folder / "metrics.jsonl", metric_lines(5) if lines is None else lines)
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def shown(*folders: Path) -> str:
    """The report's HTML."""
    return report(folders, folders[0].parent / "report.html").read_text(encoding="utf-8")


def words(page: str) -> str:
    """The text of a page, white space folded."""
    page = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


class Balanced(HTMLParser):
    """Fails where tags do not close in order, and keeps all tags and links."""

    def check(self, page: str) -> tuple[set[str], set[str]]:
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: set[str] = set()
        self.feed(page)
        assert self.open == []
        return self.tags, self.links

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.links |= {
            value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "srcset")
        }
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ------------------------------------------------------------------------------------------------------ real runs


@pytest.fixture(scope="module")
def online(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GRPO run with held-out prompts."""
    folder = tmp_path_factory.mktemp("online")
    data, held = folder / "prompts.jsonl", folder / "held.jsonl"
    write_lines(data, [*make_rows("prompts", 8)])
    write_lines(held, [{"prompt": f"{i} {EVIL}:"} for i in range(3)])
    result = alignkit.run(
        "grpo", model=tiny, data=str(data), eval_data=str(held), output=folder, name="grpo", device="cpu", max_steps=4,
        eval_every=2, batch_size=4, group_size=2, learning_rate=1e-2, cache_file=folder / "cache.sqlite",
        reward={"use": "length", "max": 4, "name": "short"}, sampling={"max_new_tokens": 8}, max_prompt_tokens=64,
    )  # fmt: skip
    return result.folder


def test_a_run_that_samples_shows_every_part(online: Path) -> None:
    page = shown(online)
    Balanced().check(page)
    text = words(page)
    for heading in ("Before and after", "Curves", "Alarms", "Completions", "Data", "Reference", "Settings"):
        assert f"<h2>{heading}</h2>" in page
    assert "<h2>Environment and cost</h2>" in page
    assert "method grpo base" in text
    assert "reward/mean" in text
    assert "nats a sequence" in text
    assert "The first completion of held-out prompts at step 0 and at step 4: 3 of 3 prompts" in text
    assert "group_size" in text
    assert "torch" in text
    assert "held.jsonl" in text
    assert "not used: completions are sampled anew" in text


def test_texts_of_rows_are_escaped_and_nothing_is_loaded(online: Path) -> None:
    page = shown(online)
    tags, links = Balanced().check(page)
    assert not tags & {"script", "img", "iframe", "object", "video", "form", "base"}
    assert links <= {"data:,", "#c1"}
    assert not re.search(r"https?://|url\(|@import", page)
    assert page.count("&lt;script&gt;") >= 3


def test_completions_shown_are_those_of_the_file(online: Path) -> None:
    lines = [json.loads(line) for line in (online / "completions.jsonl").read_text().splitlines()]
    found = samples(read(online, "run"))
    assert found is not None
    assert found.steps == (0, 4)
    for one in found.shown:
        for step, answer in ((0, one.before), (4, one.after)):
            mine = [x for x in lines if not x["training"] and x["step"] == step and x["prompt"] == one.prompt]
            first = min(mine, key=lambda x: x["number"])
            assert answer.text == first["completion"]
            assert answer.facts[0] == f"reward {first['reward']:.4g}"


def test_the_data_is_audited_and_its_loss_or_change_is_noted(
    settings: dict[str, Any], write_rows: Callable[..., str]
) -> None:
    data = write_rows(make_rows("pairs", 12), "pairs.jsonl")
    run = alignkit.run("dpo", data=data, eval_fraction=0.25, **settings | {"max_steps": 2}).folder
    text = words(shown(run))
    assert "12 rows are kept" in text
    assert "has changed" not in text
    assert "'dpo' learns from the answers in its data, and does not sample" in text
    assert "kept as cached" in text
    with open(data, "a") as file:
        file.write(json.dumps({"prompt": "new", "chosen": "a", "rejected": "b"}) + "\n")
    text = words(shown(run))
    assert "pairs.jsonl has changed since the run; this audits the file as it is now." in text
    assert "13 rows are kept" in text
    Path(data).write_text("no rows\n")
    assert "No audit: " in words(shown(run))
    Path(data).unlink()
    assert "pairs.jsonl no longer exists, so it is not audited." in words(shown(run))


def test_a_resumed_run_adds_up_its_cost(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings |= {"data": make_rows("text", 24), "name": "run", "save_every": 2}
    step = Loop.step

    def until(self: Loop, number: int, total: int) -> dict[str, float]:
        if number == 3:
            raise RuntimeError("a bug")
        return step(self, number, total)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "step", until)
        with pytest.raises(RuntimeError):
            alignkit.run("sft", **settings)
    folder = settings["output"] / "run"
    assert "ended ended by an error" in words(shown(folder))
    alignkit.run("sft", **settings, resume=True)
    found = json.loads((folder / "sessions.json").read_text())
    assert len(found) == 2
    text = words(shown(folder))
    assert f"tokens {sum(one['tokens'] for one in found)}" in text.replace(" k", "")
    assert "sessions 2 ended done" in text


# ------------------------------------------------------------------------------------------------------ made-up runs


def test_several_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, seed=i) for i, name in enumerate(("one", "two", "three"))]
    page = shown(*folders)
    Balanced().check(page)
    chart = re.search(r'<svg class="chart"[^>]*aria-label="loss".*?</svg>', page, re.DOTALL)
    assert chart
    styles = re.findall(r'<g class="line"><path d="[^"]+" style="([^"]+)"', chart[0])
    assert len(styles) == 3
    for colour, (dash, style) in enumerate(zip((None, "7,3", "2,2.5"), styles, strict=True)):
        assert f"stroke: var(--s{colour})" in style
        assert f"stroke-dasharray: {dash};" in style if dash else "dasharray" not in style
    text = words(page)
    assert "Settings that differ between the runs setting one two three seed 0 1 2" in text
    assert "one two three with points: held-out rows" in text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / where / "dpo-001") for where in ("a", "b")]
    (chapter,) = chapters(folders)
    assert [run.label for run in chapter.runs] == ["a/dpo-001", "b/dpo-001"]
    with pytest.raises(ConfigError, match="dpo-001 is given twice"):
        chapters([folders[0], tmp_path / "a" / ".." / "a" / "dpo-001"])


def test_a_pipeline_shows_its_stages_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "rlhf"
    for i, name in enumerate(("sft", "reward", "dpo", "x4", "x5", "x6", "x7", "x8", "x9", "x10"), 1):
        write_run(folder / f"{i}-{name}")
    (folder / "pipeline.yaml").write_text("stages: []\n")
    found = chapters([folder])
    assert [c.title for c in found][:3] == ["rlhf: 1-sft", "rlhf: 2-reward", "rlhf: 3-dpo"]
    assert found[-1].title == "rlhf: 10-x10"
    page = shown(folder)
    assert page.index('id="c1"') < page.index('id="c2"')
    assert '<a href="#c3">rlhf: 3-dpo</a>' in page
    Balanced().check(page)
    assert re.findall("<h2[^>]*>(.*?)</h2>", page) == [c.title for c in found]
    levels = [int(n) for n in re.findall(r"<h(\d)", page)]
    assert all(next_ <= level + 1 for level, next_ in pairwise(levels))
    assert page.count('<h3 class="section">Curves</h3>') == len(found)
    alone = tmp_path / "new"
    alone.mkdir()
    (alone / "pipeline.yaml").write_text("stages: []\n")
    with pytest.raises(ConfigError, match=r"no stage of the pipeline .*new has done a step yet"):
        chapters([alone])


def test_alarms_are_on_the_curves_and_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    alarm = {"step": 3, "value": 16.0, "limit": 15.0, "remedy": "raise beta"}
    write_lines(
        run / "alarms.jsonl",
        [alarm | {"name": "kl_high", "message": f"too far {EVIL}"}, alarm | {"name": "other", "message": "and that"}],
    )
    page = shown(run)
    assert "<script" not in page
    text = words(page)
    assert "1 3 kl_high too far" in text
    assert "2 3 other and that raise beta" in text
    assert "Made by alignkit" in text
    charts = page.count('class="chart"')
    assert len(re.findall(r"\n1\. kl_high: too far [^<]*\n2\. other: and that</title></rect>", page)) == charts
    assert page.count(">1,2</text>") == charts
    assert "None was raised" not in text


def test_the_absence_of_alarms_is_not_mistaken_for_health(tmp_path: Path) -> None:
    watched = write_run(tmp_path / "watched")
    unwatched = write_run(tmp_path / "unwatched", health={"enabled": False})
    assert "None was raised." in words(shown(watched))
    text = words(shown(unwatched))
    assert "None was raised" not in text
    assert "The health of this run was not watched." in text


def test_a_long_run_is_a_small_file_in_which_spikes_survive(tmp_path: Path) -> None:
    many = {f"term{k}": lambda i, k=k: (i * 7919 % 1000) / 1000 + k for k in range(24)}
    lines = metric_lines(10_000, **many)
    lines[5000]["term3"] = 77.0
    page = shown(write_run(tmp_path / "run", lines))
    assert len(page.encode()) < 1_000_000
    assert "to 77" in page


def test_numbers_that_are_missing_do_not_stop_it(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": None, "grad_norm": None, "kl": 0.1},
        {"step": 2, "loss": 0.5, "kl": float("nan"), "note": "a word", "flag": True},
        {"step": 3, "loss": float("inf"), "kl": 0.3, "alarm/kl": 3.0, "epoch": 1.0, "skipped": 0},
    ]
    run = write_run(tmp_path / "run", lines)
    assert names([read(run, "run")]) == ["loss", "kl", "skipped"]
    page = shown(run)
    assert "Never changed" not in page
    assert "nan" not in words(page)
    assert "* measured in training, at its first and at its last logged step, not on held-out rows." in words(page)


def test_before_and_after_are_not_made_up_where_there_is_one_value(tmp_path: Path) -> None:
    once = write_run(tmp_path / "once", [{"step": 1, "loss": 0.5, "kl": 0.1}])
    page = shown(once)
    assert "<h2>Results</h2>" in page
    assert "metric unit value loss 0.5 * kl nats a sequence 0.1 * * measured in training, not on held-out rows." in (
        words(page)
    )
    assert not re.search("before|after", words(page).split("Curves")[0])
    first = read(write_run(tmp_path / "first", [{"step": 0, "eval/loss": 0.7}, {"step": 1, "kl": 0.1}]), "first")
    assert results([first]).table == (
        ["metric", "unit", "value"],
        [["loss", "", "0.7"], ["kl", "nats a sequence", "0.1 *"]],
    )


def test_rows_of_training_are_marked_one_by_one(tmp_path: Path) -> None:
    lines = [{"step": 0, "eval/loss": 0.7}, {"step": 1, "kl": 0.1, "entropy": 2.0}, {"step": 2, "kl": 0.2}]
    run = read(write_run(tmp_path / "run", lines), "run")
    found = results([run])
    assert found.table[0] == ["metric", "unit", "before", "after"]
    assert [[row[0], *row[2:]] for row in found.table[1]] == [
        ["loss", "0.7", "-"],
        ["kl", "0.1 *", "0.2 *"],
        ["entropy", "-", "2 *"],
    ]
    other = read(write_run(tmp_path / "other", [{"step": 2, "eval/loss": 0.5}]), "other")
    columns, (loss, *_) = results([run, other]).table
    assert columns[2:] == ["run, before", "run, after", "other, before", "other, after"]
    assert loss[2:] == ["0.7", "-", "-", "0.5"]


def test_runs_with_other_budgets_do_not_share_an_audit(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    write_lines(data, make_rows("pairs", 4))
    runs = [
        write_run(tmp_path / name, data=str(data), max_completion_tokens=n)
        for name, n in (("one", 64), ("two", 1), ("three", 64))
    ]
    found = audit_sources([read(run, run.name) for run in runs])
    assert [one.runs for one in found] == [["one", "three"], ["two"]]
    assert [list(one.notes.values()) for one in found] == [[["one", "three"]], [["two"]]]  # no checksum was kept
    text = words(shown(*runs))
    assert "Runs: one, three." in text
    assert "Runs: two." in text
    data.write_text("no rows\n")
    assert [len(one.notes) for one in audit_sources([read(run, run.name) for run in runs])] == [2, 2]


def test_a_note_on_the_data_names_the_runs_that_it_is_about(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    write_lines(data, make_rows("pairs", 4))
    runs = [write_run(tmp_path / name, data=str(data)) for name in ("one", "two")]
    (runs[0] / "sessions.json").write_text(json.dumps([{"facts": {"data_sha256": digest(str(data))}}]))
    assert f"two: data: the run kept no checksum, so {data} may have changed since." in words(shown(*runs))


def test_what_never_changed_and_what_is_the_same_is_not_drawn_again(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 1 / i, "sigmoid": 1 / i, "lr": 0.5} for i in range(1, 7)]
    run = read(write_run(tmp_path / "run", lines), "run")
    first, second = groups([run], [])
    assert [(p.name, p.same) for p in first.panels] == [("loss", ["sigmoid"])]
    assert (second.panels, second.constant) == ([], ["lr 0.5"])


def test_settings_that_differ_from_the_defaults_come_first(tmp_path: Path) -> None:
    given = {"batch_size": 8, "sampling": {"temperature": 0.5}, "lora": {"r": 8}}
    run = read(write_run(tmp_path / "run", **given), "run")
    adapters = [row for row in changed(run) if row[0].startswith("lora.")]
    assert [row[0] for row in adapters] == [f"lora.{name}" for name in LoraSettings.model_fields]
    assert ("lora.r", "8", "-") in adapters
    assert [row for row in changed(run) if row not in adapters] == [
        ("method", "dpo", "-"),
        ("model", "some/base", "-"),
        ("data", "some/pairs", "-"),
        ("sampling.temperature", "0.5", "1.0"),
        ("batch_size", "8", "32"),
    ]
    other = read(write_run(tmp_path / "other", batch_size=8), "other")
    assert ["sampling.temperature", "0.5", "1.0"] in between([run, other])
    assert not any(row[0] == "batch_size" for row in between([run, other]))


def test_a_method_that_is_not_installed_stops_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", method="of-a-stranger")
    assert ("beta", "0.1", "-") in changed(read(run, "run"))
    assert "of-a-stranger" in words(shown(run))


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.44, "3.4 s"), (42.4, "42 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (59.7, "60 s")]
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"), [(7, "7"), (9999, "9 999"), (61440, "61.4 k"), (903936, "904 k"), (1_235_000_000, "1.24 B")]
)
def test_counts(n: int, text: str) -> None:
    assert count(n) == text


def test_sizes() -> None:
    assert (memory(649 * 2**20), memory(19.44 * 2**30)) == ("649 MiB", "19.4 GiB")


# ---------------------------------------------------------------------------------------------------- bad folders


def test_a_line_that_was_cut_off_is_left_out_with_a_note(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    whole = read(run, "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    cut = read(run, "run")
    assert cut.lines == whole.lines
    assert "metrics.jsonl: the last line was cut off while it was written, and is left out." in words(shown(run))
    assert not any("cut off" in note for note in whole.notes)


def test_garbage_in_the_middle_is_named_with_its_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], "garbage", *lines[2:]]) + "\n")
    with pytest.raises(AlignkitError, match=r"metrics\.jsonl, line 3"):
        read(run, "run")


def test_folders_that_are_no_runs_are_refused_with_what_to_do(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "dpo-001")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (tmp_path / "runs" / "dpo-009", r"there is no folder .*dpo-009; runs in .*runs: dpo-001"),
        (empty, r"empty is not the folder of a run: it has no config\.yaml$"),
        (tmp_path / "runs", r"it has no config\.yaml; runs in it: dpo-001; try: alignkit report .*dpo-001"),
        (run / "config.yaml", r"config\.yaml is a file; give the run's folder, such as .*dpo-001"),
    ]
    for folder, message in cases:
        with pytest.raises(ConfigError, match=message):
            chapters([folder])
    with pytest.raises(ConfigError, match="no run given"):
        chapters([])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "name: my-site\nport: 80\n", r"config\.yaml is not a run's: it has no `method`"),
        ("config.yaml", "method: dpo\nmodel: m\ndata: d\nbatch_size: many\n", r"is not a run's: batch_size: "),
        ("config.yaml", "- 1\n", r"config\.yaml must contain settings"),
        ("config.yaml", "a: [", r"config\.yaml is not YAML"),
        ("metrics.jsonl", "", r"metrics\.jsonl is empty: the run has done no step yet"),
        ("metrics.jsonl", '{"loss": 1}\n{"step": 1}\n', r"metrics\.jsonl, line 1"),
        ("sessions.json", "{", r"cannot read .*sessions\.json"),
    ],
)
def test_damaged_files_are_named(file: str, text: str, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / file).write_text(text)
    with pytest.raises(AlignkitError, match=message):
        read(run, "run")


@pytest.mark.parametrize("text", ['{"step": 1}', "[" * 100_000, '{"step": ' + "9" * 400 + "}", "7"])
def test_a_line_that_no_run_writes_is_named(text: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    whole = '{"step": 0, "training": false, "prompt": "a", "completion": "b"}'
    for name in ("completions.jsonl", "metrics.jsonl"):
        if (name, text) != ("metrics.jsonl", '{"step": 1}'):
            (run / name).write_text(f"{whole}\n{text}\n{whole}\n")
            with pytest.raises(AlignkitError, match=rf"{name}, line 2, is not a JSON object with a step"):
                read(run, "run")
        (run / name).write_text(f"{whole}\n")
    (run / "metrics.jsonl").write_text(f"{whole}\n{'[' * 100_000}\n")
    assert "the last line was cut off" in words(shown(run))


def test_numbers_that_no_axis_can_hold_do_not_stop_it(tmp_path: Path) -> None:
    huge = {"loss": 10**400, "reward/mean": -(10**5000), "kl": 1e308, "entropy": -1e308, "grad_norm": 5e-324}
    lines = [{"step": 1, **huge}, {"step": 2, **{k: i / 4 for i, k in enumerate(huge)}, "grad_norm": 1e-323}]
    text = "".join(json.dumps(line) + "\n" for line in [lines[0] | {"reward/mean": "HUGE"}, lines[1]])
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(text.replace('"HUGE"', "-" + "9" * 5000))
    answers = [
        {"step": step, "training": False, "prompt": "a", "completion": "b", "reward": r}
        for step, r in ((0, 10**400), (1, float("nan")), (2, 0.5))
    ]
    write_lines(run / "completions.jsonl", answers)
    page = shown(run)
    Balanced().check(page)
    for name in huge:
        assert f'aria-label="{name}' in page
    assert "reward 0.5" in words(page)
    assert not re.search(r"\b(nan|inf)\b", words(page))


def test_a_run_without_metrics_or_with_poor_sessions(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "sessions.json").write_text("[{}]")
    assert "Environment and cost" in words(shown(run))
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl: the run has done no step yet"):
        read(run, "run")


# ---------------------------------------------------------------------------------------------------- command line


def test_the_command_writes_the_file_and_refuses_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["alignkit", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    run = write_run(tmp_path / "run")
    assert command("report", str(run), "--output", str(tmp_path / "out.html"))[:2] == (
        0,
        f"report: {tmp_path / 'out.html'}\n",
    )
    assert (tmp_path / "out.html").read_text().startswith("<!DOCTYPE html>")
    code, _, err = command("report", str(tmp_path / "nothing"))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: there is no folder")
    code, _, err = command("report", str(run), "--output", str(tmp_path))
    assert code == 2
    assert "is a folder" in err


# ------------------------------------------------------------------------------------------------------- a browser


@pytest.mark.slow
def test_in_chromium_nothing_runs_nothing_is_fetched_and_nothing_is_complained_of(online: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    page = report([online], tmp_path / "report.html")
    # a page whose script runs, to know that a script would be seen
    control = tmp_path / "control.html"
    control.write_text(f"<!DOCTYPE html><title>before</title><body>{EVIL}</body>")
    seen = []
    for file in (page, control):
        ran = subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", file.as_uri(),
            ],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        errors = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
        seen.append((re.search("<title>(.*?)</title>", ran.stdout)[1], errors))  # type: ignore[index]
    assert seen[0] == ("Report on grpo", [])
    assert seen[1][0] == "taken"
    assert any("taken" in line for line in seen[1][1])
