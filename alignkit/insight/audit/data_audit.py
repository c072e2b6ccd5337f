"""audit(): facts about a data set, and about a reward on it, to know before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.config import RunConfig
from alignkit.data import Dataset, load
from alignkit.data.forms import KINDS
from alignkit.data.rows import FaultyRowsError, Row
from alignkit.data.sources import read_rows
from alignkit.errors import ConfigError, DataError
from alignkit.insight.audit.bias import Bias, biases, feature_counts
from alignkit.insight.audit.findings import Finding, preference_findings, reward_findings, row_findings
from alignkit.insight.audit.lengths import QUANTILES, Budgets, Length, Lengths, budgets, measure, summaries
from alignkit.insight.audit.repeats import Repeats, repeats, shared_prompts
from alignkit.insight.audit.reward_audit import RewardAudit, Scorer, audit_reward
from alignkit.insight.model_paths import device, model_folder
from alignkit.models.loading import load_tokenizer
from alignkit.rewards import build_rewards

_LIMITS = {name: RunConfig.model_fields[name].default for name in ("max_prompt_tokens", "max_completion_tokens")}


@dataclass(frozen=True)
class Audit:
    """The result of `audit`.

    kind: the kind that the rows were read as, the richest that their form serves; serves: all kinds that it serves.
    total, kept: rows of the source, and rows that a method reads. dropped: reason -> rows. labels: numbers of desirable
    and undesirable rows, None for other kinds. shared: held-out rows whose prompt is trained on, None without held-out
    rows. unit: of the lengths. budgets: what a run would cut, None without a tokenizer. biases: of the preferences,
    empty without pairs.
    """

    source: str
    form: str
    kind: str
    serves: tuple[str, ...]
    total: int
    kept: int
    dropped: dict[str, list[int]]
    labels: tuple[int, int] | None
    repeats: Repeats
    shared: tuple[int, ...] | None
    unit: str
    lengths: tuple[Length, ...]
    budgets: Budgets | None
    biases: tuple[Bias, ...]
    reward: RewardAudit | None
    findings: tuple[Finding, ...]
    lines: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            **asdict(self),
            "quantiles": list(QUANTILES),
            "findings": [finding._asdict() for finding in self.findings],
        }


def audit(
    data: object,
    *,
    eval_data: object = None,
    columns: Mapping[str, str] | None = None,
    model: Any = None,
    reward: Any = None,
    max_prompt_tokens: int | None = _LIMITS["max_prompt_tokens"],
    max_completion_tokens: int | None = _LIMITS["max_completion_tokens"],
    asked: int = 500,
) -> Audit:
    """Audit a data set, and a reward on it where one is given.

    data, eval_data, columns: as in a run. model: folder, hub name or tokenizer, to count tokens and to report what the
    budgets cut. reward: a spec (docs/rewards.md), which scores at most `asked` rows, evenly spread. Raises DataError,
    ConfigError, ModelError and RewardError for what cannot be read, loaded or scored.
    """
    if asked < 2:
        raise ConfigError(f"asked is {asked}; auditing a reward needs at least 2 rows")
    dataset = _read(data, columns)
    held_out = None if eval_data is None else load(eval_data, "prompts", columns)
    rewards = None if reward is None else build_rewards(reward, device())
    tokenizer = _tokenizer(model if model is not None else getattr(rewards, "model_folder", None))
    measured = measure(dataset, tokenizer)
    if not measured.rows:
        raise DataError(f"{dataset.source}: no row has a token to learn")
    found = repeats(dataset.rows)
    shared = None if held_out is None else shared_prompts(dataset.rows, held_out.rows)
    limits = None if model is None else budgets(dataset, measured, tokenizer, max_prompt_tokens, max_completion_tokens)
    rows, answers = _without_duplicates(measured, found)
    counts = feature_counts(rows, answers) if dataset.kind == "pairs" else None
    preferences = biases(counts, np.ones(len(rows))) if counts else ()
    scores = None if rewards is None else audit_reward(Scorer(rewards, tokenizer), rows, counts, asked)
    if rewards is not None:
        rewards.close()
    findings = [*row_findings(found, shared, limits), *preference_findings(preferences)]
    findings += reward_findings(scores, preferences) if scores else ()
    return Audit(
        **_dataset_fields(dataset),
        repeats=found,
        shared=shared,
        unit=measured.unit,
        lengths=summaries(measured, dataset.kind),
        budgets=limits,
        biases=preferences,
        reward=scores,
        findings=tuple(findings),
    )


def _without_duplicates(measured: Lengths, found: Repeats) -> tuple[list[Row], list[tuple[int, ...]]]:
    """Return rows and their answers' lengths without duplicates: a repeated row is one observation."""
    duplicates = set(found.duplicates)
    kept = [(row, n) for row, n in zip(measured.rows, measured.answers, strict=True) if row.row not in duplicates]
    return [row for row, _ in kept], [n for _, n in kept]


def _dataset_fields(dataset: Dataset) -> dict[str, Any]:
    """Return the fields that follow from the rows alone."""
    report, labels = dataset.report, None
    if dataset.kind == "unpaired":
        desirable = sum(row.numbers["desirable"] == 1 for row in dataset.rows)
        labels = (desirable, len(dataset) - desirable)
    return {
        "source": dataset.source,
        "form": dataset.form,
        "kind": dataset.kind,
        "serves": dataset.kinds,
        "total": report.total,
        "kept": len(dataset),
        "dropped": report.dropped,
        "labels": labels,
        "lines": tuple(dataset.lines()),
    }


def _read(data: object, columns: Mapping[str, str] | None) -> Dataset:
    """Read rows as the richest kind that their form serves."""
    raw, problems = read_rows(data), list[DataError]()
    for kind in KINDS:
        try:
            found = load(raw, kind, columns)
        except FaultyRowsError:
            raise
        except DataError as error:
            problems.append(error)
            continue
        if found.kinds[0] == kind:
            return found
        raise problems[0]  # every row was dropped for the form's own kind
    raise problems[-1]


def _tokenizer(model: Any) -> Any | None:
    if model is None:
        return None
    if not isinstance(model, str | Path):
        return model
    return load_tokenizer(RunConfig(method="audit", model=model_folder(str(model)), data="-"))
