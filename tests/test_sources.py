"""Where rows come from: several files, folders of files, compressed files, repositories of data sets, mixtures."""

from __future__ import annotations

import copy
import gzip
import json
import pickle
from pathlib import Path

import datasets
import pyarrow
import pytest

from alignkit.config import RunConfig, write_yaml
from alignkit.config import read_yaml as read_settings
from alignkit.data import FaultyRowsError, load, read_rows
from alignkit.data.rows import RowNumber
from alignkit.data_spec import plain, short_names, sources_of, suffix_of
from alignkit.errors import AlignkitError, ConfigError, DataError


def lines(*texts: object) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def texts(source: object, **options: object) -> list[str]:
    return [row.completions[0] for row in load(source, "text", **options).rows]  # type: ignore[arg-type, misc]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of two shards, whose names sort against the order of writing, and a file that is not data."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "part-2.jsonl").write_text(lines("c", "d"))
    (folder / "part-1.jsonl").write_text(lines("a") + "\n" + lines("b"))
    (folder / "LICENSE").write_text("MIT")
    return folder


# ---- several files --------------------------------------------------------------------------------------------------


def test_a_folder_a_glob_and_a_list_read_all_their_files_in_order(shards: Path) -> None:
    first, second = sorted(shards.glob("*.jsonl"))
    assert texts(shards) == texts(f"{shards}/part-*.jsonl") == texts([first, str(second)]) == ["a", "b", "c", "d"]
    assert texts([second, first]) == ["c", "d", "a", "b"]
    assert texts({"path": str(first)}) == ["a", "b"]
    assert texts([str(second), str(shards)]) == ["c", "d", "a", "b", "c", "d"]


def test_a_glob_goes_down_into_folders(shards: Path) -> None:
    (shards / "more").mkdir()
    (shards / "more" / "part-3.jsonl").write_text(lines("e"))
    assert texts(f"{shards}/**/*.jsonl") == ["e", "a", "b", "c", "d"]  # sorted by path: more/ comes before part-1
    assert texts(f"{shards}/*") == ["a", "b", "c", "d"] if (shards / "LICENSE").unlink() is None else None


def test_the_number_of_a_row_names_its_file(shards: Path) -> None:
    (shards / "part-2.jsonl").write_text(lines("c") + "{broken\n" + lines(5))
    with pytest.raises(FaultyRowsError) as error:
        load(shards, "text")
    second = shards / "part-2.jsonl"
    said = str(error.value).splitlines()
    assert said[0] == f"{shards}: 2 faults"
    assert said[1].startswith(f"  row 2 of {second}: not JSON")
    assert said[2].startswith(f"  row 3 of {second}, column 'text': found 5")


def test_dropped_rows_name_their_file_and_numbers_do_not_repeat(shards: Path) -> None:
    (shards / "part-2.jsonl").write_text(lines("c", " "))
    dataset = load(shards, "text")
    assert dataset.lines() == [
        f"{shards}: 4 rows of the form 'text', read as text",
        f"dropped 1 of 4 rows: 1 empty answer (row 2 of {shards / 'part-2.jsonl'})",
    ]
    # part-1.jsonl has three lines, the second one empty: the numbers of part-2.jsonl begin at 4
    assert [(row.row, str(row.row)) for row in dataset] == [
        (1, f"1 of {shards / 'part-1.jsonl'}"),
        (3, f"3 of {shards / 'part-1.jsonl'}"),
        (4, f"1 of {shards / 'part-2.jsonl'}"),
    ]


def test_a_row_number_is_a_number_that_survives_copies_and_other_processes() -> None:
    number = RowNumber(20, 3, "b.jsonl")
    for same in (number, copy.deepcopy(number), pickle.loads(pickle.dumps(number))):
        assert (same, f"row {same}", same + 0, json.dumps([same])) == (20, "row 3 of b.jsonl", 20, "[20]")
        assert (same.own, same.file) == (3, "b.jsonl")


