"""Rows -> examples: one place where text becomes tokens.

Prompt and completion are tokenised together, because a token may span their boundary. The tree's prompt is the longest
common prefix of the tokens of the prompt alone and of every prompt + completion. So each prompt + completion has
exactly the tokens of the whole text, and the tokens after the common prefix belong to the completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from alignkit.data import Dataset
from alignkit.data.chat import Draft, Span, SpecialTokens, common, render
from alignkit.data.rows import Report, Row
from alignkit.errors import ConfigError
from alignkit.types import Completion, Example

__all__ = ["tokenise"]


def tokenise(
    dataset: Dataset,
    tokenizer: Any,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    split_special_tokens: bool = True,
    template_seconds: float = 10.0,
) -> tuple[list[Example], Report]:
    """Turn every row into an Example; messages go through the tokenizer's chat template.

    max_prompt_tokens: a longer prompt keeps its end (and its beginning-of-sequence token). max_completion_tokens: a
    longer completion is cut and has no end-of-sequence token. split_special_tokens: special tokens inside a row's text
    are read as plain text; in messages they always are. template_seconds: the time limit of the template for each row.
    The report counts cut rows, and rows dropped because an answer became empty or the answers became identical.
    Raises ConfigError for a tokenizer without an end-of-sequence token or a chat template, ModelError for a template
    that does not end, FaultyRowsError (a DataError) for rows that the template refuses.
    """
    for name, limit in (("max_prompt_tokens", max_prompt_tokens), ("max_completion_tokens", max_completion_tokens)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} is {limit}; give 1 or more, or null for no limit")
    encoder = _Encoder(tokenizer, split_special_tokens)
    report = Report(total=dataset.report.total)
    limits = _Limits(max_prompt_tokens, max_completion_tokens)
    drafts = _drafts(dataset, encoder, template_seconds)
    examples = []
    for draft, encoded in zip(drafts, encoder.encode(drafts), strict=True):
        example = _example(draft, encoded, encoder, limits, report)
        if example is not None:
            examples.append(example)
    return examples, report


class _Limits(NamedTuple):
    prompt: int | None
    completion: int | None


class _Encoded(NamedTuple):
    """Tokens, and the characters that each one covers where offsets were requested."""

    ids: list[int]
    offsets: list[Span] | None = None


class _Encoder:
    """A tokenizer with what it adds: the tokens that it puts first, and its BOS and EOS."""

    def __init__(self, tokenizer: Any, split_special_tokens: bool) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token and save it again")
        self.tokenizer = tokenizer
        self.split = split_special_tokens
        self.special = SpecialTokens(tokenizer)
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        plain, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        # the tokens that the tokenizer puts first; those it puts last are not used: only completions end with EOS
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        self.first: list[int] = list(full[:at])

    def encode(self, drafts: Sequence[Draft]) -> list[list[_Encoded]]:
        """Return the tokens of each draft's prompt and texts, without added ones; one call per kind of draft."""
        found: dict[int, list[_Encoded]] = {}
        sorts: dict[tuple[bool, bool], list[int]] = {}
        for i, draft in enumerate(drafts):
            if draft.hidden:
                found[i] = [self._careful(draft, text) for text in (draft.prompt, *draft.texts)]
            else:
                sorts.setdefault((draft.control, any(draft.spans)), []).append(i)
        for (control, offsets), members in sorts.items():
            texts = [text for i in members for text in (drafts[i].prompt, *drafts[i].texts)]
            encoded = iter(self._tokens(texts, split=self.split and not control, offsets=offsets))
            for i in members:
                found[i] = [next(encoded) for _ in range(1 + len(drafts[i].texts))]
        return [found[i] for i in range(len(drafts))]

    def _tokens(self, texts: list[str], split: bool, offsets: bool) -> list[_Encoded]:
        options: dict[str, Any] = {"return_offsets_mapping": True} if offsets else {}
        if offsets and not self.tokenizer.is_fast:
            raise ConfigError(
                "answers of several turns need a fast tokenizer; give only the last turn as the completion"
            )
        made = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split,
            return_attention_mask=False,
            padding=False,
            truncation=False,
            verbose=False,
            **options,
        )
        if not offsets:
            return [_Encoded(ids) for ids in made["input_ids"]]
        return [_Encoded(ids, spans) for ids, spans in zip(made["input_ids"], made["offset_mapping"], strict=True)]

    def _careful(self, draft: Draft, text: str) -> _Encoded:
        """Tokenise the pieces between the template's control tokens, so that no message can produce one."""
        with_offsets = any(draft.spans)
        ids: list[int] = []
        offsets: list[Span] = []
        base = at = 0

        def plain(piece: str) -> None:
            nonlocal base
            part = self._tokens([piece], split=True, offsets=with_offsets)[0] if piece else _Encoded([])
            ids.extend(part.ids)
            offsets.extend((base + a, base + b) for a, b in part.offsets or ())
            base += len(piece)

        for match in self.special.pattern.finditer(text):
            plain(draft.restored(text[at : match.start()]))
            ids.append(self.tokenizer.convert_tokens_to_ids(match.group().strip()))
            offsets.append((base, base + len(match.group())))
            base += len(match.group())
            at = match.end()
        plain(draft.restored(text[at:]))
        return _Encoded(ids, offsets if with_offsets else None)


