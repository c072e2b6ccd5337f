"""The examples of a source in a folder: rows.bin, all their arrays, and about.json, which names them and their report.

Every process of a machine that maps rows.bin shares its pages.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.data.blocks import Encoded
from alignkit.data.dataset import Dataset
from alignkit.data.rows import Report, RowNumber
from alignkit.data.store import Arrays, Examples
from alignkit.files import sha256

VERSION = 1  # of the format
_ROWS, _ABOUT = "rows.bin", "about.json"
_SURROGATE = re.compile("[\ud800-\udfff]")
_ALIGNED = 64  # bytes at which arrays begin


class NotJSONError(Exception):
    """A row holds a value that JSON does not give back as it was, such as a date."""


def write(folder: Path, made: Encoded) -> None:
    """Write what was read of a source into a new folder. Raises OSError, NotJSONError."""
    arrays, files, sources, numbers = made.examples.arrays()
    every = {**arrays, **{f"number {i}": numbers[name] for i, name in enumerate(numbers)}}
    every["given"], every["given_begins"] = _written(made.examples.given, len(made.examples))
    every["declared"], every["declared_begins"] = _written(made.examples.declared, len(made.examples))
    about = {
        "files": files, "sources": sources, "numbers": [*numbers], "weights": made.weights,
        "report": _report(made.report), "datasets": [_dataset(one) for one in made.datasets],
    }  # fmt: skip
    folder.mkdir()
    places = {}
    with (folder / _ROWS).open("wb") as file:
        for name, values in every.items():
            file.write(b"\0" * (-file.tell() % _ALIGNED))
            places[name] = [np.asarray(values).dtype.str, file.tell(), len(values)]
            file.write(np.asarray(values).data)
    text = json.dumps({**about, "arrays": places, "sha256": sha256(folder / _ROWS)})
    (folder / _ABOUT).write_text(text, encoding="utf-8")


def read(folder: Path) -> Encoded:
    """Map what `write` wrote. Raises OSError, and ValueError, KeyError or TypeError where it is damaged."""
    about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    if sha256(folder / _ROWS) != about["sha256"]:
        raise ValueError(f"{_ROWS} is not what was written")
    whole = np.asarray(np.memmap(folder / _ROWS, np.uint8, "r"))
    every = {
        name: whole[begin : begin + np.dtype(kind).itemsize * n].view(kind)
        for name, (kind, begin, n) in about["arrays"].items()
    }
    given, declared = (Texts(every.pop(name), every.pop(f"{name}_begins")) for name in ("given", "declared"))
    numbers = {name: every.pop(f"number {i}") for i, name in enumerate(about["numbers"])}
    examples = Examples.of(Arrays(every, about["files"], about["sources"], numbers), given, declared)
    datasets = [
        Dataset([], d["kind"], d["form"], d["source"], Report(d["total"]), (*d["kinds"],)) for d in about["datasets"]
    ]
    return Encoded(examples, datasets, _read_report(about["report"]), about["weights"])


class Texts(Mapping[int, Any]):
    """Values of some of the examples, by their index: JSON, read when asked for.

    They are the prompts of rows without answers, as they were given, with the rows' columns; and the values of columns
    that the method declares. begins: of each example its first byte, and the end.
    """

    def __init__(self, texts: Any, begins: Any) -> None:
        self._texts, self._begins = texts, begins

    def __getitem__(self, index: int) -> Any:
        if index not in self:
            raise KeyError(index)
        return json.loads(bytes(self._texts[self._begins[index] : self._begins[index + 1]]))

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and bool(self._begins[index] < self._begins[index + 1])

    def __iter__(self) -> Iterator[int]:
        return (i for i in range(len(self._begins) - 1) if i in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _written(values: Mapping[int, Any], n: int) -> tuple[array[int], array[int]]:
    """Return the values of n examples as JSON, and where that of each begins."""
    texts, begins = array("B"), array("q", [0])
    for index in range(n):
        if index in values:
            found = values[index]
            value = [*found] if isinstance(found, tuple) else found  # of `given`, which JSON gives back as a list
            if not is_json(value):
                raise NotJSONError
            texts.frombytes(json.dumps(value).encode())
        begins.append(len(texts))
    return texts, begins


def is_json(value: object) -> bool:
    """Return whether JSON gives the value back as it is, with the same types."""
    if type(value) is list:
        return all(map(is_json, value))
    if type(value) is dict:
        return all(type(key) is str and is_json(inner) for key, inner in value.items())
    if type(value) is str:  # two halves of a surrogate pair would come back as one character
        return value.isascii() or not _SURROGATE.search(value)
    return value is None or type(value) in (int, bool, float)


def _dataset(dataset: Dataset) -> dict[str, Any]:
    about = {"kind": dataset.kind, "form": dataset.form, "source": dataset.source, "kinds": dataset.kinds}
    return {**about, "total": dataset.report.total}


def _report(report: Report) -> dict[str, Any]:
    def rows(found: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        return {reason: [_number(row) for row in numbers] for reason, numbers in found.items()}

    return {"total": report.total, "dropped": rows(report.dropped), "noted": rows(report.noted), "left": [*report.left]}


def _read_report(about: Mapping[str, Any]) -> Report:
    def rows(found: Mapping[str, list[Any]]) -> dict[str, list[int]]:
        return {k: [RowNumber(*row) if isinstance(row, list) else row for row in v] for k, v in found.items()}

    return Report(about["total"], rows(about["dropped"]), rows(about["noted"]), dict.fromkeys(about["left"]))


def _number(row: int) -> Any:
    return [int(row), row.own, row.file] if isinstance(row, RowNumber) else row