def test_sources_of_a_list_have_forms_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines("a"))
    (tmp_path / "b.csv").write_text('prompt,completion\nq,b\n"[1]",c\n')
    dataset = load([tmp_path / "a.jsonl", tmp_path / "b.csv"], "text")
    assert [(row.prompt, row.completions, row.source) for row in dataset] == [
        ("", ("a",), "a"),
        ("q", ("b",), "b"),
        ("[1]", ("c",), "b"),
    ]
    assert dataset.found() == [
        f"{tmp_path / 'a.jsonl'}: 1 rows of the form 'text', read as text",
        f"{tmp_path / 'b.csv'}: 2 rows of the form 'completion', read as text",
    ]
    assert (dataset.form, dataset.kinds, dataset.report.total) == ("text, completion", ("text", "prompts"), 3)
    with pytest.raises(DataError, match=r"a\.jsonl: found rows of the form 'text'"):
        load([tmp_path / "a.jsonl", tmp_path / "b.csv"], "pairs")


def test_the_faults_of_all_sources_come_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(lines("x", None))
    with pytest.raises(FaultyRowsError) as error:
        load([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], "text")
    assert [str(fault.row) for fault in error.value.faults] == [
        f"2 of {tmp_path / 'a.jsonl'}",
        f"2 of {tmp_path / 'b.jsonl'}",
    ]
    assert str(error.value).startswith("2 sources: 2 faults\n")


def test_columns_of_a_source_replace_those_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "1", "a": "2"}')
    (tmp_path / "b.jsonl").write_text('{"x": "3", "y": "4"}')
    own = {"path": str(tmp_path / "b.jsonl"), "columns": {"prompt": "x", "completion": "y", "form": "completion"}}
    columns = {"prompt": "q", "completion": "a"}
    rows = load([str(tmp_path / "a.jsonl"), own], "text", columns).rows
    assert [(row.prompt, row.completions) for row in rows] == [("1", ("2",)), ("3", ("4",))]


@pytest.mark.parametrize(
    ("there", "source", "said"),
    [
        (["a.jsonl", "b.csv"], ".", r"holds files of different kinds \(a\.jsonl, b\.csv\); read one kind: .*/\*\.csv"),
        (["a.jsonl", "b.csv"], "?.*", r"different kinds .*; read one kind: name files of one kind, such as \*\.csv"),
        (["LICENSE"], ".", r"holds no \.jsonl, .* file, and datasets\.save_to_disk did not write it; it holds LICENSE"),
        ([], ".", "it is empty"),
        (["a.jsonl"], "b*.jsonl", r"no file matches .*b\*\.jsonl; the folder .* holds: a\.jsonl"),
        (["a.jsonl"], "nowhere/*.jsonl", "no file matches .*: the folder .*nowhere does not exist"),
        (["a.txt"], "*.txt", r"cannot read '\.txt' files"),
    ],
)
def test_files_that_are_not_there_or_do_not_belong_together(
    there: list[str], source: str, said: str, tmp_path: Path
) -> None:
    for name in there:
        (tmp_path / name).write_text("text\nx")
    with pytest.raises(DataError, match=said):
        load(tmp_path / source, "text")


# ---- compressed files -----------------------------------------------------------------------------------------------


def test_compressed_text_files_are_read(tmp_path: Path) -> None:
    content = {"a.jsonl": lines("ä", "b"), "b.json": '[{"text": "c"}]', "c.csv": "text\nd\n"}
    for name, text in content.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        with pyarrow.output_stream(str(tmp_path / f"{name}.zst"), compression="zstd") as file:
            file.write(text.encode())
    for suffix in ("gz", "zst"):
        assert texts(tmp_path / f"a.jsonl.{suffix}") == ["ä", "b"]
        assert texts(tmp_path / f"b.json.{suffix}") == ["c"]
        assert texts(tmp_path / f"c.csv.{suffix}") == ["d"]
    two = gzip.compress(lines("a").encode()) + gzip.compress(lines("b").encode())
    (tmp_path / "two.jsonl.gz").write_bytes(two)
    assert texts(tmp_path / "two.jsonl.gz") == ["a", "b"]
    assert texts(f"{tmp_path}/[a]*.jsonl.*") == ["ä", "b"] * 2


@pytest.mark.parametrize(
    ("name", "cut", "said"),
    [
        ("a.jsonl.gz", slice(0, 25), "not a complete gzip file"),
        ("a.jsonl.gz", slice(3, None), "not a complete gzip file"),
        ("a.jsonl.zst", slice(0, None), "a.jsonl.zst: cannot be read"),
        ("a.parquet.gz", slice(0, None), r"a Parquet file is compressed inside; unpack it to .*a\.parquet$"),
        ("a.txt.gz", slice(0, None), "cannot read '.gz' files"),
    ],
)
def test_compressed_files_that_cannot_be_read(name: str, cut: slice, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(lines("a", "b").encode())[cut])
    with pytest.raises(DataError, match=said):
        load(tmp_path / name, "text")


