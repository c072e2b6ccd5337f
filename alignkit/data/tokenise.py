"""Rows -> examples: one place where text becomes tokens.

Prompt and completion are tokenised together, because a token may span their boundary. The tree's prompt is the longest
common prefix of the tokens of the prompt alone and of every prompt + completion. So each prompt + completion has
exactly the tokens of the whole text, and the tokens after the common prefix belong to the completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from alignkit.config import RunConfig
from alignkit.data import Dataset
from alignkit.data.chat import Chat, Draft, Span, common, render
from alignkit.data.encoder import Encoded, Encoder
from alignkit.data.plain import Answer, Tokenised
from alignkit.data.rows import Report, Row
from alignkit.errors import ConfigError
from alignkit.types import Example

__all__ = ["tokenise", "tokenise_as", "tokenised", "tokenised_as"]

PLAIN = Chat()
SPELLED = "rows with special tokens in their text, read as plain text without special_tokens_in_text: true"


def tokenise(
    dataset: Dataset,
    tokenizer: Any,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    chat: Chat = PLAIN,
) -> tuple[list[Example], Report]:
    """Turn every row into an Example; messages go through the tokenizer's chat template.

    max_prompt_tokens: a longer prompt keeps its end (and its beginning-of-sequence token). max_completion_tokens: a
    longer completion is cut and has no end-of-sequence token. chat: how conversations are read.
    The report counts cut rows, rows dropped because an answer became empty or the answers became identical, and what
    the template did not show. Raises ConfigError for a tokenizer without an end-of-sequence token or a chat template,
    ModelError for a template that does not end, FaultyRowsError (a DataError) for rows that the template refuses or
    from whose answers it leaves something out.
    """
    made, report = tokenised(dataset, tokenizer, max_prompt_tokens, max_completion_tokens, chat)
    return [one.example() for one in made], report


def tokenised(
    dataset: Dataset,
    tokenizer: Any,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    chat: Chat = PLAIN,
) -> tuple[list[Tokenised], Report]:
    """Do what `tokenise` does, without tensors: for many rows, which go to a store."""
    for name, limit in (("max_prompt_tokens", max_prompt_tokens), ("max_completion_tokens", max_completion_tokens)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} is {limit}; give 1 or more, or null for no limit")
    encoder = Encoder(tokenizer, not chat.special_tokens)
    report = Report(total=dataset.report.total)
    limits = _Limits(max_prompt_tokens, max_completion_tokens)
    drafts = _drafts(dataset, encoder, chat)
    pairs = zip(drafts, encoder.encode(drafts), strict=True)
    found = (_tokenised(draft, encoded, encoder, limits, report) for draft, encoded in pairs)
    return [one for one in found if one is not None], report


def tokenise_as(config: RunConfig, dataset: Dataset, tokenizer: Any) -> tuple[list[Example], Report]:
    """Turn every row into an Example as a run with these settings does. Raises as `tokenise`."""
    made, report = tokenised_as(config, dataset, tokenizer)
    return [one.example() for one in made], report


def tokenised_as(config: RunConfig, dataset: Dataset, tokenizer: Any) -> tuple[list[Tokenised], Report]:
    """Do what `tokenise_as` does, without tensors."""
    limits = config.max_prompt_tokens, config.max_completion_tokens
    return tokenised(dataset, tokenizer, *limits, Chat.of(config))


class _Limits(NamedTuple):
    prompt: int | None
    completion: int | None


def _drafts(dataset: Dataset, encoder: Encoder, chat: Chat) -> list[Draft]:
    """Return one draft for each row, in order."""
    conversations = [row for row in dataset.rows if isinstance(row.prompt, list)]
    rendered = iter(render(conversations, dataset.source, encoder.tokenizer, encoder.special, chat))
    return [next(rendered) if isinstance(row.prompt, list) else _text_draft(row, encoder) for row in dataset.rows]


def _text_draft(row: Row, encoder: Encoder) -> Draft:
    """Join prompt and completions; a BOS or EOS spelled out at the ends is read as the control token.

    Where all special tokens are, a text that ends with one gets no second end.
    """
    bos = encoder.tokenizer.bos_token if encoder.first and encoder.bos is not None else ""
    eos = encoder.tokenizer.eos_token
    prompt = str(row.prompt).removeprefix(bos)
    texts = tuple(prompt + str(completion).removesuffix(eos) for completion in row.completions)
    if not prompt:
        texts = tuple(text.removeprefix(bos) for text in texts)
    ended = tuple(not encoder.split and encoder.special.closed(text) for text in texts)
    notes = tuple(f"rows of text with '{name}', which only a chat template reads" for name in row.template)
    return Draft(row, prompt, texts, (None,) * len(texts), ended, control=not encoder.split, notes=notes)


@dataclass
class _Answer:
    """A completion's tokens and which of them are learned, None for all; cut: whether its end was removed."""

    ids: list[int]
    trained: list[bool] | None
    cut: bool = False


