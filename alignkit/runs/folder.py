"""A run's folder: config.yaml, metrics.jsonl, checkpoints/, model/."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

from alignkit.config import RunConfig, read_yaml, write_yaml
from alignkit.errors import ConfigError, DataError

EVAL = "eval/"  # in front of the metrics of an evaluation

# settings that may change when a run is resumed, because they do not change its results
FREE = {
    "resume", "name", "output", "log_every", "save_every", "save_minutes", "keep_checkpoints", "max_tokens",
    "trackers", "device", "timeout_minutes", "trust_remote_code", "cache_file", "reference_cache", "kept_logits_gib",
    "health", "stop_on", "callbacks",
}  # fmt: skip


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
        if not config.resume and folder.exists() and any(folder.iterdir()):
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


@contextmanager
def undone(folder: Path, made: bool) -> Iterator[None]:
    """Remove a new folder where preparing the run fails, as long as it holds config.yaml only."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # another rank may have removed it
            if made and {p.name for p in folder.iterdir()} <= {"config.yaml"}:
                (folder / "config.yaml").unlink(missing_ok=True)
                folder.rmdir()
        raise


def _runs(output: Path, file: str) -> str:
    names = sorted(p.parent.name for p in output.glob(f"*/{file}"))
    return ", ".join(names[-8:]) or "none"


def write_config(
    folder: Path, settings: Mapping[str, Any], resume: bool, defaults: Mapping[str, Any] | None = None
) -> None:
    """Write config.yaml; where the run is resumed, compare it instead. Raises ConfigError naming changed settings.

    defaults: of settings that did not exist when the run was started.
    """
    path = folder / "config.yaml"
    if resume:
        started = _filled(read_yaml(path), defaults or {})
        before, now = ({k: v for k, v in s.items() if k not in FREE} for s in (started, settings))
        check_same(folder, before, now)
        return
    write_yaml(path, {k: v for k, v in settings.items() if k != "resume"})


def _filled(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with the defaults of those that it lacks, also inside of mappings."""
    inner = {
        k: {**defaults[k], **v} for k, v in saved.items() if isinstance(v, dict) and isinstance(defaults.get(k), dict)
    }
    return {**defaults, **saved, **inner}


def start_date(config: RunConfig) -> date:
    """Return the date that chat templates write in a run: the setting, or the day on which the run was started."""
    if config.template_date is not None:
        return config.template_date
    path = config.output / (config.name or "") / "config.yaml"
    if not config.resume or not path.is_file():
        return date.today()
    pinned = read_yaml(path).get("template_date")
    return date.fromisoformat(str(pinned)) if pinned else date.fromtimestamp(path.stat().st_mtime)


def resume_command(folder: Path) -> str:
    """Return what to type to continue the run in `folder`."""
    return f"alignkit run {folder / 'config.yaml'} --resume"


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError naming the settings that differ between a folder's start and now."""
    now = json.loads(json.dumps(now))
    changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if changed:
        was = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in changed[:3])
        raise ConfigError(
            f"{folder} was started with other settings: {was}. Resume with the same settings, or start a new run"
        )


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