def test_the_suffix_of_a_file_is_the_one_before_its_compression() -> None:
    names = ["a.jsonl", "a.JSONL.GZ", "a.b.csv.zst", "a.gz", "a"]
    assert [suffix_of(name) for name in names] == [".jsonl", ".jsonl", ".csv", "", ""]


# ---- repositories of data sets --------------------------------------------------------------------------------------

README = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train-*.jsonl}
  - {split: test, path: en/test.jsonl}
- config_name: de
  data_files:
  - {split: train, path: de.jsonl}
---
# Two languages
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local copy of a repository on the hub, with two configurations."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "copy"
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(README)
    (folder / "en/train-0.jsonl").write_text(lines("a", "b"))
    (folder / "en/train-1.jsonl").write_text(lines("c"))
    (folder / "en/test.jsonl").write_text(lines("t"))
    (folder / "de.jsonl").write_text(lines("ä"))
    return folder


def test_configuration_and_split_of_a_repository(repository: Path) -> None:
    path = str(repository)
    assert texts(f"{path}:en:train") == texts({"path": path, "name": "en"}) == ["a", "b", "c"]
    assert texts(f"{path}:en:test") == texts({"path": path, "name": "en", "split": "test"}) == ["t"]
    assert texts({"path": path, "name": "de"}) == ["ä"]
    assert texts([f"{path}:de:train", f"{path}:en:test"]) == ["ä", "t"]


@pytest.mark.parametrize(
    ("split", "want"),
    [("train[:2]", "ab"), ("train[-1:]", "c"), ("train[:34%]+test", "at"), ("test+train[1:2]", "tb")],
)
def test_slices_of_splits(split: str, want: str, repository: Path) -> None:
    mapping = {"path": repository, "name": "en", "split": split}
    assert texts(f"{repository}:en:{split}") == texts(mapping) == list(want)


def test_the_splits_of_a_repository_without_configurations(repository: Path) -> None:
    (repository / "en/README.md").write_text("# No configurations are declared: files are splits by their names")
    assert texts(f"{repository}/en:train") == ["a", "b", "c"]
    assert texts(f"{repository}/en:test[:1]") == ["t"]
    assert texts(f"{repository}/en") == ["t", "a", "b", "c"]  # a folder of files, in the order of their names


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "Config name is missing"),
        (":fr:train", "configuration 'fr', split 'train': .*'fr' not found"),
        (":en:dev", "configuration 'en', split 'dev': .*Unknown split"),
        (":en:train[:x]", "split 'train\\[:x\\]'"),
    ],
)
def test_a_configuration_or_a_split_that_is_not_there(source: str, said: str, repository: Path) -> None:
    with pytest.raises(DataError, match=said) as error:
        load(f"{repository}{source}", "text")
    assert "from the hub" not in str(error.value)


def test_a_name_on_the_hub_has_configuration_split_and_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list([{"text": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    named = ["org/name", "org/name:test", "org/name:main:test", "org/name:train[:1000]", "org/n:v1.0:a[:5%]+b"]
    assert [load(name, "text").source for name in named] == [
        "org/name:train", "org/name:test", "org/name:main:test", "org/name:train[:1000]", "org/n:v1.0:a[:5%]+b"
    ]  # fmt: skip
    load({"path": "gsm8k", "name": "main"}, "text")  # an old name without an owner
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", None, "test"),
        ("org/name", "main", "test"),
        ("org/name", None, "train[:1000]"),
        ("org/n", "v1.0", "a[:5%]+b"),
        ("gsm8k", "main", "train"),
    ]


def test_splits_of_a_folder_that_was_saved_to_disk(tmp_path: Path) -> None:
    rows = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "both")
    rows["test"].save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "both") == ["train"]
    assert texts(f"{tmp_path}/both:test") == texts({"path": str(tmp_path / "both"), "split": "test"}) == ["test"]
    with pytest.raises(DataError, match=r"has the splits test, train; found '.*both:dev'"):
        load(f"{tmp_path}/both:dev", "text")
    with pytest.raises(DataError, match="holds one data set without splits"):
        load(f"{tmp_path}/one:train", "text")
    (tmp_path / "one/data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"one: not a complete folder of datasets\.save_to_disk"):
        load(tmp_path / "one", "text")


def test_a_file_has_no_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines("a"))
    with pytest.raises(ConfigError, match=r"a\.jsonl is a file, which has no split 'test'; name a folder"):
        load({"path": str(tmp_path / "a.jsonl"), "split": "test"}, "text")


