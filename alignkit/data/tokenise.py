"""Rows -> examples: one place where text becomes tokens.

Prompt and completion are tokenised together, because a token may span their boundary. The tree's prompt is the longest
common prefix of the tokens of the prompt alone and of every prompt + completion. So each prompt + completion has
exactly the tokens of the whole text, and the tokens after the common prefix belong to the completions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from alignkit.data import Dataset
from alignkit.data.chat import Chat, Draft, Span, SpecialTokens, common, render
from alignkit.data.rows import Report, Row
from alignkit.errors import ConfigError
from alignkit.types import Completion, Example

__all__ = ["tokenise"]

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
    for name, limit in (("max_prompt_tokens", max_prompt_tokens), ("max_completion_tokens", max_completion_tokens)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} is {limit}; give 1 or more, or null for no limit")
    encoder = _Encoder(tokenizer, not chat.special_tokens)
    report = Report(total=dataset.report.total)
    limits = _Limits(max_prompt_tokens, max_completion_tokens)
    drafts = _drafts(dataset, encoder, chat)
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
        self._later: Any = None
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
            if piece and base:
                part = self._following(piece, with_offsets)
            else:
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

    def _following(self, piece: str, offsets: bool) -> _Encoded:
        """Tokenise text that follows a control token: some tokenizers put a space before the first word of a text."""
        if self._later is None:
            self._later = _without_prefix(self.tokenizer) if self.tokenizer.is_fast else False
        if not self._later:
            return self._tokens([piece], split=True, offsets=offsets)[0]
        made = self._later.encode(piece, add_special_tokens=False)
        return _Encoded(made.ids, made.offsets if offsets else None)


def _without_prefix(tokenizer: Any) -> Any:
    """Return a copy that puts no space before a text's first word; False where the tokenizer puts none itself.

    tokenizers' Metaspace with `prepend_scheme: first` puts one there, but not behind a control token.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    metaspaces = [part for part in _nested(state["pre_tokenizer"]) if part.get("prepend_scheme") == "first"]
    if not metaspaces:
        return False
    for part in metaspaces:
        part["prepend_scheme"] = "never"
    later = Tokenizer.from_str(json.dumps(state))
    later.no_padding()
    later.no_truncation()
    later.encode_special_tokens = True
    return later


def _nested(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [part, *(one for inner in part.get("pretokenizers", []) for one in _nested(inner))] if part else []


def _drafts(dataset: Dataset, encoder: _Encoder, chat: Chat) -> list[Draft]:
    """Return one draft for each row, in order."""
    conversations = [row for row in dataset.rows if isinstance(row.prompt, list)]
    rendered = iter(render(conversations, dataset.source, encoder.tokenizer, encoder.special, chat))
    return [next(rendered) if isinstance(row.prompt, list) else _text_draft(row, encoder) for row in dataset.rows]


def _text_draft(row: Row, encoder: _Encoder) -> Draft:
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
    notes = ("rows of text with 'tools', which only a chat template reads",) if "tools" in row.template else ()
    return Draft(row, prompt, texts, (None,) * len(texts), ended, control=not encoder.split, notes=notes)


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
    spelled = not draft.control and any(map(encoder.special.inside, (draft.prompt, *draft.texts)))
    if draft.hidden or spelled:
        report.note(SPELLED, number)
    for note in draft.notes:
        report.note(note, number)
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
