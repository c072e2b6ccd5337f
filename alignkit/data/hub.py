"""Data sets of the `datasets` library: on the hub, in local copies of its repositories, saved to disk, or in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.data.rows import RawRows, shown, without_nulls
from alignkit.data_spec import SUFFIXES, Source, suffix_of
from alignkit.errors import ConfigError, DataError
from alignkit.hub import SECONDS, silent_hub

_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # what datasets.save_to_disk writes
_PART = r"[\w.-]+(?:\[[^\]]*\])?"
_SPLIT = rf"{_PART}(?:\+{_PART})*"
_NAMED = re.compile(rf"(?P<path>.+?)(?::(?P<name>[\w.-]+)(?=:))?(?::(?P<split>{_SPLIT}))?")
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")


class Repository(NamedTuple):
    """A repository of data sets: a name on the hub or a folder, a configuration, and a split."""

    path: str
    name: str | None
    split: str

    def __str__(self) -> str:
        return ":".join(part for part in (self.path, self.name, self.split) if part)


def repository_of(source: Source) -> Repository | None:
    """Return the repository that a source names, None for files and folders of files.

    A name may have its configuration and split: "org/name", "org/name:split", "org/name:configuration:split". A folder
    is a repository where it is named with a split or a configuration, or where its README.md has `configs`.
    """
    text, name, split = str(source.path), source.name, source.split
    folder = Path(text).expanduser()
    if not folder.exists():
        match = _NAMED.fullmatch(text)
        assert match is not None
        folder = Path(match["path"]).expanduser()
        on_the_hub = (
            _ON_THE_HUB.fullmatch(match["path"]) and suffix_of(folder) not in SUFFIXES and not folder.parent.exists()
        )
        if not folder.is_dir() and not (on_the_hub or name or split):
            return None
        text, name, split = match["path"], name or match["name"], split or match["split"]
    if folder.exists() and not (name or split or _has_configurations(folder)):
        return None
    if folder.is_file():
        given = f"split '{split}'" if split else f"name '{name}'"
        raise ConfigError(f"{folder} is a file, which has no {given}; name a folder or a data set on the hub")
    return Repository(str(folder) if folder.is_dir() else text, name, split or "train")


def loaded(repository: Repository, **options: bool) -> Any:
    """Return one split as an object of `datasets`; options: of load_dataset. Raises DataError where there is none."""
    import datasets

    folder = Path(repository.path)
    try:
        if is_saved(folder):
            return _saved_split(folder, repository)
        if not folder.is_dir() and (hub := silent_hub()):
            raise DataError(
                f"no file or folder is called '{repository.path}', and the hub ({hub}) did not answer within "
                f"{SECONDS:g} s. Give the path of a local file, or check the name and the network"
            )
        return datasets.load_dataset(repository.path, name=repository.name, split=repository.split, **options)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # the hub's client raises its own errors, HTTP errors and plain ValueErrors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        name = "" if repository.name is None else f"configuration '{repository.name}', "
        what = f"'{repository.path}', {name}split '{repository.split}'"
        away, network = ("", "") if folder.is_dir() else (", from the hub", ", and the network")
        hint = f"Check the name, the configuration and the split (org/name:configuration:split){network}"
        raise DataError(
            f"cannot load {what}{away}: {shown(reason, 300)}. {hint}, or give the path of a local file."
        ) from error


def is_saved(folder: Path) -> bool:
    """Return whether datasets.save_to_disk wrote the folder."""
    return any((folder / name).is_file() for name in _SAVED)


def saved(folder: Path) -> Any:
    """Return what datasets.save_to_disk wrote to the folder; its rows stay on the disk."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{folder}: not a complete folder of datasets.save_to_disk ({shown(reason, 160)})") from error


def _saved_split(folder: Path, repository: Repository) -> Any:
    import datasets

    found = saved(folder)
    splits = sorted(found) if isinstance(found, datasets.DatasetDict) else []
    if repository.name is not None or repository.split not in splits:
        there = f"has the splits {', '.join(splits)}" if splits else "holds one data set without splits"
        raise DataError(f"{folder} was written by datasets.save_to_disk and {there}; found '{repository}'")
    return found[repository.split]


def from_datasets(source: object, name: str) -> RawRows:
    """Read an object of `datasets`; of several splits the one called train. Raises DataError, ConfigError."""
    import datasets

    if isinstance(source, datasets.IterableDataset):
        raise ConfigError(f"{name} is a datasets.IterableDataset, which is read while the run goes on: streaming: true")
    raw = RawRows(name)
    for number, row in rows_in(source, name):
        raw.add(number, row)
    return raw


def rows_in(source: object, name: str) -> Iterator[tuple[int, object]]:
    """Return the numbered rows of an object of `datasets`, also of one that is streamed."""
    import datasets

    if isinstance(source, datasets.DatasetDict):
        if "train" not in source:
            raise ConfigError(
                f"{name} has the splits {', '.join(sorted(source))}; pass one of them, such as data['...']"
            )
        source = source["train"]
    if not isinstance(source, datasets.Dataset | datasets.IterableDataset):
        raise DataError(
            f"cannot read rows from {type(source).__name__}; give a path to {', '.join(SUFFIXES)}, a folder of such "
            "files or written by datasets.save_to_disk, a datasets.Dataset, a list of dicts, or a hub name such as "
            "org/name:split"
        )
    return enumerate(map(without_nulls, source.with_format(None)), 1)


def _has_configurations(folder: Path) -> bool:
    """Return whether the folder is a repository whose README.md declares its files."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    text = readme.read_text(encoding="utf-8", errors="replace")
    return re.match(r"---\s*\n(.*\n)*?configs:", text) is not None
