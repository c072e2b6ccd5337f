"""Reading one file of rows: JSONL, JSON, CSV and Parquet; the text files also compressed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from alignkit.data.rows import Fault, RawRows, shown, without_nulls
from alignkit.data_spec import COMPRESSIONS, SUFFIXES, suffix_of
from alignkit.errors import DataError

Item = tuple[int, object] | Fault


def read_file(path: Path) -> RawRows:
    """Read the rows of one file. Raises DataError where it cannot be read as a whole."""
    raw = RawRows(str(path), textual=suffix_of(path) == ".csv")
    for item in items_of(path):
        if isinstance(item, Fault):
            raw.faults.append(item)
        else:
            raw.add(*item)
    return raw


def items_of(path: Path) -> Iterator[Item]:
    """Yield the numbered rows of one file, and the faults of its lines; JSON and CSV files are held in memory.

    Raises DataError where the file cannot be read as a whole.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
    reader = readers.get(suffix_of(path))
    if reader is None:
        raise DataError(f"{path}: cannot read '{path.suffix or path.name}' files; give one of {', '.join(SUFFIXES)}")
    if reader is _read_parquet and path.suffix.lower() in COMPRESSIONS:
        raise DataError(f"{path}: a Parquet file is compressed inside; unpack it to {path.with_suffix('')}")
    try:
        yield from reader(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}); write it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _opened(path: Path) -> BinaryIO | gzip.GzipFile:
    """Open a file for reading its bytes, decompressed."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow  # type: ignore[import-untyped]

        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            return io.BytesIO(stream.read())  # Arrow's streams have no lines
    return path.open("rb")


def _content(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


def _read_jsonl(path: Path) -> Iterator[Item]:
    with _opened(path) as file:
        begins = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return _read_array(path) if begins == b"[" else _read_lines(path)


def _read_array(path: Path) -> Iterator[Item]:
    """Read a JSON array, which is common under the suffix of JSONL too. Raises DataError: one fault, not one a line."""
    try:
        content = json.loads(_content(path).decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{path}: begins with '[', as a JSON array does, and is not one ({error}); write a list of objects, or one "
            "complete object on each line"
        ) from None
    return enumerate(content, 1)


def _read_lines(path: Path) -> Iterator[Item]:
    with _opened(path) as file:  # bytes: text mode would also split lines at U+2028 inside a string
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                bad = line[error.start : error.start + 8]
                yield Fault(number, "", f"not UTF-8 at {shown(bad)}", "save the file as UTF-8")
            except (json.JSONDecodeError, RecursionError) as error:
                found = f"not JSON ({str(error).split(':')[0]}): {shown(line.decode().strip())}"
                yield Fault(number, "", found, "write one complete object on each line")


def _read_json(path: Path) -> Iterator[Item]:
    try:
        content = json.loads(_content(path).decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return _read_jsonl(path)  # JSONL with the wrong suffix is common; real faults then get their line numbers
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: found {shown(content)}; a .json file must hold a list of objects")
    return enumerate(content, 1)


def _read_csv(path: Path) -> Iterator[Item]:
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    items: list[Item] = []
    limit = csv.field_size_limit(max(len(text), 1))  # the default limit refuses answers of more than 128 KiB
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for number, row in enumerate(reader, 1):
            too_many = row.get(None) or []  # DictReader keeps the cells beyond the last column under None
            named = [cell for column, cell in row.items() if column is not None]
            too_few = None in named  # and fills missing cells with None
            if too_many or too_few:
                n_cells = len([cell for cell in named if cell is not None]) + len(too_many)
                found = f"{n_cells} cells under {len(reader.fieldnames or [])} column names"
                items.append(Fault(number, "", found, 'quote cells that hold commas or line breaks: "..."'))
            else:
                items.append((number, row))
    except csv.Error as error:
        fix = 'quote cells with "..." and double the quotes inside them'
        items.append(Fault(len(items) + 1, "", f"not CSV ({error})", fix))
    finally:
        csv.field_size_limit(limit)
    return iter(items)


def _read_parquet(path: Path) -> Iterator[Item]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(map(without_nulls, rows), 1)
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: not a complete parquet file ({reason}); write it again") from error