def _drafts(dataset: Dataset, encoder: _Encoder, seconds: float) -> list[Draft]:
    """Return one draft for each row, in order."""
    chat = [row for row in dataset.rows if isinstance(row.prompt, list)]
    rendered = iter(render(chat, dataset.source, encoder.tokenizer, encoder.special, seconds))
    return [next(rendered) if isinstance(row.prompt, list) else _text_draft(row, encoder) for row in dataset.rows]


def _text_draft(row: Row, encoder: _Encoder) -> Draft:
    """Join prompt and completions; a BOS or EOS spelled out at the ends is read as the control token."""
    bos = encoder.tokenizer.bos_token if encoder.first and encoder.bos is not None else ""
    eos = encoder.tokenizer.eos_token
    prompt = str(row.prompt).removeprefix(bos)
    texts = tuple(prompt + str(completion).removesuffix(eos) for completion in row.completions)
    if not prompt:
        texts = tuple(text.removeprefix(bos) for text in texts)
    n = len(texts)
    return Draft(row, prompt, texts, (None,) * n, (False,) * n, control=not encoder.split)


@dataclass
class _Answer:
    """A completion's tokens and which of them are learned; cut: whether its end was removed."""

    ids: list[int]
    trained: list[bool]
    cut: bool = False


def _example(
    draft: Draft, encoded: list[_Encoded], encoder: _Encoder, limits: _Limits, report: Report
) -> Example | None:
    """Split off the common prompt, end and cut the completions; None (and a count) where nothing is left to learn."""
    number = draft.row.row
    prompt, *whole = encoded
    border = min((common(prompt.ids, text.ids) for text in whole), default=len(prompt.ids))
    head = [] if draft.control and isinstance(draft.row.prompt, list) else encoder.first
    context, cut = _context(prompt.ids[:border], head, encoder, limits.prompt)
    answers = [_answer(draft, k, text, border, encoder, limits.completion) for k, text in enumerate(whole)]
    if any(not any(answer.trained) or answer.ids == [encoder.eos] for answer in answers):
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
    if draft.hidden or (encoder.split and not draft.control and any(map(encoder.special.inside, draft.texts))):
        report.note("rows with special tokens in their text, read as plain text", number)
    if draft.lost_turns:
        report.note("rows with earlier turns not learned, because the chat template rewrites them", number)
    completions = tuple(_completion(answer) for answer in answers)
    prompt_ids = torch.tensor(context, dtype=torch.int32)
    if completions:
        return Example(prompt_ids, completions, draft.row.numbers, number)
    return Example(prompt_ids, (), draft.row.numbers, number, draft.row.prompt, draft.row.extra)


def _context(ids: list[int], head: list[int], encoder: _Encoder, limit: int | None) -> tuple[list[int], bool]:
    """Return the prompt's tokens, at least one, and whether they were cut."""
    if not head and ids[:1] == [encoder.bos]:
        head, ids = ids[:1], ids[1:]  # a cut keeps the template's BOS, as it keeps the tokenizer's
    if not head and not ids:
        head = [encoder.eos if encoder.bos is None else encoder.bos]
    if limit is None or len(head) + len(ids) <= limit:
        return head + ids, False
    keep = limit - len(head)
    return (head + ids[-keep:] if keep > 0 else head), True


def _answer(draft: Draft, k: int, text: _Encoded, border: int, encoder: _Encoder, limit: int | None) -> _Answer:
    ids = text.ids[border:]
    trained = [True] * len(ids)
    spans = draft.spans[k]
    if spans is not None:
        at = [tuple(len(draft.restored(draft.texts[k][:end])) for end in span) for span in spans]
        # a token that spans the beginning of a turn belongs to the turn; one that spans its end does not
        trained = [any(a < end <= b for a, b in at) for _, end in (text.offsets or [])[border:]]
    if not draft.ended[k] and ids[-1:] != [encoder.eos]:
        ids, trained = [*ids, encoder.eos], [*trained, True]
    if limit is None or len(ids) <= limit:
        return _Answer(ids, trained)
    return _Answer(ids[:limit], trained[:limit], cut=True)


def _completion(answer: _Answer) -> Completion:
    mask = None if all(answer.trained) else torch.tensor(answer.trained)
    return Completion(torch.tensor(answer.ids, dtype=torch.int32), mask)