def _tokenised(
    draft: Draft, encoded: list[Encoded], encoder: Encoder, limits: _Limits, report: Report
) -> Tokenised | None:
    """Split off the common prompt, end and cut the completions; None (and a count) where nothing is left to learn."""
    number = draft.row.row
    prompt, *whole = encoded
    border = min((common(prompt.ids, text.ids) for text in whole), default=len(prompt.ids))
    head = [] if draft.control and isinstance(draft.row.prompt, list) else encoder.first
    context, cut = _context(prompt.ids[:border], head, encoder, limits.prompt)
    answers = [_answer(draft, k, text, border, encoder, limits.completion) for k, text in enumerate(whole)]
    if any(_is_empty(answer, encoder.eos) for answer in answers):
        report.drop("with an answer that became empty", number)
        return None
    if len(answers) == 2 and answers[0].ids == answers[1].ids:
        report.drop("with answers that became identical", number)
        return None
    if cut:
        report.note(f"prompts cut to their last {limits.prompt} tokens", number)
    for answer in answers:
        if answer.cut:
            report.note(f"completions cut to {limits.completion} tokens, without end-of-sequence", number)
    spelled = not draft.control and any(map(encoder.special.inside, (draft.prompt, *draft.texts)))
    if draft.hidden or spelled:
        report.note(SPELLED, number)
    for note in draft.notes:
        report.note(note, number)
    row = draft.row
    if not answers:
        return Tokenised(context, (), row.numbers, number, row.prompt, row.extra, row.declared)
    return Tokenised(context, tuple(map(_plain, answers)), row.numbers, number, declared=row.declared)


def _is_empty(answer: _Answer, eos: int) -> bool:
    """Return whether nothing of an answer is learned, or its end only."""
    return not answer.ids or answer.ids == [eos] or not (answer.trained is None or any(answer.trained))


def _context(ids: list[int], head: list[int], encoder: Encoder, limit: int | None) -> tuple[list[int], bool]:
    """Return the prompt's tokens, at least one, and whether they were cut."""
    if not head and ids[:1] == [encoder.bos]:
        head, ids = ids[:1], ids[1:]  # a cut keeps the template's BOS, as it keeps the tokenizer's
    if not head and not ids:
        head = [encoder.eos if encoder.bos is None else encoder.bos]
    if limit is None or len(head) + len(ids) <= limit:
        return head + ids, False
    keep = limit - len(head)
    return (head + ids[-keep:] if keep > 0 else head), True


def _answer(draft: Draft, k: int, text: Encoded, border: int, encoder: Encoder, limit: int | None) -> _Answer:
    ids = text.ids[border:]
    spans = draft.spans[k]
    trained = None if spans is None else _learned(draft, k, spans, (text.offsets or [])[border:])
    if not draft.ended[k] and ids[-1:] != [encoder.eos]:
        ids.append(encoder.eos)
        if trained is not None:
            trained.append(bool(spans))
    if limit is None or len(ids) <= limit:
        return _Answer(ids, trained)
    return _Answer(ids[:limit], None if trained is None else trained[:limit], cut=True)


def _learned(draft: Draft, k: int, spans: Sequence[Span], offsets: Sequence[Span]) -> list[bool]:
    """Return which tokens are learned; offsets: the characters of each."""
    at = [tuple(len(draft.restored(draft.texts[k][:end])) for end in span) for span in spans]
    # a token that spans the beginning of a turn belongs to the turn; one that spans its end does not
    return [any(a < end <= b for a, b in at) for _, end in offsets]


def _plain(answer: _Answer) -> Answer:
    return Answer(answer.ids, None if answer.trained is None or all(answer.trained) else answer.trained)
