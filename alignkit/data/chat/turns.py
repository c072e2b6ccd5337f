"""Where the assistant's turns of an answer are, in a rendering that shows each of them as it is generated.

At once: the whole conversation is rendered. A turn counts as located if the conversation shows it exactly as it is
rendered where it is the last one (or where the template itself marks it with {% generation %}).

Turn by turn: templates of reasoning models render earlier turns otherwise than the last one (they leave out the
reasoning, or a think block). Then each turn is rendered as the last one, and what stands between two turns is what the
model is given before the second one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from alignkit.data.cells import REASONING
from alignkit.data.chat.conversation import Conversation, Turn, behind, common, last_turn
from alignkit.data.chat.parts import find, shows
from alignkit.data.chat.special import SpecialTokens

Span = tuple[int, int]
AT_ONCE, BY_TURNS = "at once", "turn by turn"


@dataclass(frozen=True)
class Answer:
    """An answer as text.

    begin: where it starts in `text`. spans: the learned characters, one span for each learned turn. closed: whether
    the text ends with a token that closes the turn. way: AT_ONCE or BY_TURNS. missing: fields that the template left
    out of learned turns, with their texts. unlearned: turns that could not be located. unread: fields of the other
    messages that are not in the text.
    """

    text: str
    begin: int
    spans: tuple[Span, ...]
    closed: bool
    way: str
    missing: tuple[tuple[str, str], ...] = ()
    unlearned: int = 0
    unread: tuple[tuple[str, str], ...] = ()


def read_answer(conversation: Conversation, train_on: str) -> Answer:
    """Locate the turns to learn. Raises RewrittenError where the prompt changes once an answer follows."""
    numbers = conversation.turns if train_on == "all" else conversation.turns[-1:]
    every = [last_turn(conversation, n) for n in numbers]
    missing = tuple(part for turn in every for part in turn.found.missing)
    turns = [turn for turn in every if turn.found.end > turn.found.begin]  # of the others nothing is left to learn
    found = _at_once(conversation, turns) or _by_turns(conversation, turns) or _what_there_is(conversation, turns)
    text, spans, way = found
    others = [i for i in range(conversation.n_prompt, len(conversation.messages)) if i not in set(numbers)]
    masked = conversation.special.masked(text)
    unread = tuple(part for i in others for part in shows(masked, conversation.message(i)))
    begin = common(conversation.start(conversation.n_prompt), text)
    closed = conversation.special.closed(text)
    return Answer(text, begin, spans, closed, way, missing, len(turns) - len(spans), unread)


def written_by_hand(conversation: Conversation, unused: Iterator[str]) -> Conversation:
    """Return the conversation with plain text in place of the content and the reasoning that the template leaves out.

    unused: private-use characters that occur in no message. Reasoning is written between think tags.
    """
    messages, by_hand = list(conversation.messages), {}
    for n in conversation.turns:
        turn = last_turn(conversation, n)
        if not any(name != "tool_calls" for name, _ in turn.found.missing):  # how it writes calls is unknown
            continue
        message = messages[n]
        reasoning = next((str(message[name]) for name in REASONING if message.get(name)), "")
        content = str(message.get("content") or "")
        text = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}" if reasoning else content
        opening = conversation.text(n, answer_next=True)
        if opening.rstrip().endswith("</think>") and text.startswith("<think>"):
            continue  # the model is told not to reason
        text = behind(opening, text)
        kept = {k: v for k, v in message.items() if k not in REASONING}
        messages[n] = {**kept, "content": next(unused)}
        by_hand[messages[n]["content"]] = text
    return replace(conversation, messages=messages, by_hand=by_hand, _texts={})


def _at_once(conversation: Conversation, turns: Sequence[Turn]) -> tuple[str, tuple[Span, ...], str] | None:
    """Return the whole conversation with all turns located; None where it shows one of them otherwise."""
    whole = conversation.text(len(conversation.messages))
    if not turns or turns[0].rewritten:
        return None
    spans = [_span_within(conversation.special, whole, turn) for turn in turns]
    if None in spans:
        spans = _marked_spans(conversation, whole, turns)
    if not all(spans):
        return None
    return whole[: spans[-1][1]], tuple(span for span in spans if span), AT_ONCE  # type: ignore[index]


def _what_there_is(conversation: Conversation, turns: Sequence[Turn]) -> tuple[str, tuple[Span, ...], str]:
    """Return the whole conversation with the turns that can be located.

    Not learning a turn that is rendered otherwise once others follow is safer than learning a user's text.
    """
    whole = conversation.text(len(conversation.messages))
    spans = tuple(span for turn in turns if (span := _span_within(conversation.special, whole, turn)))
    return whole[: spans[-1][1]] if spans else whole, spans, AT_ONCE


def _span_within(special: SpecialTokens, whole: str, turn: Turn) -> Span | None:
    if whole[: turn.core] != turn.text[: turn.core]:
        return None
    closing = special.closing(turn.text[turn.core :], whole[turn.core :])
    return turn.begin, len(whole) if closing == 0 and whole == turn.text else turn.core + closing


def _marked_spans(conversation: Conversation, whole: str, turns: Sequence[Turn]) -> list[Span | None]:
    """Return the turns where the template marks them and shows all of their parts."""
    if not conversation.template.has_marks or conversation.by_hand:
        return [None] * len(turns)
    text, marks = conversation.template.marked(conversation.messages, conversation.arguments)
    marks = marks[-len(conversation.turns) :]
    places = dict(zip(conversation.turns, marks, strict=False)) if len(marks) == len(conversation.turns) else {}
    spans: list[Span | None] = []
    for turn in turns:
        begin, end = places.get(turn.number, (0, 0))
        found = find(text, begin, conversation.messages[turn.number])
        shown = text == whole and not found.missing and found.end <= end
        spans.append((begin, begin + len(text[begin:end].rstrip())) if shown else None)
    return spans


def _by_turns(conversation: Conversation, turns: Sequence[Turn]) -> tuple[str, tuple[Span, ...], str] | None:
    """Return the conversation joined from its turns, each rendered as the last one; None where they do not join."""
    if not turns:
        return None
    special, spans = conversation.special, list[Span]()
    text = conversation.start(turns[0].number)[: turns[0].opened]
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        begin, own = len(text), turn.text[turn.core :]
        text += turn.text[turn.begin : turn.core]
        if following is None:
            rest = own[: special.closing(own, own)] or own
        else:
            start = conversation.start(following.number)
            at = _end_within(special, start, turn)
            if at is None:
                return None
            rest = start[at : following.opened]
        spans.append((begin, len(text) + (special.closing(own, rest) or (len(rest) if following is None else 0))))
        text += rest
    return text, tuple(spans), BY_TURNS


def _end_within(special: SpecialTokens, start: str, turn: Turn) -> int | None:
    """Return where a turn's core ends in a text that shows it otherwise; None where it is not shown."""
    same = common(start, turn.text)
    if same >= turn.core:
        return turn.core
    last = turn.text[turn.found.begin : turn.core]  # its last part, with what the template puts behind it
    closes = special.closing(turn.text[turn.core :], turn.text[turn.core :]) > 0
    at = start.find(last, min(same, turn.begin)) if last.strip() else -1
    while at >= 0:
        end = at + len(last)
        if not closes or special.closing(turn.text[turn.core :], start[end:]) > 0:
            return end
        at = start.find(last, at + 1)
    return None
