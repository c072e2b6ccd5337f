"""The rows of a source: files, folders, globs, several of these, data sets of `datasets`, or lists of dicts."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from alignkit.data.files import Item, items_of, read_file
from alignkit.data.hub import from_datasets, is_saved, loaded, repository_of, rows_in, saved
from alignkit.data.origin import Origin, of_dataset, of_files
from alignkit.data.rows import Fault, RawRows, RowNumber, joined
from alignkit.data_spec import SUFFIXES, Source, sources_of, suffix_of
from alignkit.errors import ConfigError, DataError, nearest

_SHOWN_ROWS = 8


def read_rows(source: object) -> RawRows:
    """Read rows without interpreting them.

    source: a path to .jsonl, .json, .parquet or .csv (text also as .gz or .zst), a folder of such files or one that
    `datasets.save_to_disk` wrote, a glob, a `datasets.Dataset`, a list of dicts, a name on the hub ("org/name",
    "org/name:split" or "org/name:configuration:split", the default split is train), a mapping with the keys of
    `alignkit.data_spec.Source`, or a list of paths, names and mappings.
    Row numbers start at 1: lines in JSONL, data rows (the header not counted) in CSV; of several files they count on.
    Faults of single rows are collected in the result. Raises DataError where the source as a whole cannot be read,
    ConfigError where it is described wrongly.
    """
    if isinstance(source, RawRows):
        return source
    named = sources_of(source)
    if named is not None:
        parts = [_read_source(one) for one in named]
        return parts[0] if len(parts) == 1 else joined(f"{len(parts)} sources", parts)
    if isinstance(source, (list, tuple)):
        raw = RawRows("the list of rows")
        for number, row in enumerate(source, 1):
            raw.add(number, row)
        return raw
    return from_datasets(source, "the dataset")


def _read_source(source: Source) -> RawRows:
    raw = _read_named(source)
    raw.columns, raw.weight = source.columns, source.weight
    return raw


def _read_named(source: Source) -> RawRows:
    repository = repository_of(source)
    if repository is not None:
        return from_datasets(loaded(repository), str(repository))
    path = Path(source.path).expanduser()
    if is_saved(path):
        return from_datasets(saved(path), str(path))
    paths = _files_of(path)
    if paths == [path]:
        return read_file(path)
    raw = joined(str(path), map(read_file, paths))
    raw.parts = []  # one source: its form is found once, from the rows of all files
    return raw


class Lazy(NamedTuple):
    """A source whose rows are read one after the other.

    items: begins a pass over them. origin: what identifies them, where that is known without reading them. The rest as
    in `RawRows`.
    """

    name: str
    items: Callable[[], Iterator[Item]]
    textual: bool = False
    columns: Mapping[str, str] | None = None
    weight: float | None = None
    origin: Origin | None = None

    def raw(self, items: Iterable[Item]) -> RawRows:
        """Return some of the rows, as they were read."""
        raw = RawRows(self.name, textual=self.textual)
        for item in items:
            if isinstance(item, Fault):
                raw.faults.append(item)
            else:
                raw.add(*item)
        return raw


class Opened(NamedTuple):
    """A source as it was opened: its name, and its parts."""

    name: str
    parts: list[Lazy]


def open_rows(source: object) -> Lazy:
    """Open one source, of those that `read_rows` reads, without reading its rows; lists of dicts are refused.

    Raises DataError where it is not there, ConfigError for several sources or rows in memory.
    """
    named = sources_of(source)
    if named is None:
        if isinstance(source, list | tuple | RawRows):
            raise ConfigError("these rows are in memory already; remove streaming")
        return Lazy("the dataset", lambda: rows_in(source, "the dataset"))
    if len(named) > 1:
        raise ConfigError("streaming reads one source; give one folder or glob for several files")
    return _opened(named[0], streaming=True)


def lazy_parts(source: object) -> Opened:
    """Open a source, of all that `read_rows` reads, without reading its rows; one that was opened is returned.

    Each part must be read to its end before the next one: their rows are numbered as `joined` does.
    """
    if isinstance(source, Opened):
        return source
    if isinstance(source, RawRows):
        return Opened(source.source, [_in_memory(part) for part in source.parts or [source]])
    named = sources_of(source)
    if named is not None:
        parts = [_opened(one) for one in named]
        return Opened(parts[0].name, parts) if len(parts) == 1 else Opened(f"{len(parts)} sources", _numbered(parts))
    if isinstance(source, (list, tuple)):
        return Opened("the list of rows", [Lazy("the list of rows", lambda: enumerate(source, 1))])
    return Opened("the dataset", [_of_dataset(source, "the dataset")])


def _in_memory(raw: RawRows) -> Lazy:
    return Lazy(raw.source, lambda: itertools.chain(raw.faults, raw.rows), raw.textual, raw.columns, raw.weight)


def _opened(one: Source, streaming: bool = False) -> Lazy:
    if repository := repository_of(one):
        return _of_dataset(loaded(repository, streaming=streaming), str(repository), one)
    path = Path(one.path).expanduser()
    if is_saved(path):
        return _of_dataset(saved(path), str(path), one)
    paths = _files_of(path)
    items = partial(items_of, path) if paths == [path] else partial(_items_of_all, paths)
    return Lazy(str(path), items, suffix_of(paths[0]) == ".csv", one.columns, one.weight, of_files(paths))


def _of_dataset(rows: object, name: str, one: Source | None = None) -> Lazy:
    columns, weight = (None, None) if one is None else (one.columns, one.weight)
    return Lazy(name, lambda: rows_in(rows, name), False, columns, weight, of_dataset(rows))


def _numbered(parts: Sequence[Lazy]) -> list[Lazy]:
    """Return parts whose rows are numbered on from part to part."""
    lasts = [0] * (len(parts) + 1)

    def items(k: int) -> Iterator[Item]:
        lasts[k + 1] = lasts[k]
        for item in parts[k].items():
            number = item.row if isinstance(item, Fault) else item[0]
            own, file = (number.own, number.file) if isinstance(number, RowNumber) else (number, parts[k].name)
            number = RowNumber(lasts[k] + number, own, file)
            lasts[k + 1] = max(lasts[k + 1], number)
            yield replace(item, row=number) if isinstance(item, Fault) else (number, item[1])

    return [part._replace(items=partial(items, k)) for k, part in enumerate(parts)]


def _items_of_all(paths: list[Path]) -> Iterator[Item]:
    """Yield the rows of several files, numbered as `joined` does."""
    before = last = 0
    for path in paths:
        before = last
        for item in items_of(path):
            own = item.row if isinstance(item, Fault) else item[0]
            number = RowNumber(before + own, own, str(path))
            last = max(last, number)
            yield replace(item, row=number) if isinstance(item, Fault) else (number, item[1])


def _files_of(path: Path) -> list[Path]:
    """Return the files of a path: itself, those of a folder, or those that a glob matches. Raises DataError."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return _of_one_kind(str(path), _files_in(path))
    if glob.has_magic(str(path)):
        return _of_one_kind(str(path), _matching(path))
    raise DataError(_missing(path))


