"""Reads a script that trains with TRL by its syntax tree. Nothing of it is run or imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError
from alignkit.trl_names import table, trainers

_SPLITS = {"train_dataset": "dataset_train_split", "eval_dataset": "dataset_test_split"}
_OF_MODEL = (  # arguments of from_pretrained
    "model_name_or_path", "dtype", "torch_dtype", "attn_implementation", "revision", "trust_remote_code",
)  # fmt: skip
_SECOND = {  # positional arguments after the model
    "GRPOTrainer": "reward_funcs",
    "RLOOTrainer": "reward_funcs",
    "DPOTrainer": "ref_model",
    "KTOTrainer": "ref_model",
}
_IGNORED = ("args", "processing_class", "tokenizer")


class _Unread(Exception):
    """An expression that only running the script would tell."""


@dataclass(frozen=True)
class Call:
    """A call of a configuration class."""

    name: str
    line: int
    node: ast.Call


@dataclass(frozen=True)
class Script:
    """A script's configurations, its trainers by their configuration's name, and the names that are assigned once.

    later: attributes of objects that are assigned, with their lines.
    """

    configs: tuple[Call, ...]
    later: tuple[tuple[str, int], ...]
    trainers: Mapping[str, ast.Call]
    names: Mapping[str, ast.expr]

    def settings_of(self, config: Call) -> tuple[dict[str, Any], dict[str, int], tuple[tuple[str, str], ...]]:
        """Return what a configuration and its trainer set by TRL's names, the line of each, and what was not read."""
        given: dict[str, Any] = {}
        lines: dict[str, int] = {}
        unread: list[tuple[str, str]] = []
        arguments = list(_arguments(config.node, "output_dir"))
        for name, node in [*arguments, *self._of_trainer(self.trainers.get(config.name))]:
            lines[name] = node.lineno
            if name == "ref_model":
                same = isinstance(node, ast.Constant) and node.value is None
                unread += (
                    [] if same else [(name, f"line {node.lineno}: the reference is the model that a run starts from")]
                )
                continue
            try:
                given.update(self._read(name, node))
            except _Unread as error:
                unread.append((name, f"line {node.lineno} computes it: {error}; set it by hand"))
        fields = table()
        unread += [(n, f"line {line} assigns it later; set it by hand") for n, line in self.later if n in fields]
        return given, lines, tuple(unread)

    def _of_trainer(self, trainer: ast.Call | None) -> Iterator[tuple[str, ast.expr]]:
        for name, node in _arguments(trainer, "model", _SECOND.get(_name(trainer), "args")) if trainer else ():
            found = self._resolved(node)
            if name == "peft_config" and isinstance(found, ast.Call) and _name(found) == "LoraConfig":
                yield "use_peft", ast.copy_location(ast.Constant(True), found)
                yield from _arguments(found, "task_type")
            elif name not in _IGNORED:
                yield name, node

    def _read(self, name: str, node: ast.expr) -> dict[str, Any]:
        found = self._resolved(node)
        if name == "model":
            return self._model(found)
        if name in _SPLITS:
            return self._rows(name, found)
        return {name: self._value(found)}

    def _model(self, node: ast.expr) -> dict[str, Any]:
        if not isinstance(node, ast.Call) or _name(node) != "from_pretrained":
            return {"model_name_or_path": self._value(node)}
        given = dict(_arguments(node, "model_name_or_path"))
        found = {k: self._value(self._resolved(v)) for k, v in given.items() if k in _OF_MODEL}
        if "revision" in found:
            found["model_revision"] = found.pop("revision")
        quantised = self._resolved(given["quantization_config"]) if "quantization_config" in given else None
        if isinstance(quantised, ast.Call):
            bits = {k: self._value(v) for k, v in _arguments(quantised) if k in ("load_in_4bit", "load_in_8bit")}
            return found | bits
        return found

    def _rows(self, name: str, node: ast.expr) -> dict[str, Any]:
        part = None
        if isinstance(node, ast.Subscript):
            part, node = self._value(node.slice), self._resolved(node.value)
        if not isinstance(node, ast.Call) or _name(node) != "load_dataset":
            raise _Unread(ast.unparse(node)[:80])
        given = {k: self._value(self._resolved(v)) for k, v in _arguments(node, "path", "name")}
        split = part or given.get("split")
        if other := set(given) - {"path", "name", "split"}:
            raise _Unread(f"load_dataset with {', '.join(sorted(other))}")
        found = {"path": given.get("path"), "name": given.get("name"), "split": split}
        return {name: {k: v for k, v in found.items() if v is not None}}

    def _resolved(self, node: ast.expr) -> ast.expr:
        for _ in range(5):  # a name for a name; a circle ends here
            if isinstance(node, ast.Name) and node.id in self.names:
                node = self.names[node.id]
        return node

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr  # a data type
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise _Unread(ast.unparse(node)[:80]) from None


def read_script(text: str, path: Path) -> Script:
    """Read a script. Raises ConfigError: it is not Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{path}{line} is not Python: {getattr(error, 'msg', error)}") from None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    configs = sorted((Call(_name(c), c.lineno, c) for c in calls if _name(c) in trainers()), key=lambda c: c.line)
    of_config = {_name(c).removesuffix("Trainer") + "Config": c for c in calls if _name(c).endswith("Trainer")}
    later = sorted((n.attr, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _stored(n))
    return Script(tuple(configs), tuple(later), of_config, _assigned_once(tree))


def _stored(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store)


def _assigned_once(tree: ast.Module) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    stored = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return {name: value for name, value in found.items() if stored.count(name) == 1}


def _arguments(call: ast.Call, *positional: str) -> Iterator[tuple[str, ast.expr]]:
    yield from zip(positional, call.args, strict=False)
    for keyword in call.keywords:
        yield keyword.arg or f"**{ast.unparse(keyword.value)[:40]}", keyword.value


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
