"""The results of a probe: facts and troubles. A probe may fail in any way; its results until then are kept."""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Severity = Literal["ok", "warn", "problem"]

_IN_A_PATH = re.compile(r"[/\\][^/\\\s]+|[^/\\\s]+(?=[/\\])")
# account names that identify nobody, and that are also names of folders
_IMPERSONAL = {
    "admin", "app", "data", "home", "jovyan", "models", "nobody", "root", "runner", "ubuntu", "user", "work",
    "workspace",
}  # fmt: skip


class Fact(NamedTuple):
    """A name and its value."""

    name: str
    value: str


class Trouble(NamedTuple):
    """Something that is wrong, or may be, and what to do about it."""

    severity: Literal["warn", "problem"]
    what: str
    remedy: str


Probe = Callable[[], Iterator[Fact | Trouble]]


@dataclass(frozen=True)
class Part:
    """The results of one probe."""

    title: str
    facts: tuple[Fact, ...]
    troubles: tuple[Trouble, ...]

    @property
    def severity(self) -> Severity:
        """The worst of its troubles."""
        if any(trouble.severity == "problem" for trouble in self.troubles):
            return "problem"
        return "warn" if self.troubles else "ok"


def run(title: str, probe: Probe) -> Part:
    """Run a probe; a failure of the probe is a trouble of the part."""
    found: list[Fact | Trouble] = []
    try:
        found.extend(probe())  # what it yields before it fails is kept
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken library may raise anything, SystemExit and Rust's panics among it
        what = f"the rest could not be examined: {type(error).__name__}: {first_line(error)}"
        found.append(Trouble("warn", what, "fix what it names; if it names nothing, report this text as a bug"))
    facts = [Fact(f.name, private(f.value)) for f in found if isinstance(f, Fact)]
    troubles = [Trouble(t.severity, private(t.what), private(t.remedy)) for t in found if isinstance(t, Trouble)]
    return Part(title, tuple(facts), tuple(troubles))


def first_line(error: BaseException) -> str:
    """Return an error's first line, at most 300 characters of it."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def private(text: str) -> str:
    """Return a text without the home folder, the user's name as a word of a path, and credentials in addresses."""
    text = re.sub(r"(?<=://)[^\s/]+@", "***@", text)
    names = set()
    with suppress(OSError, RuntimeError):  # neither HOME nor an entry in the list of users, as in containers
        homes = {str(Path.home()), str(Path.home().resolve())}
        for home in sorted(homes - {"/"}, key=len, reverse=True):
            text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
        names.add(Path.home().name)
    with suppress(OSError, KeyError, ImportError):
        names.add(getpass.getuser())
    for name in names - _IMPERSONAL - {""}:
        word = re.compile(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])")  # alice-runs and my_alice, not malice
        text = _IN_A_PATH.sub(lambda part, word=word: word.sub("USER", part[0]), text)  # type: ignore[misc]
    return text
