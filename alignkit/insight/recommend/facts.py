"""What rows, model, reward and judge say about which methods can serve, and which should."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alignkit.data import load
from alignkit.errors import DataError
from alignkit.forms import KINDS
from alignkit.insight.audit import Audit, audit
from alignkit.insight.audit.features import LENGTH
from alignkit.insight.places import model_folder
from alignkit.method import DataKind
from alignkit.rewards import check_judge, check_rewards, reward_folders
from alignkit.rewards.numeric import final_number
from alignkit.rows import FaultyRowsError, RawRows, Row, read_rows

# Rules of thumb, said as such in docs/recommend.md.
FEW = 1000  # rows
NOISY = 0.005  # of the rows contradict another one
TIES = 0.1  # of the rows
LEAN = 0.05  # from one half: how often the longer answer is chosen
TWICE = 20  # pairs that are judged twice, from which the part of flipped labels is estimated
SHORT = 40  # characters of an answer that can be asked for letter by letter
_WORDS = {"pairs": "pairs", "unpaired": "answers that are good or bad", "text": "answers", "prompts": "prompts"}


@dataclass(frozen=True)
class Facts:
    """What is known before a method is chosen.

    rows: those that a kind of method would read; problems: why there are none, for the other kinds. flipped: estimated
    part of labels that are flipped, None where too little is judged twice. noisy: why labels are taken as noisy, None
    where they are not. lean: which of the longer and the shorter answer is chosen more often, in a sentence, None where
    that may be chance or is little. answers: the verifier that the column `answer` serves. checkable: the given reward
    names no model. chat: whether the tokenizer has a chat template, None without a model.
    """

    audit: Audit
    rows: dict[DataKind, int]
    problems: dict[DataKind, str]
    flipped: float | None
    noisy: str | None
    lean: str | None
    answers: Literal["numeric", "exact"] | None
    reward: Any
    judge: Any
    checkable: bool
    chat: bool | None

    @property
    def few(self) -> bool:
        """Whether the rows are few."""
        return self.audit.kept < FEW

    @property
    def noise(self) -> float:
        """The part of flipped labels to reckon with: the estimate, else a tenth."""
        return 0.1 if self.flipped is None else min(max(round(self.flipped, 2), 0.01), 0.4)


def facts_of(
    data: object,
    columns: Mapping[str, str] | None = None,
    model: Any = None,
    reward: Any = None,
    judge: Any = None,
    eval_data: object = None,
) -> Facts:
    """Look at everything. Raises DataError, ConfigError and ModelError for what cannot be read."""
    for spec, check in ((reward, check_rewards), (judge, check_judge)):
        if spec is not None:
            check(spec)
    raw = read_rows(data)
    tokenizer = None if model is None else _tokenizer(model)
    found = audit(raw, eval_data=eval_data, columns=columns, model=tokenizer)
    rows: dict[DataKind, int] = {}
    problems: dict[DataKind, str] = {}
    asked: list[Row] = []
    for kind in KINDS:
        try:
            read = load(raw, kind, columns)
        except FaultyRowsError:
            raise
        except DataError as error:
            problems[kind] = _reason(kind, error, raw)
            continue
        rows[kind] = len(read)
        asked = read.rows if kind == "prompts" else asked
    return Facts(
        found, rows, problems, flipped(found), _noisy(found), _lean(found), _answers(asked), reward, judge,
        reward is not None and not reward_folders(reward) and not _says_llm(reward),
        None if tokenizer is None else bool(getattr(tokenizer, "chat_template", None)),
    )  # fmt: skip


def flipped(found: Audit) -> float | None:
    """Estimate the part e of labels that are flipped: of pairs judged twice, 2 e (1 - e) contradict each other.

    None where fewer than TWICE pairs are. Where every second one contradicts, labels say nothing: 0.5.
    """
    against = len(found.repeats.contradictions)
    twice = against + len(found.repeats.duplicates)
    if found.kind != "pairs" or twice < TWICE:
        return None
    return (1 - math.sqrt(max(0.0, 1 - 2 * against / twice))) / 2


def _noisy(found: Audit) -> str | None:
    against, ties = len(found.repeats.contradictions), len(found.dropped.get("ties", ()))
    if against >= max(3, NOISY * found.kept):
        return f"{against} rows say the opposite of another one"
    if ties >= TIES * found.total:
        return f"{ties / found.total:.0%} of the rows are ties, so others may be close calls"
    return None


def _lean(found: Audit) -> str | None:
    bias = next((b for b in found.biases if b.feature == LENGTH.name and b.beyond_chance), None)
    if bias is None or bias.share is None or abs(bias.share - 0.5) < LEAN:
        return None
    which = "longer" if bias.share > 0.5 else "shorter"
    return f"the {which} answer is chosen in {max(bias.share, 1 - bias.share):.0%} of the pairs that differ in length"


def _answers(rows: list[Row]) -> Literal["numeric", "exact"] | None:
    """Say which verifier could check every row's `answer`, None where none can."""
    said = [row.extra.get("answer") for row in rows]
    if not said or any(not isinstance(a, str | int | float) or not str(a).strip() for a in said):
        return None
    texts = [str(a).strip() for a in said]
    if all(final_number(text) is not None for text in texts):
        return "numeric"
    return "exact" if max(map(len, texts)) <= SHORT else None


def _says_llm(spec: Any) -> bool:
    if isinstance(spec, Mapping):
        return spec.get("use") == "llm" or _says_llm(spec.get("ensemble"))
    return any(map(_says_llm, spec)) if isinstance(spec, list | tuple) else spec == "llm"


def _tokenizer(model: Any) -> Any:
    from alignkit.config import RunConfig
    from alignkit.loading import load_tokenizer

    return load_tokenizer(RunConfig(method="recommend", model=model_folder(str(model)), data="-"))


def _reason(kind: DataKind, error: DataError, raw: RawRows) -> str:
    first = str(error).split("\n")[0].removeprefix(f"{raw.source}: ").rstrip(".")
    return f"it needs {_WORDS[kind]}: {first}"
