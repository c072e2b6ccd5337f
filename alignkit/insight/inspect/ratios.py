"""Policy against reference on the tokens of a pair: where DPO's margin comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from alignkit.config import RunConfig
from alignkit.data import Dataset, load
from alignkit.data.rows import Report, Row
from alignkit.data.tokenise import tokenise
from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.insight.inspect.token_texts import token_texts
from alignkit.insight.model_paths import adapter_settings, device, model_folder
from alignkit.models.loading import from_pretrained, load_tokenizer
from alignkit.models.scoring import plain_logps
from alignkit.rewards.answers import text_of
from alignkit.types import Completion, Example


@dataclass(frozen=True)
class Side:
    """An answer's tokens as text, their log-probabilities by policy and reference in nats, and which are trained."""

    pieces: tuple[str, ...]
    policy: tuple[float, ...]
    reference: tuple[float, ...]
    trained: tuple[bool, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """log policy - log reference of each token."""
        return tuple(p - r for p, r in zip(self.policy, self.reference, strict=True))

    @property
    def total(self) -> float:
        """h = log policy - log reference of the answer: the sum over the trained tokens."""
        return math.fsum(x for x, t in zip(self.ratios, self.trained, strict=True) if t)

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "ratios": self.ratios, "total": self.total}


@dataclass(frozen=True)
class PairRatios:
    """A pair under policy and reference. margin: h chosen - h rejected, nats."""

    policy: str
    reference: str
    prompt: str
    chosen: Side
    rejected: Side

    @property
    def margin(self) -> float:
        """Return h chosen - h rejected; DPO's implicit reward is beta times it (2305.18290, equation 7)."""
        return self.chosen.total - self.rejected.total

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        sides = {"chosen": self.chosen.describe(), "rejected": self.rejected.describe()}
        return {
            "policy": self.policy,
            "reference": self.reference,
            "prompt": self.prompt,
            **sides,
            "margin": self.margin,
        }


def pair_of(data: object, row: int, columns: Mapping[str, str] | None = None) -> Row:
    """Return the pair in row `row` of the source, counted from 1. Raises DataError where that row is not a pair."""
    dataset = load(data, "pairs", columns)
    found = next((r for r in dataset.rows if r.row == row), None)
    if found is None:
        why = next((reason for reason, rows in dataset.report.dropped.items() if row in rows), None)
        what = f"row {row} is dropped ({why}); choose another" if why else f"row {row} does not exist"
        raise DataError(f"{dataset.source}: {what}; it has {dataset.report.total} rows")
    return found


def pair_ratios(policy: str, row: Row, reference: str | None = None) -> PairRatios:
    """Score both answers of a pair under policy and reference, each sequence on its own.

    policy, reference: folders or hub names of models, adapters, or runs. The default reference is the base of the
    policy's adapter. Raises ModelError and ConfigError.
    """
    policy = model_folder(policy)
    adapter = adapter_settings(policy)
    if reference is None and not adapter:
        raise ConfigError(f"'{policy}' is not an adapter, so it has no base to use as the reference; give --reference")
    config = RunConfig(method="inspect", model=policy, data="-")
    tokenizer = load_tokenizer(config)
    example = _example(row, tokenizer)
    policy_logps = _logps(policy, config, example)
    if reference is None:
        # switching the adapter off is not the base: trained biases and the changed base of PiSSA and OLoRA would remain
        reference = str(adapter["base_model_name_or_path"])
    else:
        reference = model_folder(reference)
        other = config.model_copy(update={"model": reference})
        _check_same_tokens(tokenizer, load_tokenizer(other), policy, reference)
    reference_logps = _logps(reference, config, example)
    answers = zip(example.completions, policy_logps, reference_logps, strict=True)
    sides = [_side(tokenizer, example, *answer) for answer in answers]
    return PairRatios(policy, reference, text_of(row.prompt), *sides)


def _example(row: Row, tokenizer: Any) -> Example:
    examples, report = tokenise(Dataset([row], "pairs", "pairs", "the pair", Report(1)), tokenizer)
    if not examples:
        raise DataError(f"the pair: {'; '.join(report.lines())}")
    return examples[0]


@torch.no_grad()
def _logps(name: str, config: RunConfig, example: Example) -> list[list[float]]:
    """Load a model and return the log-probabilities of each answer's tokens; no two models are held at a time."""
    model: Any = from_pretrained(name, config).to(device()).eval()
    n = len(example.prompt)
    try:
        return [
            plain_logps(model, torch.cat([example.prompt, c.tokens]).to(device()), n).tolist()
            for c in example.completions
        ]
    except (IndexError, RuntimeError) as error:  # more tokens than positions, ids outside of the vocabulary
        longest = n + max(len(c.tokens) for c in example.completions)
        raise ModelError(f"{type(model).__name__} cannot read the pair's {longest} tokens: {error}") from error


def _check_same_tokens(policy_tokenizer: Any, reference_tokenizer: Any, policy: str, reference: str) -> None:
    if policy_tokenizer.get_vocab() != reference_tokenizer.get_vocab():
        raise ModelError(
            f"the tokenizers of '{policy}' and '{reference}' have different tokens, so their log-ratio is undefined; "
            f"give the model that the policy was trained from"
        )


def _side(
    tokenizer: Any, example: Example, completion: Completion, policy: list[float], reference: list[float]
) -> Side:
    ids = completion.tokens.tolist()
    trained = set(completion.trained_at.tolist())
    return Side(
        tuple(token_texts(tokenizer, example.prompt.tolist(), ids)),
        tuple(policy),
        tuple(reference),
        tuple(i in trained for i in range(len(ids))),
    )
