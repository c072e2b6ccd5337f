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

from alignkit.config import RunConfig, read_yaml, write_yaml
from alignkit.errors import ConfigError, DataError

EVAL = "eval/"  # in front of the metrics of an evaluation

# Settings that may change between a run and its resumption without changing what is computed.
FREE = {
    "resume", "name", "output", "log_every", "save_every", "save_minutes", "keep_checkpoints", "max_tokens",
    "trackers", "device", "timeout_minutes", "trust_remote_code", "cache_file", "reference_cache", "kept_logits_gib",
    "health", "stop_on",
}  # fmt: skip


def create(config: RunConfig, accelerator: Any) -> Path:
    """Return the run's folder, made anew, or found again to be resumed; the main process makes it for all ranks.

    Raises ConfigError: taken, or not there.
    """
    name = find_or_make(config).name if accelerator.is_main_process else ""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        # as numbers in a tensor: an object would travel as a pickle
        letters = torch.tensor(list(name.encode().ljust(255)), device=accelerator.device)
        name = bytes(broadcast(letters).tolist()).decode().rstrip()
    return config.output / name


def find_or_make(config: RunConfig, file: str = "config.yaml") -> Path:
    """Return the folder of `config.name` (else of its method and a number); of one process. Raises as `create`.

    file: what makes a folder one that can be resumed.
    """
    try:
        return _find_or_make(config, file)
    except OSError as error:
        raise ConfigError(
            f"cannot make a folder in {config.output}: {error.strerror}; choose another --output"
        ) from error


def _find_or_make(config: RunConfig, file: str) -> Path:
    if config.name is not None:
        folder = config.output / config.name
        if config.resume and not (folder / file).is_file():
            raise ConfigError(f"nothing to resume in {folder}; runs there: {_runs(config.output, file)}")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; choose another --name")
        if not config.resume and folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} exists; go on with it by --resume, or choose another --name")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    config.output.mkdir(parents=True, exist_ok=True)
    numbered = re.compile(rf"{re.escape(config.method)}-(\d+)")
    taken = [int(m[1]) for p in config.output.iterdir() if (m := numbered.fullmatch(p.name))]
    for number in range(max(taken, default=0) + 1, 10**6):
        folder = config.output / f"{config.method}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another process took it just now
            continue
        return folder
    raise ConfigError(f"{config.output} is full of runs; choose another --output")


@contextmanager
def undone(folder: Path, made: bool) -> Iterator[None]:
    """Remove a folder that was just made where what prepares the run fails: nothing but config.yaml is in it yet."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # another rank may be faster
            if made and {p.name for p in folder.iterdir()} <= {"config.yaml"}:
                (folder / "config.yaml").unlink(missing_ok=True)
                folder.rmdir()
        raise


def _runs(output: Path, file: str) -> str:
    names = sorted(p.parent.name for p in output.glob(f"*/{file}"))
    return ", ".join(names[-8:]) or "none"


def write_config(folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Write config.yaml; when resuming, compare it instead. Raises ConfigError naming what changed."""
    path = folder / "config.yaml"
    if resume:
        before, now = ({k: v for k, v in s.items() if k not in FREE} for s in (read_yaml(path), settings))
        check_same(folder, before, now)
        return
    write_yaml(path, {k: v for k, v in settings.items() if k != "resume"})


def resume_command(folder: Path) -> str:
    """Return what to type to continue the run in `folder`."""
    return f"alignkit run {folder / 'config.yaml'} --resume"


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError naming what changed between the settings that a folder was begun with and those given now."""
    now = json.loads(json.dumps(now))
    changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if changed:
        was = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in changed[:3])
        raise ConfigError(f"{folder} was run with other settings: {was}. Resume with the same, or start a new run")


class StepLines:
    """A file of JSON objects, one a line, each with its step: metrics.jsonl and its like.

    What a resumed run does again is taken out: the lines of steps after `from_step` (from step 0 on all), and those of
    an evaluation at `from_step` unless it was the last one `evaluated`.
    """

    def __init__(self, path: Path, from_step: int, evaluated: int = -1) -> None:
        self.path = path
        if self.path.exists():
            self._drop_after(from_step, evaluated == from_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any], flush: bool = True) -> None:
        """Append one line and hand it to the system, so that a killed run keeps it."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if flush:
            self.flush()

    def flush(self) -> None:
        """Hand all lines to the system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _drop_after(self, step: int, evaluated: bool) -> None:
        # a run that was killed after its last checkpoint repeats those steps
        temporary = self.path.with_suffix(".tmp")
        odd = "surrogateescape"  # bytes that are no text go where they came from
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
                    continue  # the line that was being written when the process was killed
                if keep:
                    kept.write(line)
        os.replace(temporary, self.path)


def of_training(line: Mapping[str, Any]) -> bool:
    """Say whether a line is of a training step, and not of an evaluation."""
    return line.get("training") is not False and not any(name.startswith(EVAL) for name in line)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl. Raises as `read_lines`."""
    return list(read_lines(Path(folder) / "metrics.jsonl"))


def read_lines(path: Path, needs: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that `StepLines` wrote; a last line that was cut off is left out.

    needs: keys of every line beside the step. Integers beyond 15 digits are floats, which may be infinite. Raises
    DataError: no such file, or a line that is no object with a step and these keys.
    """
    bad = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if bad:
                    what = " and ".join(f"a {key}" for key in ("step", *needs))
                    raise DataError(f"{path}, line {bad}, is no JSON object with {what}; take it out, or run again")
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
    # no run counts so far, and a float cannot hold more: what computes with it would end in an error
    return int(digits) if len(digits) <= 15 else float(digits)
