"""The Hugging Face model card (README.md) of a trained model, written from its run's folder.

It names folders and files by their last part only, because cards are published.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alignkit import registry
from alignkit.config import RunConfig, read_yaml
from alignkit.data_spec import SUFFIXES, sources_of, suffix_of
from alignkit.errors import ConfigError, PluginError
from alignkit.method import Method
from alignkit.runs import sessions, usage
from alignkit.runs.folder import read_lines
from alignkit.runs.results import in_training, outcomes

_SHOWN = (
    "epochs", "max_steps", "batch_size", "epochs_per_batch", "minibatches", "learning_rate", "schedule", "optimizer",
    "warmup_fraction", "weight_decay", "adam_betas", "adam_epsilon", "max_grad_norm", "reference", "lora", "quantize",
    "sampling", "reward", "judge", "critic", "max_prompt_tokens", "max_completion_tokens", "precision", "dtype", "seed",
)  # fmt: skip
_PRIVATE = ("url", "key_env", "cache_file", "body")  # of a reward's or a judge's endpoint
_ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def place(value: object) -> str:
    """Return the public name of a model or a file: a hub name as it is, the last part of a path.

    The model/ of a run's folder has the run's name, rows that were given in Python have their type's name.
    """
    if isinstance(value, list | Mapping):
        return ", ".join(map(place, _paths(value))) or f"<{type(value).__name__}>"
    path = Path(str(value))
    if not _local(value):
        return str(value)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def papers(method: type[Method[Any]] | None) -> list[str]:
    """Return the arXiv numbers in the first paragraph of a method's docstring, else the first one in the docstring."""
    about = _about(method)
    return _ARXIV.findall(about.split("\n\n")[0]) or _ARXIV.findall(about)[:1]