def _of_one_kind(name: str, paths: list[Path]) -> list[Path]:
    suffixes = sorted({suffix_of(path) for path in paths})
    if len(suffixes) > 1:
        choice = f"{name}/*{suffixes[0]}" if Path(name).is_dir() else f"name files of one kind, such as *{suffixes[0]}"
        raise DataError(f"{name} holds files of different kinds ({_listed(paths)}); read one kind: {choice}")
    return paths


def _files_in(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.is_file() and suffix_of(path) in SUFFIXES)
    if not paths:
        there = sorted(folder.iterdir())
        found = f"it holds {_listed(there)}" if there else "it is empty"
        raise DataError(
            f"{folder} holds no {', '.join(SUFFIXES)} file, and datasets.save_to_disk did not write it; {found}"
        )
    return paths


def _matching(pattern: Path) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    paths = [path for path in found if path.is_file()]
    if not paths:
        fixed = Path(str(pattern).split("*")[0].split("?")[0].split("[")[0] + "_").parent
        if not fixed.is_dir():
            raise DataError(f"no file matches {pattern}: the folder {fixed} does not exist")
        raise DataError(f"no file matches {pattern}; the folder {fixed} holds: {_listed(sorted(fixed.iterdir()))}")
    return paths


def _missing(path: Path) -> str:
    message = f"no such file: {path}."
    if not path.parent.is_dir():
        return f"{message} The folder {path.parent} does not exist either."
    names = sorted(p.name for p in path.parent.iterdir() if suffix_of(p) in SUFFIXES or p.is_dir())
    if not names:
        return f"{message} The folder {path.parent} holds no {', '.join(SUFFIXES)} file."
    return f"{message}{nearest(path.name, names)} The folder {path.parent} holds: {_listed(map(Path, names))}"


def _listed(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:_SHOWN_ROWS]) + (", ..." if len(names) > _SHOWN_ROWS else "")
