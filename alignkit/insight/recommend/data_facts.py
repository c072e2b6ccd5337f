"""Facts about the rows, the model, the reward and the judge that decide which methods can and should be used."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.advice import DataFacts
from alignkit.data import load
from alignkit.data.forms import KINDS
from alignkit.data.rows import FaultyRowsError, RawRows, Row
from alignkit.data.sources import read_rows
from alignkit.errors import DataError
from alignkit.insight.audit import Audit, audit
from alignkit.insight.audit.features import LENGTH
from alignkit.insight.audit.repeats import votes
from alignkit.insight.model_paths import is_adapter, model_folder
from alignkit.insight.recommend.verifiable_rewards import uses_llm, verifier
from alignkit.method import DataKind
from alignkit.rewards import check_columns, check_judge, check_rewards, reward_folders

# Rules of thumb; docs/recommend.md calls them that too.
FEW = 1000  # rows
NOISY = 0.005  # fraction of the rows that contradict another one
TIES = 0.1  # fraction of the rows
LENGTH_BIAS = 0.05  # distance from one half: how often the longer answer is chosen
TWICE = 20  # pairs judged more than once that an estimate of the flipped labels needs
UNINFORMATIVE = 0.4  # fraction of flipped labels from which a method learns almost nothing
_WORDS = {"pairs": "pairs", "unpaired": "answers that are good or bad", "text": "answers", "prompts": "prompts"}


@dataclass(frozen=True)
class Facts:
    """The facts that are known before a method is chosen.

    data: the facts that methods receive. problems: why the rows cannot be read, for each kind that is missing in
    `data.rows`. disagreement: how often two judgements of a pair differ, 0 to 1, None where too few pairs are judged
    twice. reward, judge: the specs, as given.
    """

    audit: Audit
    problems: dict[DataKind, str]
    disagreement: float | None
    reward: Any
    judge: Any
    data: DataFacts


def facts_of(
    data: object,
    columns: Mapping[str, str] | None = None,
    model: Any = None,
    reward: Any = None,
    judge: Any = None,
    eval_data: object = None,
) -> Facts:
    """Collect the facts.

    Raises DataError, ConfigError or ModelError where an input cannot be read, and RewardError where the rows lack a
    column that the reward or the judge needs.
    """
    for spec, check in ((reward, check_rewards), (judge, check_judge)):
        if spec is not None:
            check(spec)
    raw = read_rows(data)
    tokenizer = None if model is None else _tokenizer(model)
    found = audit(raw, eval_data=eval_data, columns=columns, model=tokenizer)
    read, problems = _read(raw, columns)
    prompts = read.get("prompts", [])
    check_columns(reward, judge, {name for row in prompts for name in row.extra})
    differ = disagreement(votes(read.get("pairs", [])))
    flipped = flipped_labels(differ)
    return Facts(
        found, problems, differ, reward, judge,
        DataFacts(
            rows={kind: len(rows) for kind, rows in read.items()},
            kept=found.kept,
            labels=found.labels,
            few=found.kept < FEW,
            noisy=_noisy(found, differ),
            flipped=flipped,
            uninformative=flipped is not None and flipped >= UNINFORMATIVE,
            length_bias=_length_bias(found),
            chat_template=None if tokenizer is None else bool(getattr(tokenizer, "chat_template", None)),
            adapter=model is not None and is_adapter(model_folder(str(model))),
            reward=reward is not None,
            judge=judge is not None,
            checkable=reward is not None and not reward_folders(reward) and not uses_llm(reward),
            verifier=verifier(prompts),
        ),
    )  # fmt: skip


def _read(raw: RawRows, columns: Mapping[str, str] | None) -> tuple[dict[DataKind, list[Row]], dict[DataKind, str]]:
    """Read the rows as each kind; return them, and why they cannot be read as the other kinds."""
    read: dict[DataKind, list[Row]] = {}
    problems: dict[DataKind, str] = {}
    for kind in KINDS:
        try:
            read[kind] = load(raw, kind, columns).rows
        except FaultyRowsError:
            raise
        except DataError as error:
            problems[kind] = _reason(kind, error, raw)
    return read, problems


def disagreement(votes: Sequence[tuple[int, int]]) -> float | None:
    """Estimate how often two judgements of a pair differ, from the votes for either answer of pairs judged repeatedly.

    a and b votes differ in a b of their (a + b choose 2) combinations, which is unbiased for any number of votes. All
    pairs have the same weight: the combinations of one pair share its judgements, so many of them hold less information
    than the same number of pairs. None for fewer than TWICE pairs.
    """
    if len(votes) < TWICE:
        return None
    return statistics.fmean(a * b / math.comb(a + b, 2) for a, b in votes)


def flipped_labels(disagreement: float | None) -> float | None:
    """Estimate the fraction e of flipped labels: two judgements of a pair differ in 2 e (1 - e) of the cases.

    Returns 0.5 (labels without information) where at least half of the second judgements differ, None where unknown.
    """
    if disagreement is None:
        return None
    return (1 - math.sqrt(max(0.0, 1 - 2 * disagreement))) / 2


def _noisy(found: Audit, disagreement: float | None) -> str | None:
    against, ties = len(found.repeats.contradictions), len(found.dropped.get("ties", ()))
    if against >= max(3, NOISY * found.kept):
        return f"{against} {'pairs are judged' if found.kind == 'pairs' else 'answers are labelled'} both ways"
    if disagreement is None and ties >= TIES * found.total:
        return f"{ties / found.total:.0%} of the rows are ties, so other rows may be close calls"
    return None


def _length_bias(found: Audit) -> str | None:
    bias = next((b for b in found.biases if b.feature == LENGTH.name and b.beyond_chance), None)
    if bias is None or bias.share is None or abs(bias.share - 0.5) < LENGTH_BIAS:
        return None
    which = "longer" if bias.share > 0.5 else "shorter"
    return f"the {which} answer is chosen in {max(bias.share, 1 - bias.share):.0%} of the pairs that differ in length"


def _tokenizer(model: Any) -> Any:
    from alignkit.config import RunConfig
    from alignkit.models.loading import load_tokenizer

    return load_tokenizer(RunConfig(method="recommend", model=model_folder(str(model)), data="-"))


def _reason(kind: DataKind, error: DataError, raw: RawRows) -> str:
    first = str(error).split("\n")[0].removeprefix(f"{raw.source}: ").rstrip(".")
    return f"it needs {_WORDS[kind]}: {first}"
