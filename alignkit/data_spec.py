"""What `data` and `eval_data` may name: files, folders, globs and hub data sets; one, or several with weights."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alignkit.errors import ConfigError, nearest

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
COMPRESSIONS = (".gz", ".zst")


class Source(BaseModel):
    """One source of rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str | Path = Field(description="file, folder, glob, or name on the hub")
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of a hub data set, such as train or train[:1000]")
    weight: float | None = Field(None, gt=0, description="share of the rows of a step, relative to the other weights")
    columns: dict[str, str] | None = Field(None, description="replaces the run's `columns` for this source")


_KEYS = tuple(Source.model_fields)


def sources_of(value: object) -> list[Source] | None:
    """Return the sources that a setting names; None where it is rows, or an object that holds rows.

    value: a path or name, a mapping with the keys of `Source`, or a list of these. A list of mappings without such keys
    is rows. Raises ConfigError for a wrong key or value, and where only some sources have a weight.
    """
    if isinstance(value, str | Path) or type(value) is dict:  # the splits of `datasets` are a mapping too
        return [_source(value, "the source")]
    if not isinstance(value, list | tuple) or not value or not all(map(_names, value)):
        return None
    found = [_source(one, f"source {number}") for number, one in enumerate(value, 1)]
    without = [source for source in found if source.weight is None]
    if without and len(without) < len(found):
        raise ConfigError(f"{without[0].path} has no weight, but other sources have one; give all of them one, or none")
    return found


def plain(value: object) -> Any:
    """Return a setting that names sources as plain YAML values; None where it holds rows."""
    found = sources_of(value)
    if found is None:
        return None
    written = [source.model_dump(mode="json", exclude_none=True) for source in found]
    short = [source["path"] if list(source) == ["path"] else source for source in written]
    return short if isinstance(value, list | tuple) else short[0]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return a short name for each source, in which metrics are logged: "math" for "data/math.jsonl"; all differ."""
    names: list[str] = []
    for path in paths:
        place = Path(path.split(":")[0])
        name = place.parent.name if glob.has_magic(place.name) else place.name
        while Path(name).suffix.lower() in (*SUFFIXES, *COMPRESSIONS):
            name = Path(name).stem
        numbered = (f"{name or 'data'}-{number}" for number in count(2))
        names.append(name if name and name not in names else next(n for n in numbered if n not in names))
    return names


def suffix_of(path: str | Path) -> str:
    """Return the suffix that says what a file holds, in lower case, without a compression: ".jsonl" of "a.jsonl.gz"."""
    path = Path(path)
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def _names(item: object) -> bool:
    """Return whether an entry of a list names a source; a row may have a column `path` next to others."""
    if not isinstance(item, Mapping):
        return isinstance(item, str | Path)
    return "path" in item and all(difflib.get_close_matches(str(key), _KEYS, 1, 0.7) for key in item)


def _source(value: object, place: str) -> Source:
    given = value if isinstance(value, Mapping) else {"path": value}
    if unknown := [str(key) for key in given if key not in _KEYS]:
        raise ConfigError(f"{place} has the unknown key '{unknown[0]}'.{nearest(unknown[0], _KEYS)} Keys: {_LISTED}")
    try:
        return Source(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"][:1]))
        raise ConfigError(f"{place}, {key}: {first['msg']} (given: {first.get('input')!r:.80})") from None


_LISTED = ", ".join(_KEYS)
