"""Input and output of the command line: values, errors, the log, descriptions of settings. No heavy imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignkit.runs.progress import PlainHandler
from alignkit.runs.terminal import rank

if TYPE_CHECKING:
    from pydantic import BaseModel

    from alignkit.config import RunConfig


def named(columns: str | None) -> dict[str, Any]:
    """Return the setting `columns` of an option --columns, nothing without one."""
    return {} if columns is None else {"columns": columns_of(columns)}


_NAMES = "--columns needs names such as prompt=question,completion=answer (ours=yours), got '{}'"
Columns = Annotated[str | None, typer.Option(help="Names of columns, such as prompt=question (ours=yours)")]
"""The option --columns of every command that reads rows."""


def described(cls: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, default, values, meaning) of every field of a settings class, for help texts and docs.

    The fields of a mapping follow it as "mapping.field".
    """
    import json
    from pathlib import PurePath
    from typing import get_args

    from pydantic import BaseModel

    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, PurePath | str):
            shown = str(default)
        elif isinstance(default, BaseModel):
            shown = "{}"
        else:
            shown = "required" if field.is_required() else json.dumps(default)
        limits = [f"{sign} {getattr(m, k)}" for m in field.metadata for k, sign in _SIGNS.items() if hasattr(m, k)]
        yield name, shown, ", ".join([_values(field.annotation), *limits]), field.description or ""
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                for of_field in described(inner):
                    yield f"{name}.{of_field[0]}", *of_field[1:]


_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _values(annotation: Any) -> str:
    """Return the values that a field accepts, in a few words."""
    import types
    from typing import Annotated, Literal, Union, get_args, get_origin

    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(args[0])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_values, args))
    if origin is tuple:
        return ", ".join(map(_values, args))
    if origin is list:
        return f"list of {_values(args[0])}"
    if origin is dict:
        return "mapping"
    if annotation is types.NoneType:
        return "null"
    known = {"Any": "any", "LoraSettings": "mapping or rank"}
    known |= dict.fromkeys(("Sampling", "Rollout", "Health"), "mapping")
    name = "Any" if annotation is Any else str(annotation.__name__)
    return known.get(name, name.lower())


def value_of(text: str) -> Any:
    """Parse an option's value as YAML, or as text where it is not YAML."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def pairs_of(pairs: list[str]) -> dict[str, Any]:
    """Read the values of --set."""
    from alignkit.errors import ConfigError

    settings = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set needs KEY=VALUE, such as --set beta=0.2, got '{pair}'")
        settings[key.strip().replace("-", "_")] = value_of(value)
    return settings


def settings_of(what: str, given: dict[str, Any], pairs: list[str], only_file: bool = False) -> dict[str, Any]:
    """Return flat settings from a method's name or a YAML file, overridden by options, then by --set."""
    from alignkit.config import read_yaml
    from alignkit.errors import ConfigError

    from_file = Path(what).suffix in (".yaml", ".yml")
    if not from_file and (only_file or "/" in what or Path(what).is_file()):
        raise ConfigError(
            f"'{what}' is not a {'config' if only_file else 'method'}; a file of settings must end in .yaml or .yml"
        )
    settings = read_yaml(what) if from_file else {"method": what}
    options = given | pairs_of(pairs)
    if from_file and options.get("resume", settings.get("resume")):
        from alignkit.runs.config_file import located

        settings = located(what, settings)
    if "stages" in settings:
        raise ConfigError(f"{what} has `stages`, so it is a pipeline; try: alignkit pipeline {what}")
    return settings | options


def checked(settings: dict[str, Any]) -> tuple[RunConfig, Any]:
    """Find the method and validate all settings; an error names what is missing and what to type."""
    from alignkit import registry
    from alignkit.config import split
    from alignkit.errors import ConfigError

    if settings.get("method") is None:
        raise ConfigError(f"no method given; add `method:` to the file. Installed: {', '.join(registry.names())}")
    cls = registry.get(str(settings["method"]))
    missing = [name for name in ("model", "data") if settings.get(name) is None]
    if missing:
        options = " and ".join(f"--{name}" for name in missing)
        raise ConfigError(f"no {' and no '.join(missing)} given; add {options}, or the same in the YAML file")
    config, method_config = split(settings, cls.Config)
    return config, cls(method_config)


def columns_of(text: str | None) -> dict[str, str] | None:
    """Parse column names, "ours=theirs,..." or YAML {ours: theirs}. Raises ConfigError where they are neither."""
    from alignkit.errors import ConfigError

    names = None if text is None else value_of(text)
    if isinstance(names, str):
        pairs = [part.partition("=") for part in names.split(",")]
        names = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
        if len(names) < len(pairs) or not all(names) or not all(names.values()):
            raise ConfigError(_NAMES.format(text))
    if names is not None and not (isinstance(names, dict) and all(isinstance(v, str) for v in names.values())):
        raise ConfigError(_NAMES.format(text))
    return names


def complain(message: str) -> None:
    """Print an error; other ranks, whose error is most likely that of rank 0, print one line."""
    start = "error: "
    if rank():
        start, message = f"rank {rank()}: error: ", message.split("\n")[0]
    sys.stderr.write(f"{start}{message}\n")  # in one call: `print` makes two, between which other ranks' lines may come


def unexpected(error: Exception) -> str:
    """Return what happened and where, and write the whole traceback to a file."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    package, cli = (str(folder) for folder in (Path(__file__).parents[1], Path(__file__).parent))
    ours = (f for f in reversed(frames) if f.filename.startswith(package) and not f.filename.startswith(cli))
    frame = next(ours, frames[-1])
    first = str(error).strip().split("\n")[0][:300]
    lines = [f"{type(error).__name__}: {first}", f"  at {frame.filename}:{frame.lineno}, in {frame.name}"]
    if type(error).__name__ == "OutOfMemoryError":
        lines.append("  Less memory: lora, gradient_checkpointing, kept_logits_gib: 0, a smaller max_completion_tokens")
    return "\n".join([*lines, *whole_traceback(error)])


def whole_traceback(error: Exception) -> list[str]:
    """Write the traceback to a file and return the line that names it; print it where no file can be written."""
    import tempfile
    import traceback

    try:
        with tempfile.NamedTemporaryFile("w", prefix="alignkit-error-", suffix=".txt", delete=False) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        traceback.print_exception(error)
        return []
    return [f"  The whole traceback: {file.name}"]


def show_log() -> None:
    """Print alignkit's log on the terminal, and only those lines of other libraries' logs that matter to users."""
    import logging
    import warnings

    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_log

    from alignkit.runs.terminal import silence

    silence()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logger = logging.getLogger("alignkit")
    if not logger.handlers and rank() == 0:
        logger.addHandler(PlainHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    transformers_log.disable_progress_bar()  # it has one for each save and load
    if sys.stderr.isatty():
        enable_progress_bars()  # useful for downloads
    # they log every retry, every layer, and tables of missing weights (which alignkit reports as an error)
    for library in (
        "huggingface_hub",
        "bitsandbytes",
        "transformers.modeling_utils",
        "transformers.utils.loading_report",
        "transformers.distributed.tensor_parallel",
    ):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"warning: {message}\n")
