"""A tokenizer as the rows use it: one call for many texts, control tokens kept apart from text that spells them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from alignkit.data.chat import Draft, Span, SpecialTokens
from alignkit.errors import ConfigError


class Encoded(NamedTuple):
    """Tokens, and the characters that each one covers where offsets were requested."""

    ids: list[int]
    offsets: list[Span] | None = None


class Encoder:
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
        self._direct = is_direct(tokenizer)
        # the tokens that the tokenizer puts first; those it puts last are not used: only completions end with EOS
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        self.first: list[int] = list(full[:at])

    def encode(self, drafts: Sequence[Draft]) -> list[list[Encoded]]:
        """Return the tokens of each draft's prompt and texts, without added ones; one call per kind of draft."""
        found: dict[int, list[Encoded]] = {}
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

    def _tokens(self, texts: list[str], split: bool, offsets: bool) -> list[Encoded]:
        if not offsets and self._direct and len(texts) > 1:
            # transformers tokenises the first text: this sets the backend up for the others
            first, rest = self._call(texts[:1], split, {})["input_ids"], texts[1:]
            made = self.tokenizer.backend_tokenizer.encode_batch_fast(rest, add_special_tokens=False)
            return [Encoded(list(first[0])), *(Encoded(one.ids) for one in made)]
        options: dict[str, Any] = {"return_offsets_mapping": True} if offsets else {}
        if offsets and not self.tokenizer.is_fast:
            raise ConfigError(
                "answers of several turns need a fast tokenizer; give only the last turn as the completion"
            )
        made = self._call(texts, split, options)
        if not offsets:
            return [Encoded(ids) for ids in made["input_ids"]]
        return [Encoded(ids, spans) for ids, spans in zip(made["input_ids"], made["offset_mapping"], strict=True)]

    def _call(self, texts: list[str], split: bool, options: Mapping[str, Any]) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split,
            return_attention_mask=False,
            padding=False,
            truncation=False,
            verbose=False,
            **options,
        )

    def _careful(self, draft: Draft, text: str) -> Encoded:
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
                part = self._tokens([piece], split=True, offsets=with_offsets)[0] if piece else Encoded([])
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
        return Encoded(ids, offsets if with_offsets else None)

    def _following(self, piece: str, offsets: bool) -> Encoded:
        """Tokenise text that follows a control token: some tokenizers put a space before the first word of a text."""
        if self._later is None:
            self._later = _without_prefix(self.tokenizer) if self.tokenizer.is_fast else False
        if not self._later:
            return self._tokens([piece], split=True, offsets=offsets)[0]
        made = self._later.encode(piece, add_special_tokens=False)
        return Encoded(made.ids, made.offsets if offsets else None)


def is_direct(tokenizer: Any) -> bool:
    """Return whether a tokenizer adds nothing of its own to what its backend does with a text.

    Then the backend is called: transformers' copies of each encoding cost about as much as encoding.
    """
    cls, plain = type(tokenizer), PreTrainedTokenizerFast
    own = (cls.__call__, getattr(cls, "_encode_plus", None))
    return bool(tokenizer.is_fast) and own == (plain.__call__, getattr(plain, "_encode_plus", None))


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