def write(model: Path, run: Path) -> None:
    """Write README.md into the folder of a saved model. run: the folder of the run that trained it."""
    about = _About(model, run)
    metadata = yaml.safe_dump(about.metadata(), sort_keys=False, allow_unicode=True)
    base, in_4_bits = about.base if about.adapter else None, bool(about.settings.get("quantize"))
    how = usage.text(about.output, base, in_4_bits, about.multimodal)
    parts = [f"---\n{metadata}---", f"# {about.title}", about.lead(), "## How to load it", how]
    parts += ["## Results", about.results(), "## Training", about.training(), "## Limits", about.limits()]
    (model / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


class _About:
    """The parts of a card."""

    def __init__(self, model: Path, run: Path) -> None:
        self.settings = read_yaml(run / "config.yaml")
        self.lines, self.alarms = (_lines(run / name) for name in ("metrics.jsonl", "alarms.jsonl"))
        self.sessions = sessions.read(run)
        self.method = _method(str(self.settings["method"]))
        self.adapter = (model / "adapter_config.json").is_file()
        self.multimodal = _is_multimodal(model)
        self.name, self.base = str(self.settings["method"]), place(self.settings["model"])
        self.data = _code(place(self.settings["data"]))
        self.scores = self.method is not None and "reward" in self.method.trains
        chat = (model / "chat_template.jinja").is_file()
        pairwise = bool(self.settings.get("pairwise"))
        self.output: usage.Output = "chat" if chat else "text"
        if self.scores:
            self.output = "preference" if pairwise else "score"

    @property
    def title(self) -> str:
        """The title, in one line."""
        what = {"preference": "Preference model", "score": "Reward model"}.get(self.output, "Language model")
        return " ".join(f"{what} by {self.name}, from {self.base}".split())

    def metadata(self) -> dict[str, Any]:
        """Return the front matter; data sets only where they are on the hub."""
        data = self.settings["data"]
        tags = ["alignkit", self.name, *(["reward-model"] if self.scores else []), *(["lora"] if self.adapter else [])]
        hub = [name.split(":")[0] for name in _paths(data) if not _local(name) and not name.startswith("<")]
        return {
            "base_model": self.base,
            "base_model_relation": "adapter" if self.adapter else "finetune",
            "library_name": "peft" if self.adapter else "transformers",
            "pipeline_tag": "text-classification" if self.scores else "text-generation",
            "tags": tags,
            **({"datasets": hub} if hub else {}),
        }

    def lead(self) -> str:
        """Return how the model was trained, with the method's papers."""
        steps = max((int(line["step"]) for line in self.lines), default=0)
        first = _about(self.method).split("\n\n")[0]
        method = (
            f"The method, {_code(self.name)}: {' '.join(first.split())}"
            if first
            else f"The method: {_code(self.name)}."
        )
        links = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in papers(self.method))
        return (
            f"{_code(self.base)}, trained {'by LoRA ' if self.settings.get('lora') else ''}for {steps} "
            f"step{'s' * (steps != 1)} on {self.data}.\n\n{method}{f' Papers: {links}.' if links else ''}"
        )

    def results(self) -> str:
        """Return the table of the run's results."""
        found = outcomes(self.lines)
        if not found:
            return "None were logged."
        compared = any(o.compared for o in found)
        rows = []
        for o in found:
            shown = ["-" if v is None else f"{v:.4g}" for v in ((o.before, o.after) if compared else (o.last,))]
            rows.append(f"| `{o.name}`{'' if o.held_out else ' *'} | {' | '.join(shown)} |")
        head = ["| metric | before | after |", "|---|---:|---:|"] if compared else ["| metric | value |", "|---|---:|"]
        lead = ["On held-out rows:\n"] if any(o.held_out for o in found) else []
        note = f"\n\\* {in_training(found)}" if not all(o.held_out for o in found) else ""
        return "\n".join([*lead, *head, *rows, *([note] if note else [])])

    def training(self) -> str:
        """Return rows, hyper-parameters, cost and versions."""
        own = self.method.Config.model_fields if self.method else {}
        known = {*RunConfig.model_fields, *own}
        facts = self.sessions[-1]["facts"] if self.sessions else {}
        values = {k: self.settings.get(k) for k in _SHOWN}
        values |= {k: v for k, v in self.settings.items() if k in own or k not in known}
        values["learning_rate"] = values["learning_rate"] or facts.get("learning_rate")
        table = [f"| `{k}` | {_code(_public(v))} |" for k, v in values.items() if v is not None]
        data = [f"- Data: {self.data}" + (f", {facts['rows']} rows" if facts.get("rows") else "")]
        if facts.get("held_out_rows"):
            of = self.settings.get("eval_data")
            data.append(f"- Held out: {facts['held_out_rows']} rows of {_code(place(of)) if of else 'it'}")
        return "\n".join([*data, *self._cost(), "", "| hyper-parameter | value |", "|---|---|", *table])

    def _cost(self) -> list[str]:
        on = self.sessions[-1]["environment"] if self.sessions else {}
        if not on:
            return []
        seconds, tokens = (sessions.total(self.sessions, key) for key in ("seconds", "tokens"))
        where = on.get("gpu") or on.get("processor", "?")
        versions = ", ".join(f"{k} {on[k]}" for k in ("alignkit", "torch", "transformers", "peft") if k in on)
        return [
            f"- Cost: {seconds:.0f} s and {tokens:.0f} tokens on {on.get('ranks', 1)} x {where}",
            f"- Versions: {versions}",
        ]

    def limits(self) -> str:
        """Return the model's limits, and the alarms of its run."""
        points = [
            "No benchmark was run, and its outputs were not checked for harm. It may have all problems of its "
            "base model."
        ]
        if not any(o.held_out for o in outcomes(self.lines)):
            points.append("No rows were held out, so its quality on rows that it was not trained on is unknown.")
        else:
            points.append(
                "The held-out rows come from the same source as the training rows; on other data it may be worse."
            )
        if self.settings.get("reward") or self.settings.get("judge"):
            points.append("It was optimised for its reward or judge, which can differ from what people prefer.")
        if self.scores:
            points.append(
                "It compares answers to one prompt. Its scores of answers to different prompts are not comparable."
            )
        points += [f"Alarm `{a.get('name')}`: {a.get('message')}." for a in self.alarms]
        return "\n".join(f"- {' '.join(p.split())}" for p in points)


def _is_multimodal(model: Path) -> bool:
    """Return whether a saved model, or the base of a saved adapter, has more than a language model."""
    if (model / "adapter_config.json").is_file():
        return json.loads((model / "adapter_config.json").read_text()).get("task_type") is None
    config = model / "config.json"
    return config.is_file() and "text_config" in json.loads(config.read_text())


def _method(name: str) -> type[Method[Any]] | None:
    try:
        return registry.get(name)
    except PluginError:
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    return list(read_lines(path)) if path.is_file() else []


def _paths(data: object) -> list[str]:
    """Return the paths and names of the sources in a run's settings, none where they are not described."""
    try:
        return [str(source.path) for source in sources_of(data) or []]
    except ConfigError:
        return []


def _local(value: object) -> bool:
    """Return whether it is a path, not a name on the hub."""
    text = str(value)
    path = Path(text)
    far = path.is_absolute() or len(path.parts) > 2 or text.startswith((".", "~"))
    return far or suffix_of(path) in SUFFIXES or path.exists()


def _public(value: Any) -> Any:
    """Return a setting without paths and URLs."""
    if isinstance(value, Mapping):
        return {k: _public(v) for k, v in value.items() if k not in _PRIVATE}
    if isinstance(value, list):
        return [_public(v) for v in value]
    return place(value) if isinstance(value, str) and _local(value) else value


def _about(method: type[Method[Any]] | None) -> str:
    """Return the docstring of a method's module."""
    return (sys.modules[method.__module__].__doc__ or "").strip() if method else ""


def _code(value: Any) -> str:
    """Return a value as inline code for a line or a table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"
