"""Features of an answer other than its content: how to count, add and remove each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import regex

from alignkit.data.rows import Content

FILLER = "There is more that could be said about this, and it depends on the details."
_SENTENCE_END = regex.compile(r"(?<=[.!?。！？])\s+(?=\S)")
_EMOJI = regex.compile(
    r"(?:\p{Regional_Indicator}{2}|[0-9#*]\uFE0F?\u20E3"  # a flag, a keycap
    r"|(?:\p{Emoji_Presentation}|\p{Extended_Pictographic}(?:\uFE0F|\p{Emoji_Modifier}))"
    r"(?:\uFE0F|\p{Emoji_Modifier}|[\U000E0020-\U000E007F]|\u200D\p{Extended_Pictographic})*)"
)
# powers are not bold text; a language without spaces may have letters at both ends
_BOLD = regex.compile(r"(?<![0-9A-Za-z_])\*\*(?=[^\s*])((?:[^*\n]|\*(?!\*))+?)(?<=\S)\*\*(?![0-9A-Za-z_])")
_WORD = regex.compile(r"\b\p{L}{4,}\b")
_EXCLAMATION = regex.compile(r"[!！](?![=\[])")  # neither != nor an image in Markdown
_ITEM = regex.compile(r"^([ \t]*)(?:(?:[-*+•]|\d{1,3}[.)])[ \t]+)+(?=\S)", regex.MULTILINE)
_LINK = regex.compile(r"(?:https?://|www\.)[^\s<>()\[\]]+", regex.IGNORECASE)
_NAMED_LINK = regex.compile(r"\[([^\[\]\n]+)\]\((?:https?://|www\.)[^\s()]+\)", regex.IGNORECASE)
_OPENING = (
    r"(?:(?:sure(?: thing)?|certainly|of course|absolutely|definitely)\b(?!\s+not\b)|gladly|no problem"
    r"|(?:great|good|excellent) question|you(?:['’]re| are) (?:absolutely |completely |quite )?right)\b"
)
_AFFIRMATIVE = regex.compile(rf"^\s*{_OPENING}", regex.IGNORECASE)
_AFFIRMATIVE_CLAUSE = regex.compile(rf"^(\s*)(?:{_OPENING}\s*[,.!:;–—-]+\s*)+(?=\S)", regex.IGNORECASE)


@dataclass(frozen=True)
class Feature:
    """A countable feature of an answer.

    more, less: names of the answer of a pair that has more, or less. count: how much a text has. added, taken: the text
    with more or with less of it and, as far as possible, nothing else changed; None where that cannot be done.
    """

    name: str
    more: str
    less: str
    count: Callable[[str], float]
    _add: Callable[[str], str]
    _take: Callable[[str], str]

    def added(self, text: str) -> str | None:
        """Return the text with the feature added, if it had none; length can be added to any text."""
        changed = self._add(text)
        return changed if (self is LENGTH or not self.count(text)) and self.count(changed) > self.count(text) else None

    def taken(self, text: str) -> str | None:
        """Return the text with less of the feature, in most cases none."""
        changed = self._take(text)
        return changed if changed.strip() and self.count(changed) < self.count(text) else None


def answer_text(content: Content) -> str:
    """Return the assistant's text of an answer: text unchanged, of messages only the assistant's."""
    if isinstance(content, str):
        return content
    return "\n\n".join(message["content"] for message in content if message["role"] == "assistant")


def _more_words(text: str) -> str:
    return f"{text.rstrip()} {FILLER}"


def _without_last_sentence(text: str) -> str:
    ends = list(_SENTENCE_END.finditer(text.rstrip()))
    return text[: ends[-1].start()] if ends else text


def _exclaimed(text: str) -> str:
    return f"{text.rstrip().removesuffix('.')}!"


def _calm(text: str) -> str:
    return str(regex.sub(r"[!！]+(?![=\[])", ".", regex.sub(r"(?<=[?.])[!！]+(?![=\[])", "", text)))


def _itemised(text: str) -> str:
    sentences = _SENTENCE_END.split(text.strip())
    return "\n".join(f"- {sentence}" for sentence in sentences) if len(sentences) > 1 else text


def _without_links(text: str) -> str:
    bare = regex.sub(rf"\s?{_LINK.pattern}", "", _NAMED_LINK.sub(r"\1", text), flags=regex.IGNORECASE)
    return str(regex.sub(r"\s?\(\s*\)", "", bare))


def _affirmed(text: str) -> str:
    own = text.lstrip()
    return f"{text[: len(text) - len(own)]}Sure. {own}"


def _unaffirmed(text: str) -> str:
    rest = str(_AFFIRMATIVE_CLAUSE.sub(r"\1", text))
    at = len(rest) - len(rest.lstrip())
    return rest[:at] + rest[at : at + 1].upper() + rest[at + 1 :]


def _counter(pattern: regex.Pattern[str]) -> Callable[[str], float]:
    return lambda text: float(sum(1 for _ in pattern.finditer(text)))


LENGTH = Feature(
    "length", "the longer answer", "the shorter answer", lambda text: float(len(text)), _more_words,
    _without_last_sentence,
)  # fmt: skip
FEATURES = (
    LENGTH,
    Feature(
        "emoji", "the answer with more emoji", "the answer with fewer emoji", _counter(_EMOJI),
        lambda text: f"{text.rstrip()} 😊", lambda text: str(regex.sub(rf" ?{_EMOJI.pattern}", "", text)),
    ),
    Feature(
        "bold", "the answer with more bold text", "the answer with less bold text", _counter(_BOLD),
        lambda text: str(_WORD.sub(r"**\g<0>**", text, count=1)), lambda text: str(_BOLD.sub(r"\1", text)),
    ),
    Feature(
        "exclamation marks", "the answer with more exclamation marks", "the answer with fewer exclamation marks",
        _counter(_EXCLAMATION), _exclaimed, _calm,
    ),
    Feature(
        "list items", "the answer with more list items", "the answer with fewer list items", _counter(_ITEM),
        _itemised, lambda text: str(_ITEM.sub(r"\1", text)),
    ),
    Feature(
        "links", "the answer with more links", "the answer with fewer links", _counter(_LINK),
        lambda text: f"{text.rstrip()} (https://en.wikipedia.org)", _without_links,
    ),
    Feature(
        "affirmative opening", "the answer with an affirmative opening", "the answer without an affirmative opening",
        lambda text: float(_AFFIRMATIVE.match(text) is not None), _affirmed, _unaffirmed,
    ),
)  # fmt: skip
