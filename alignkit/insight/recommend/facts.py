"""What rows, model, reward and judge say about which methods can serve, and which should."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignkit.data import load
from alignkit.data.forms import KINDS
from alignkit.data.rows import FaultyRowsError, RawRows, Row
from alignkit.data.sources import read_rows
from alignkit.errors import DataError
from alignkit.insight.audit import Audit, audit
from alignkit.insight.audit.features import LENGTH
from alignkit.insight.audit.repeats import votes
from alignkit.insight.model_paths import is_adapter, model_folder
from alignkit.insight.recommend.scoring import says_llm, verifier
from alignkit.method import DataKind
from alignkit.rewards import check_columns, check_judge, check_rewards, reward_folders

# Rules of thumb, said as such in docs/recommend.md.
FEW = 1000  # rows
NOISY = 0.005  # of the rows contradict another one
TIES = 0.1  # of the rows
LEAN = 0.05  # from one half: how often the longer answer is chosen
TWICE = 20  # pairs that are judged more than once, from which the part of flipped labels is estimated
BLIND = 0.4  # of the labels are flipped: what is left of them teaches next to nothing
_WORDS = {"pairs": "pairs", "unpaired": "answers that are good or bad", "text": "answers", "prompts": "prompts"}


@dataclass(frozen=True)
class Facts:
    """What is known before a method is chosen.

    rows: those that a kind of method would read; problems: why there are none, for the other kinds. disagreement: how
    often two judgements of a pair differ, from 0 to 1, None where too little is judged twice. noisy: why labels are
    taken as noisy, None where they are not. lean: which of the longer and the shorter answer is chosen more often, in a
    sentence, None where that may be chance or is little. answers: the verifier that the column `answer` serves.
    checkable: the given reward names no model. chat: whether the tokenizer has a chat template, None without a model.
    adapter: the model's folder holds an adapter.
    """

    audit: Audit
    rows: dict[DataKind, int]
    problems: dict[DataKind, str]
    disagreement: float | None
    noisy: str | None
    lean: str | None
    answers: Literal["numeric", "exact"] | None
    reward: Any
    judge: Any
    checkable: bool
    chat: bool | None
    adapter: bool

    @property
    def flipped(self) -> float | None:
        """The estimated part e of labels that are flipped: two judgements of a pair differ in 2 e (1 - e) of the cases.

        0.5, labels that say nothing, where every second judgement or more differs. None where that is not known.
        """
        if self.disagreement is None:
            return None
        return (1 - math.sqrt(max(0.0, 1 - 2 * self.disagreement))) / 2

    @property
    def blind(self) -> bool:
        """Whether labels say next to nothing."""
        return self.flipped is not None and self.flipped >= BLIND

    @property
    def few(self) -> bool:
        """Whether the rows are few."""
        return self.audit.kept < FEW

    @property
    def noise(self) -> float:
        """The part of flipped labels to reckon with: the estimate in two digits, else a tenth."""
        return 0.1 if self.flipped is None else float(f"{self.flipped:.2g}")


def facts_of(
    data: object,
    columns: Mapping[str, str] | None = None,
    model: Any = None,
    reward: Any = None,
    judge: Any = None,
    eval_data: object = None,
) -> Facts:
    """Look at everything. Raises DataError, ConfigError and ModelError for what cannot be read, and RewardError where
    rows lack a column that reward or judge cannot do without."""
    for spec, check in ((reward, check_rewards), (judge, check_judge)):
        if spec is not None:
            check(spec)
    raw = read_rows(data)
    tokenizer = None if model is None else _tokenizer(model)
    found = audit(raw, eval_data=eval_data, columns=columns, model=tokenizer)
    read, problems = _read(raw, columns)
    asked = read.get("prompts", [])
    check_columns(reward, judge, {name for row in asked for name in row.extra})
    disagrees = disagreement(votes(read.get("pairs", [])))
    return Facts(
        found, {kind: len(rows) for kind, rows in read.items()}, problems, disagrees, _noisy(found, disagrees),
        _lean(found), verifier(asked), reward, judge,
        reward is not None and not reward_folders(reward) and not says_llm(reward),
        None if tokenizer is None else bool(getattr(tokenizer, "chat_template", None)),
        model is not None and is_adapter(model_folder(str(model))),
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

    a and b votes differ in a b of their (a + b choose 2) couples, which is unbiased for any number of votes. Pairs
    weigh alike: couples of one pair share their judgements, so that many of them know less than as many pairs do. None
    for fewer than TWICE pairs.
    """
    if len(votes) < TWICE:
        return None
    return statistics.fmean(a * b / math.comb(a + b, 2) for a, b in votes)


def _noisy(found: Audit, disagrees: float | None) -> str | None:
    against, ties = len(found.repeats.contradictions), len(found.dropped.get("ties", ()))
    if against >= max(3, NOISY * found.kept):
        return f"{against} {'pairs are judged' if found.kind == 'pairs' else 'answers are labelled'} both ways"
    if disagrees is None and ties >= TIES * found.total:
        return f"{ties / found.total:.0%} of the rows are ties, so others may be close calls"
    return None


def _lean(found: Audit) -> str | None:
    bias = next((b for b in found.biases if b.feature == LENGTH.name and b.beyond_chance), None)
    if bias is None or bias.share is None or abs(bias.share - 0.5) < LEAN:
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