# ---- what a setting may name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"path": "a", "wieght": 0.3}], r"source 1 has the unknown key 'wieght'\. Did you mean 'weight'\?"),
        ({"split": "test"}, "the source, path: Field required"),
        (["a", {"path": "b", "weight": 0}], r"source 2, weight: .*greater than 0 \(given: 0\)"),
        (
            ["a", {"path": "b", "weight": 1}],
            "a has no weight, but other sources have one; give all of them one, or none",
        ),
        ([{"path": "b", "columns": "x"}], "source 1, columns: "),
    ],
)
def test_a_source_that_is_described_wrongly(value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sources_of(value)
    with pytest.raises(ValueError, match=said):
        RunConfig(method="m", model="m", data=value)


def test_rows_are_not_taken_for_sources() -> None:
    rows = [{"path": "a.py", "text": "x"}, {"path": "b.py", "text": "y"}]
    assert sources_of(rows) is None
    assert texts(rows) == ["x", "y"]
    assert sources_of([]) is None
    assert sources_of(datasets.DatasetDict()) is None


def test_sources_are_written_into_the_settings_as_they_were_given(tmp_path: Path) -> None:
    given = ["a.jsonl", {"path": Path("b"), "split": "test"}]
    config = RunConfig(method="m", model="m", data=given, eval_data={"path": "c"})
    write_yaml(tmp_path / "config.yaml", config.describe())
    again = read_settings(tmp_path / "config.yaml")
    assert again["data"] == ["a.jsonl", {"path": "b", "split": "test"}]
    assert again["eval_data"] == "c"
    assert plain(Path("a")) == "a"
    assert plain([{"text": "a row"}]) is None


def test_sources_have_short_names_that_differ() -> None:
    paths = [
        "data/math.jsonl",
        "org/code:main:train[:5]",
        "more/math.jsonl.gz",
        "shards/*.jsonl",
        "math-2/",
        "b/x[12].csv",
    ]
    assert short_names(paths) == ["math", "code", "math-2", "shards", "math-2-2", "b"]


def test_read_rows_keeps_faults_and_parts(shards: Path) -> None:
    raw = read_rows([str(shards), str(shards / "part-1.jsonl")])
    assert (len(raw), len(raw.parts), raw.last) == (6, 2, 8)  # 3 + 2 lines, then 3 again
    kept = raw.only({1, 4})
    assert [n for n, _ in kept] == [n for part in kept.parts for n, _ in part] == [1, 4]


@pytest.mark.parametrize("source", [["a", 1], ["a", None], 5, ["a", ["b"]]])
def test_anything_else_is_refused_with_an_alignkit_error(source: object) -> None:
    with pytest.raises(AlignkitError):
        load(source, "text")


def test_null_fields_that_a_columnar_file_adds_are_no_arguments(tmp_path: Path) -> None:
    def call(name: str, **arguments: object) -> dict[str, object]:
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]}

    rows = [call("weather", city="Oslo"), call("add", a=1, b=2)]
    tables = datasets.Dataset.from_list(rows)
    tables.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [row.completions for row in load(tmp_path / "rows.jsonl", "text")]
    for source in (tmp_path / "rows.parquet", tables):
        assert [row.completions for row in load(source, "text")] == expected


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_under_the_suffix_of_jsonl_is_read(indent: int | None, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "n": [1]}, {"prompt": "b", "n": []}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n " + json.dumps(rows, indent=indent), encoding="utf-8-sig")
    assert list(read_rows(str(path))) == [(1, rows[0]), (2, rows[1])]


def test_a_broken_json_array_is_one_fault(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.json"):
        (tmp_path / name).write_text('[\n{"prompt": "a"}\n{"prompt": "b"}\n]\n')
        with pytest.raises(
            DataError, match=rf"{name}: begins with '\[', as a JSON array does, and is not one \(.*line 3"
        ):
            read_rows(str(tmp_path / name))
