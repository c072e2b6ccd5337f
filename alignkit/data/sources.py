"""The rows of a source: files, folders, globs, several of these, data sets of `datasets`, or lists of dicts."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from alignkit.data.files import read_file
from alignkit.data.hub import from_datasets, is_saved, read_repository, read_saved, repository_of
from alignkit.data.rows import RawRows, joined
from alignkit.data_spec import SUFFIXES, Source, sources_of, suffix_of
from alignkit.errors import DataError, nearest

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
        return read_repository(repository)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return read_saved(path) if is_saved(path) else _read_files(str(path), _files_in(path))
    if path.exists():
        return read_file(path)
    if glob.has_magic(str(path)):
        return _read_files(str(path), _matching(path))
    raise DataError(_missing(path))


def _read_files(name: str, paths: list[Path]) -> RawRows:
    """Read files of one form as one source. Raises DataError where they are of different kinds."""
    suffixes = sorted({suffix_of(path) for path in paths})
    if len(suffixes) > 1:
        choice = f"{name}/*{suffixes[0]}" if Path(name).is_dir() else f"name files of one kind, such as *{suffixes[0]}"
        raise DataError(f"{name} holds files of different kinds ({_listed(paths)}); read one kind: {choice}")
    raw = joined(name, map(read_file, paths))
    raw.parts = []  # one source: its form is found once, from the rows of all files
    return raw


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
