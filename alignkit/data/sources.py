"""Reading rows: JSONL, JSON, CSV and Parquet files, folders and objects of `datasets`, lists, and hub names."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

from alignkit.data.rows import SUFFIXES, Fault, RawRows, shown
from alignkit.errors import ConfigError, DataError, nearest

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_SHOWN_ROWS = 8


def read_rows(source: object) -> RawRows:
    """Read rows without interpreting them.

    source: a path to .jsonl, .json, .parquet or .csv, a folder that `datasets.save_to_disk` wrote, a
    `datasets.Dataset`, a list of dicts, or a name on the hub ("org/name" or "org/name:split", the default is train).
    Row numbers start at 1: lines in JSONL, data rows (the header not counted) in CSV. Faults of single rows are
    collected in the result. Raises DataError where the source as a whole cannot be read.
    """
    if isinstance(source, RawRows):
        return source
    if isinstance(source, (str, Path)):
        return _read_named(source)
    if isinstance(source, (list, tuple)):
        raw = RawRows("the list of rows")
        for number, row in enumerate(source, 1):
            raw.add(number, row)
        return raw
    return _from_datasets(source, "the dataset")


def _read_named(source: str | Path) -> RawRows:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        hub = _HUB_NAME.fullmatch(str(source))
        if hub and path.suffix.lower() not in SUFFIXES and not path.parent.exists():
            return _read_hub(hub[1], hub[2] or "train")
        raise DataError(_missing(path))
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read '{path.suffix or path.name}' files; give one of {', '.join(SUFFIXES)}")
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _missing(path: Path) -> str:
    message = f"no such file: {path}."
    if not path.parent.is_dir():
        return f"{message} The folder {path.parent} does not exist either."
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES or p.is_dir())
    if not names:
        return f"{message} The folder {path.parent} holds no {', '.join(SUFFIXES)} file."
    listed = ", ".join(names[:_SHOWN_ROWS]) + (", ..." if len(names) > _SHOWN_ROWS else "")
    return f"{message}{nearest(path.name, names)} The folder {path.parent} holds: {listed}"


def _read_jsonl(path: Path) -> RawRows:
    raw = RawRows(str(path))
    with path.open("rb") as file:  # bytes: text mode would also split lines at U+2028 inside a string
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                raw.add(number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            except UnicodeDecodeError as error:
                bad = line[error.start : error.start + 8]
                raw.faults.append(Fault(number, "", f"not UTF-8 at {shown(bad)}", "save the file as UTF-8"))
            except (json.JSONDecodeError, RecursionError) as error:
                found = f"not JSON ({str(error).split(':')[0]}): {shown(line.decode().strip())}"
                raw.faults.append(Fault(number, "", found, "write one complete object on each line"))
    return raw


def _read_json(path: Path) -> RawRows:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return _read_jsonl(path)  # JSONL with the wrong suffix is common; real faults then get their line numbers
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: found {shown(content)}; a .json file must hold a list of objects")
    raw = RawRows(str(path))
    for number, row in enumerate(content, 1):
        raw.add(number, row)
    return raw


def _read_csv(path: Path) -> RawRows:
    raw = RawRows(str(path), textual=True)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    limit = csv.field_size_limit(max(len(text), 1))  # the default limit refuses answers of more than 128 KiB
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                n_cells = sum(value is not None for value in row.values()) - (None in row) + len(row.get(None) or [])
                found = f"{n_cells} cells under {len(reader.fieldnames or [])} column names"
                raw.faults.append(Fault(number, "", found, 'quote cells that hold commas or line breaks: "..."'))
            else:
                raw.add(number, row)
    except csv.Error as error:
        fix = 'quote cells with "..." and double the quotes inside them'
        raw.faults.append(Fault(len(raw) + len(raw.faults) + 1, "", f"not CSV ({error})", fix))
    finally:
        csv.field_size_limit(limit)
    return raw


def _read_parquet(path: Path) -> RawRows:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    raw = RawRows(str(path))
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    raw.add(len(raw) + 1, row)
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: not a complete parquet file ({reason}); write it again") from error
    return raw


def _read_folder(path: Path) -> RawRows:
    import datasets

    try:
        return _from_datasets(datasets.load_from_disk(str(path)), str(path))
    except (FileNotFoundError, ValueError) as error:
        files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        hint = f"it holds {', '.join(files[:_SHOWN_ROWS])}; name one of them" if files else "name a file"
        raise DataError(f"{path}: not a folder written by datasets.save_to_disk; {hint}") from error


def _read_hub(name: str, split: str) -> RawRows:
    import datasets

    try:
        return _from_datasets(datasets.load_dataset(name, split=split), f"{name}:{split}")
    except DataError:
        raise
    except Exception as error:  # the hub's client raises its own errors, HTTP errors and plain ValueErrors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        hint = "Check the name, the split (org/name:split) and the network, or give the path of a local file"
        raise DataError(
            f"cannot load '{name}', split '{split}', from the hub: {shown(reason, 160)}. {hint}."
        ) from error


def _from_datasets(source: object, name: str) -> RawRows:
    import datasets

    if isinstance(source, datasets.DatasetDict):
        if "train" not in source:
            raise ConfigError(
                f"{name} has the splits {', '.join(sorted(source))}; pass one of them, such as data['...']"
            )
        source = source["train"]
    if not isinstance(source, datasets.Dataset):
        raise DataError(
            f"cannot read rows from {type(source).__name__}; give a path to {', '.join(SUFFIXES)}, a folder written by "
            "datasets.save_to_disk, a datasets.Dataset, a list of dicts, or a hub name such as org/name:split"
        )
    raw = RawRows(name)
    for number, row in enumerate(source.with_format(None), 1):
        raw.add(number, row)
    return raw
