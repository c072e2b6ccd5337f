"""Output files of the insight tools: checked before anything is sampled, scored or loaded."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.insight import terminal


def check_targets(targets: Mapping[str, Path | None]) -> None:
    """Raise ConfigError for the first file that cannot be written; targets: option -> file or None."""
    for option, file in targets.items():
        terminal.check_target(option, file)
        if file is None:
            continue
        try:
            if file.exists() and not os.access(file, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if file.is_file() or not file.exists():  # written next to it, then renamed, so its folder must be writable
                with tempfile.TemporaryFile(dir=file.parent):
                    pass
        except OSError as error:
            raise ConfigError(f"{option} '{file}': cannot be written, {error.strerror}; choose another file") from error
