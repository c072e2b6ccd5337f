"""Columns of the rows that a method declares, and those that nothing reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from alignkit import Batch, Context, Method, Models, Term, registry
from alignkit.config import RunConfig
from alignkit.data import blocks, load, shelf
from alignkit.data.blocks import encoded
from alignkit.data.tokenise import tokenised
from alignkit.engine import Engine, reading
from alignkit.engine.reading import read
from alignkit.errors import DataError, PluginError
from alignkit.plugin_checks import check_class
from alignkit.testing import Bench, Conformance, Cut, tiny_examples, tiny_rows, tiny_tokenizer, train
from alignkit.testing.bench import assert_same
from alignkit.testing.runs import vowels
from alignkit_kernels import sequence_sum
from helpers import make_rows

COLUMNS = {"weight": float, "level": int, "easy": bool, "topic": str, "tags": list, "about": dict}
VALUES = {"weight": 0.5, "level": 3, "easy": True, "topic": "owls", "tags": ["a"], "about": {"k": 1}}


class Weighted(Method[Any]):
    """Fine-tuning with a weight for each row."""

    name = "weighted"
    data = "text"
    columns = {"weight": float, "topic": str}

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        assert all(isinstance(topic, str) for topic in batch.columns["topic"])
        logps = sequence_sum(models.policy(batch).logps, batch.cu_seqlens)
        return {"weighted": Term(-batch.columns["weight"] * logps)}


class TestWeighted(Conformance):
    """The whole kit: rows and examples have the declared columns, cut or not."""

    method = Weighted

    def expected(self, config: Any, row: Any) -> float:
        return -row.example.declared["weight"] * row.only.logp


def rows(n: int = 8, **changed: Any) -> list[dict[str, Any]]:
    return [{**row, **VALUES, **changed} for row in make_rows("text", n)]


def found(given: Any, columns: dict[str, str] | None = None, wanted: Any = COLUMNS) -> Any:
    return encoded(given, "text", columns, lambda part: tokenised(part, tiny_tokenizer()), wanted=wanted)


def test_values_come_as_tensors_and_lists_in_the_order_of_the_examples() -> None:
    given = [{**row, **VALUES, "weight": i / 2, "topic": f"t{i}"} for i, row in enumerate(make_rows("text", 3))]
    examples = found(given).examples
    batch = Bench(Weighted(Weighted.Config()), models=object()).context(list(examples)).shard(list(examples))
    columns = batch.columns
    assert torch.equal(columns["weight"], torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(columns["level"], torch.tensor([3, 3, 3]))
    assert torch.equal(columns["easy"], torch.tensor([True] * 3))
    assert columns["topic"] == ["t0", "t1", "t2"]
    assert columns["tags"] == [["a"]] * 3
    assert columns["about"] == [{"k": 1}] * 3
    chosen = batch.select([2, 0]).columns
    assert chosen["weight"].tolist() == [1.0, 0.0]
    assert chosen["topic"] == ["t2", "t0"]
    with pytest.raises(KeyError, match="no column 'wieght'; the method's `columns` declares: weight, level"):
        columns["wieght"]


def columns_of(examples: Any) -> dict[str, Any]:
    given = [*examples]
    return dict(Bench(Weighted(Weighted.Config()), models=object()).context(given).shard(given).columns)


@pytest.mark.parametrize("kind", ["text", "prompts"])
def test_a_second_run_gets_the_same_columns_from_the_kept_rows(
    tiny: str, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, kind: Any
) -> None:
    class Declares(Weighted):
        data = kind
        columns = COLUMNS

    class Fewer(Declares):
        columns = {"weight": float}

    monkeypatch.setattr(shelf, "LEAST", 1)
    caplog.set_level(logging.INFO, logger="alignkit")
    changed = [{"weight": i / 3, "level": i, "easy": i % 2 == 0, "topic": f"\u00fc{i}", "id": i} for i in range(9)]
    path = write_rows([{**row, **more} for row, more in zip(rows(9), changed, strict=True)])
    other = write_rows(rows(4, weight=2, id=0), "other.jsonl")
    config = RunConfig(method="weighted", model="m", data=[path, other], output=tmp_path, eval_fraction=0.2)
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def run(method: type[Method[Any]] = Declares) -> tuple[Any, list[str]]:
        caplog.clear()
        splits = read(config, method(method.Config()), tokenizer, keep=True)
        return splits, [line for line in caplog.messages if "kept by an earlier run" not in line]

    first, lines = run()
    with monkeypatch.context() as patch:
        patch.setattr(reading, "encoded", list)  # called, it would fail
        second, again = run()
    assert again == lines
    assert "columns that nothing reads: " + ("id" if kind == "text" else "completion, id") in lines
    assert second.digest == first.digest
    for before, after in ((first.train, second.train), (first.held_out, second.held_out)):
        expected, got = columns_of(before), columns_of(after)
        assert [*got] == [*expected] == [*COLUMNS]
        for name, values in expected.items():
            assert type(got[name]) is type(values)
            assert torch.equal(got[name], values) if isinstance(values, torch.Tensor) else got[name] == values
    given = sorted([*(more["weight"] for more in changed), 2.0, 2.0, 2.0, 2.0])
    assert sorted(e.declared["weight"] for e in [*second.train, *second.held_out]) == given
    fewer, _ = run(Fewer)
    assert [*columns_of(fewer.train)] == ["weight"]


def test_a_column_that_begins_late_is_missing_in_the_rows_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 2)
    given = rows(5)
    for row in given[:3]:
        del row["weight"]
    with pytest.raises(DataError) as whole:
        load(given, "text", wanted=COLUMNS)
    with pytest.raises(DataError) as by_blocks:
        found(given)
    assert str(by_blocks.value) == str(whole.value)
    assert "row 3, column 'weight': the column is missing" in str(whole.value)


def test_a_csv_cell_is_read_as_its_type(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion,weight,level,easy,topic,tags\na,b,0.5,3,True,17,"[""x""]"\n')
    (example,) = found(str(file), wanted={k: v for k, v in COLUMNS.items() if k != "about"}).examples
    assert example.declared == {"weight": 0.5, "level": 3, "easy": True, "topic": "17", "tags": ["x"]}


def test_both_rows_of_a_pair_have_its_columns() -> None:
    pairs = [{**row, "weight": float(i)} for i, row in enumerate(make_rows("pairs", 2))]
    made = encoded(pairs, "unpaired", None, lambda p: tokenised(p, tiny_tokenizer()), wanted={"weight": float}).examples
    assert [e.declared["weight"] for e in made] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("weight", None, "column 'weight': found None; give a finite number, which the method reads"),
        ("weight", "heavy", "column 'weight': found 'heavy'; give a finite number"),
        ("weight", True, "column 'weight': found True"),
        ("weight", float("nan"), "column 'weight': found nan"),
        ("level", 1.5, "column 'level': found 1.5; give a whole number"),
        ("easy", "maybe", "column 'easy': found 'maybe'; give true or false"),
        ("topic", 3, "column 'topic': found 3; give text"),
        ("tags", "a", "column 'tags': found 'a'; give a list"),
        ("about", [], r"column 'about': found \[\]; give an object"),
    ],
)
def test_a_wrong_value_names_its_row(column: str, value: Any, said: str) -> None:
    given = rows(3)
    given[1][column] = value
    with pytest.raises(DataError, match=f"row 2, {said}"):
        found(given)


def test_a_missing_value_names_its_row_and_a_missing_column_what_is_there() -> None:
    given = rows(3)
    del given[2]["weight"]
    with pytest.raises(DataError, match="row 3, column 'weight': the column is missing; give a finite number"):
        found(given)
    renamed = [{("wieght" if k == "weight" else k): v for k, v in row.items()} for row in rows(3)]
    said = (
        r"no row has the column 'weight', which the method reads\. Did you mean 'wieght'\? Columns: about, completion"
    )
    with pytest.raises(DataError, match=said):
        found(renamed)
    assert found(renamed, {"weight": "wieght"}).examples[0].declared["weight"] == 0.5


def test_a_step_does_not_depend_on_how_it_is_cut_with_columns() -> None:
    bench = Bench(Weighted(Weighted.Config()))
    examples = tiny_examples("text", columns=Weighted.columns)
    assert len({e.declared["weight"] for e in examples}) > 2
    assert_same(bench.step(examples), bench.step(examples, Cut(max_tokens=1, ranks=2)), "the cut")


def test_columns_are_part_of_the_digest_only_where_they_are_declared(tmp_path: Path) -> None:
    def digest(method: type[Method[Any]], given: list[dict[str, Any]]) -> str:
        config = RunConfig(method="weighted", model="m", data=given)
        return read(config, method(method.Config()), tiny_tokenizer()).digest

    class Plain(Weighted):
        columns = {}

    plain = [{k: v for k, v in row.items() if k in ("prompt", "completion")} for row in rows()]
    assert digest(Plain, rows()) == digest(Plain, plain)
    assert digest(Weighted, rows()) != digest(Plain, plain)
    assert digest(Weighted, rows()) != digest(Weighted, rows(weight=0.25))
    # what a build before columns computed for these rows
    assert digest(Plain, plain) == BEFORE


BEFORE = "d39f14df67b7422c40f825ebd0f0d9f6a11252d340d683ce8f34e43ba02ceac1"


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_nothing_reads_are_named_once(
    tmp_path: Path, caplog: Any, write_rows: Any, streaming: bool
) -> None:
    caplog.set_level(logging.INFO, logger="alignkit")
    more = {"streaming": True} if streaming else {"eval_data": rows(4, id=1)}
    train(Weighted, tmp_path, data=write_rows(rows(id=1, source="web")), **more)
    lines = [r.getMessage() for r in caplog.records if "nothing reads" in r.getMessage()]
    assert lines == ["columns that nothing reads: about, easy, id, level, source, tags"]


def test_what_rewards_and_order_read_is_not_named(tmp_path: Path, caplog: Any) -> None:
    class Samples(Method[Any]):
        name = "samples"
        data = "prompts"
        uses = frozenset({"policy", "reward"})

        def collect(self, batch: Batch, ctx: Context) -> Batch:
            return ctx.rollouts(batch)

        def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
            return {"samples": Term(-batch["rewards"] * sequence_sum(models.policy(batch).logps, batch.cu_seqlens))}

    def reward(completions: list[str], answer: list[str]) -> list[float]:
        return [float(len(a)) for a in answer]

    caplog.set_level(logging.INFO, logger="alignkit")
    given = [{**row, "answer": "a", "level": i, "id": i} for i, row in enumerate(tiny_rows("prompts"))]
    train(Samples, tmp_path, data=given, reward=reward, order_by="level", max_steps=1)
    assert [m for r in caplog.records if "nothing reads" in (m := r.getMessage())] == ["columns that nothing reads: id"]
    caplog.clear()
    train(Samples, tmp_path, data=given, reward=vowels, max_steps=1)  # it takes **columns
    assert not [r for r in caplog.records if "nothing reads" in r.getMessage()]


def test_validate_checks_columns(
    command: Any, tmp_path: Path, tiny: str, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "get", lambda name: Weighted)
    write_rows(make_rows("text", 8))
    (tmp_path / "run.yaml").write_text(json.dumps({"method": "weighted", "model": tiny, "data": "rows.jsonl"}))
    code, _, said = command("validate", "run.yaml")
    assert code == 2
    assert "no row has the column 'weight', which the method reads. Columns: completion, prompt" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("weight",), "it must be a mapping of names to types"),
        ({"weight": "float"}, "declares the column 'weight' as 'float'; types: float, int"),
        ({"when": complex}, "declares the column 'when'"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_a_broken_plugin(given: Any, said: str) -> None:
    class Wrong(Weighted):
        columns = given

    with pytest.raises(PluginError, match=said):
        check_class(Wrong)


def test_a_pipeline_checks_columns_before_its_first_stage(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "get", lambda name: Weighted)
    stage = {"method": "weighted", "data": make_rows("text", 8)}
    with pytest.raises(DataError, match="no row has the column 'weight', which the method reads"):
        Engine(model=tiny, output=tmp_path).pipeline([stage])
    mapped = [{**row, "importance": 1.0, "topic": "owls"} for row in make_rows("text", 8)]
    stage |= {"data": mapped, "columns": {"weight": "importance"}, "max_steps": 1, "device": "cpu", "batch_size": 2}
    assert Engine(model=tiny, output=tmp_path / "good").pipeline([stage]).stages
