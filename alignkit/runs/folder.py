"""A run's folder: config.yaml, metrics.jsonl, checkpoints/, model/."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from alignkit.config import RunConfig
from alignkit.errors import ConfigError, DataError
from alignkit.runs import lock

EVAL = "eval/"  # in front of the metrics of an evaluation


def create(config: RunConfig, accelerator: Any) -> Path:
    """Return the run's folder: a new one, or the existing one to resume; the main process creates it for all ranks.

    Raises ConfigError: it exists already, or does not exist to be resumed.
    """
    name = find_or_make(config).name if accelerator.is_main_process else ""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        # as a tensor of numbers: an object would be pickled
        letters = torch.tensor(list(name.encode().ljust(255)), device=accelerator.device)
        name = bytes(broadcast(letters).tolist()).decode().rstrip()
    return config.output / name


def find_or_make(config: RunConfig, file: str = "config.yaml") -> Path:
    """Return the folder `config.name`, or METHOD-NUMBER without a name; for one process. Raises as `create`.

    file: the file that a folder must have to be resumed.
    """
    try:
        return _find_or_make(config, file)
    except OSError as error:
        raise ConfigError(
            f"cannot create a folder in {config.output}: {error.strerror}; choose another --output"
        ) from error


def _find_or_make(config: RunConfig, file: str) -> Path:
    if config.name is not None:
        folder = config.output / config.name
        if config.resume and not (folder / file).is_file():
            raise ConfigError(f"{folder} has no run to resume; runs in {config.output}: {_runs(config.output, file)}")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; choose another --name")
        if not config.resume and folder.exists() and any(p.name != lock.FILE for p in folder.iterdir()):
            raise ConfigError(f"{folder} exists; continue it with --resume, or choose another --name")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    config.output.mkdir(parents=True, exist_ok=True)
    numbered = re.compile(rf"{re.escape(config.method)}-(\d+)")
    taken = [int(m[1]) for p in config.output.iterdir() if (m := numbered.fullmatch(p.name))]
    for number in range(max(taken, default=0) + 1, 10**6):
        folder = config.output / f"{config.method}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another process has just created it
            continue
        return folder
    raise ConfigError(f"{config.output} has no free run number; choose another --output")


_FIRST = {"config.yaml", "models.json", lock.FILE}


@contextmanager
def undone(folder: Path, made: bool) -> Iterator[None]:
    """Remove a new folder where preparing the run fails, as long as it holds config.yaml and models.json only."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # another rank may have removed it
            if made and {p.name for p in folder.iterdir()} <= _FIRST:
                for name in _FIRST:
                    (folder / name).unlink(missing_ok=True)
                folder.rmdir()
        raise


def _runs(output: Path, file: str) -> str:
    names = sorted(p.parent.name for p in output.glob(f"*/{file}"))
    return ", ".join(names[-8:]) or "none"


def resume_command(folder: Path) -> str:
    """Return what to type to continue the run in `folder`."""
    return f"alignkit run {folder / 'config.yaml'} --resume"


class StepLines:
    """A file with one JSON object per line, each with its step, such as metrics.jsonl.

    Lines that a resumed run will write again are removed: those of steps after `from_step` (all lines where it is 0),
    and those of an evaluation at `from_step` unless `evaluated` is that step.
    """

    def __init__(self, path: Path, from_step: int, evaluated: int = -1) -> None:
        self.path = path
        if self.path.exists():
            self._drop_after(from_step, evaluated == from_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any], flush: bool = True) -> None:
        """Append one line and flush it, so that it survives a killed process."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if flush:
            self.flush()

    def flush(self) -> None:
        """Flush all lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _drop_after(self, step: int, evaluated: bool) -> None:
        # a run killed after its last checkpoint repeats the steps after it
        temporary = self.path.with_suffix(".tmp")
        odd = "surrogateescape"  # bytes that are not UTF-8 are copied unchanged
        with (
            self.path.open(encoding="utf-8", errors=odd) as lines,
            temporary.open("w", encoding="utf-8", errors=odd) as kept,
        ):
            for line in lines:
                try:
                    about = json.loads(line)
                    keep = step > 0 and about["step"] <= step
                    if keep and about["step"] == step and not evaluated:
                        keep = of_training(about)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # the process was killed while it wrote this line
                if keep:
                    kept.write(line)
        os.replace(temporary, self.path)


def of_training(line: Mapping[str, Any]) -> bool:
    """Return whether a line belongs to a training step, not to an evaluation."""
    return line.get("training") is not False and not any(name.startswith(EVAL) for name in line)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl. Raises as `read_lines`."""
    return list(read_lines(Path(folder) / "metrics.jsonl"))


def read_lines(path: Path, needs: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that `StepLines` wrote; an incomplete last line is ignored.

    needs: keys that every line must have besides the step. Integers of more than 15 digits are read as floats, which
    may be infinite. Raises DataError: missing file, or a line that is not an object with a step and these keys.
    """
    bad = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if bad:
                    what = " and ".join(f"a {key}" for key in ("step", *needs))
                    raise DataError(
                        f"{path}, line {bad}, is not a JSON object with {what}; remove the line, or run again"
                    )
                try:
                    found = json.loads(line, parse_int=_integer)
                    whole = (
                        isinstance(found, dict) and isinstance(found["step"], int) and all(k in found for k in needs)
                    )
                    bad = 0 if whole else number
                except (ValueError, KeyError, RecursionError):
                    bad = number
                if not bad:
                    yield found
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _integer(digits: str) -> int | float:
    # real counts are smaller, and a huge integer cannot be converted to a float in later computations
    return int(digits) if len(digits) <= 15 else float(digits)
