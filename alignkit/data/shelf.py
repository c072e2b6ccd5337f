"""Tokenised rows on disk, for other ranks, resumed runs and other runs of the same rows.

The folder of an entry is named by a hash of everything that its examples depend on. Processes that want the same entry
take turns by `flock`: the first one reads the rows, the others map what it wrote.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from alignkit.config import RunConfig
from alignkit.data import kept
from alignkit.data.blocks import Encoded
from alignkit.data.chat import Chat
from alignkit.data.chat.template import Template
from alignkit.data.convert import Wanted
from alignkit.data.encoder import is_direct
from alignkit.data.sources import Opened
from alignkit.files import leftovers, remove
from alignkit.method import DataKind

logger = logging.getLogger(__name__)

FOLDER = ".rows"  # in the folder of the runs
LEAST = 2**20  # bytes of a source; smaller ones are read in a moment
MOST = 8  # entries


def key_of(
    opened: Opened,
    kind: DataKind,
    config: RunConfig,
    tokenizer: Any,
    order_by: str | None = None,
    wanted: Wanted | None = None,
) -> str | None:
    """Return the name of a source's entry; None where its rows are few, in memory, or cannot be identified.

    wanted: columns that the method reads; their order counts, since a batch lists them in it.
    """
    origins = [part.origin for part in opened.parts if part.origin is not None]
    few = sum(origin.size for origin in origins) < LEAST
    if few or len(origins) < len(opened.parts) or not is_direct(tokenizer):
        return None
    parts = [
        [part.name, part.textual, part.columns, part.weight, origin.digest()]
        for part, origin in zip(opened.parts, origins, strict=True)
    ]
    about = {
        "source": opened.name, "parts": parts, "kind": kind, "columns": config.columns, "order_by": order_by,
        "limits": [config.max_prompt_tokens, config.max_completion_tokens], "tokenizer": _tokenizer(tokenizer),
        "wanted": [(name, kind.__name__) for name, kind in (wanted or {}).items()],
        "chat": _chat(Chat.of(config), tokenizer), "code": [kept.VERSION, *_code()],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _tokenizer(tokenizer: Any) -> list[str]:
    tokenizer("a", truncation=False, padding=False)  # so that earlier calls leave nothing in the backend's state
    state = tokenizer.backend_tokenizer.to_str().encode()
    # its name too, which stands in the notes of the report
    about = (type(tokenizer), tokenizer.name_or_path, tokenizer.special_tokens_map, tokenizer.chat_template)
    return [hashlib.sha256(state).hexdigest(), *map(str, about)]


def _chat(chat: Chat, tokenizer: Any) -> Mapping[str, Any]:
    dated = tokenizer.chat_template and Template(tokenizer, chat.date).writes_date
    return {**vars(chat), "date": chat.date if dated else None}


def _code() -> Iterator[str]:
    """Yield what says how rows are read: the versions of the libraries, and this package's own files."""
    yield from map(metadata.version, ("transformers", "tokenizers"))
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        yield hashlib.sha256(path.read_bytes()).hexdigest()


def shelved(folder: Path, key: str, make: Callable[[], Encoded]) -> Encoded:
    """Return the entry of a folder; where it is not there, what `make` returns, which is kept.

    What cannot be kept is a warning; a damaged entry is set aside, and made again.
    """
    with _turn(folder, key) as waited:
        if waited is not None and (found := _found(folder / key)) is not None:
            logger.info("tokenised rows, kept by an earlier run or another rank: %s", folder / key)
            return found
        if waited is False:
            made = make()
            _keep(folder, key, made)
            found = _found(folder / key)
            return made if found is None else found
    return make()  # where the process before could not keep its rows, the others make theirs side by side


@contextmanager
def _turn(folder: Path, key: str) -> Iterator[bool | None]:
    """Wait until no other process works on an entry; yields whether one did, None where the folder cannot be used."""
    lock = folder / f"{key}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        _warn(folder, error)
        yield None
        return
    try:
        yield _locked(descriptor)
    finally:
        os.close(descriptor)
        if not (folder / key).is_dir():  # an error, so nothing of this run stays
            remove(lock)
            with suppress(OSError):
                folder.rmdir()


def _locked(descriptor: int) -> bool:
    """Lock a file, and return whether another process had it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("another process reads the same rows; waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    except OSError:  # a file system without locks: then several may make the entry, and one is kept
        return False
    return False


def _found(entry: Path) -> Encoded | None:
    if not entry.is_dir():
        return None
    try:
        found = kept.read(entry)
        os.utime(entry)  # the newest stay
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        aside = entry.with_name(f"{entry.name}.damaged-{time.time_ns()}")
        logger.warning("%s is damaged (%s); it is set aside, and the rows are read again", entry, error)
        try:
            entry.rename(aside)
        except OSError:
            remove(entry)
        return None
    return found


def _keep(folder: Path, key: str, made: Encoded) -> None:
    new = folder / f".{key}.{os.getpid()}"
    try:
        remove(new)
        kept.write(new, made)
        new.rename(folder / key)
        _tidy(folder)
    except kept.NotJSONError:
        logger.info("the rows hold values that JSON does not have, such as dates, so they are not kept for other runs")
    except OSError as error:
        _warn(folder, error)
    finally:
        remove(new)


def _tidy(folder: Path) -> None:
    """Remove what killed processes left, and all entries but the newest."""
    for left in leftovers(folder, r"\.[0-9a-f]+\.(\d+)"):
        remove(left)
    entries = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: -p.stat().st_mtime)
    for old in entries[MOST:]:
        remove(old)
        remove(folder / f"{old.name}.lock")


def _warn(folder: Path, error: OSError) -> None:
    logger.warning("tokenised rows are not kept in %s (%s); rows_cache: false omits it", folder, error.strerror)
