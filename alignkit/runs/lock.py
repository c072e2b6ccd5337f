"""One process writes in a folder: the second one is refused, and told of the first.

The lock is `flock` on the file `.lock`, which the kernel releases when a process ends, however it ends. The file names
its owner, which touches it every BEAT seconds. So where the owner is on another machine, and the shared file system
keeps the locks of each machine apart, the second process watches the file for three beats: an owner that gives a sign
of life is respected, a dead one is not.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError
from alignkit.files import alive

FILE = ".lock"
BEAT = 20.0  # seconds
_OLD = 3600.0  # seconds without a sign of life after which nobody is waited for; clocks differ by less
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class FolderLock:
    """The lock of a folder; `take` and `close` it. It ends with its process at the latest."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._descriptor: int | None = None
        self._ended = threading.Event()

    def take(self) -> None:
        """Take the lock. Raises ConfigError naming the process that has it."""
        try:
            self._descriptor = self._named()
        except OSError as error:
            raise ConfigError(f"cannot lock {self.path}: {error.strerror}; choose another --output") from error
        self._ended.clear()
        thread = threading.Thread(target=self._beat, args=(self._descriptor,), name="alignkit-lock", daemon=True)
        thread.start()

    def _named(self) -> int:
        """Return the descriptor of the file, locked, with this process as its owner."""
        descriptor = self._open()
        about = {"host": socket.gethostname(), "boot": _machine(), "pid": os.getpid(), "since": _now()}
        try:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def close(self) -> None:
        """Give the lock back and remove its file; without effect where it is not held."""
        if self._descriptor is None:
            return
        self._ended.set()
        with suppress(OSError):  # the folder may have been moved or removed
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _open(self) -> int:
        """Return the descriptor of the file, locked, once no other process uses it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                owner = _owner(descriptor)
                locked = _lock(descriptor)
                if locked is False or (owner and self._lives(owner, certain=locked is True)):
                    raise self._refused(_owner(descriptor))
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    return descriptor
            except FileNotFoundError:  # its owner has just removed it; so the new file is taken
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lives(self, owner: dict[str, Any], certain: bool) -> bool:
        """Return whether an owner whose lock this machine does not see is alive; may take three beats."""
        if owner.get("boot") == _machine():
            return not certain and alive(owner["pid"])
        seen = self._touched()
        if time.time() - seen / 1e9 > _OLD:
            return False
        for _ in range(30):
            time.sleep(BEAT / 10)
            if self._touched() != seen:
                return True
        return False

    def _touched(self) -> int:
        # opened anew, because network file systems look for changes then
        with self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _refused(self, owner: dict[str, Any]) -> ConfigError:
        who = f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}" if owner else "a process"
        return ConfigError(
            f"{self.path.parent} is in use by {who}, and a second process would spoil its files. Wait until it ends, "
            f"or stop it, and type the same again; or choose another --name"
        )

    def _beat(self, descriptor: int) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Return whether the file is locked by this process now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and type(found.get("pid")) is int else {}


def _machine() -> str:
    # the same in all containers of a machine, whose host names differ
    return _BOOT.read_text().strip() if _BOOT.is_file() else socket.gethostname()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
