"""What an environment says, as the tokens that follow a sampled turn.

What was sampled stays as it was sampled: a conversation is never rendered and tokenised again. Only what comes after a
turn is rendered, behind a stand-in for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.chat import Chat, SpecialTokens
from alignkit.data.chat.template import Template
from alignkit.environments.contract import Message
from alignkit.errors import ConfigError, RolloutError, first_line

STAND_IN = "zq1turn1qz"
ASKED = {"role": "user", "content": "a"}


class Turns:
    """Renders messages behind a sampled turn by a tokenizer's chat template. chat: how conversations are read."""

    def __init__(self, tokenizer: Any, chat: Chat) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("environment: the tokenizer has no chat template; use an instruct model's")
        self.tokenizer, self.special = tokenizer, SpecialTokens(tokenizer)
        self.template = Template(tokenizer, chat.date)
        self.arguments: Mapping[str, Any] = {**chat.arguments, **({"tools": list(chat.tools)} if chat.tools else {})}

    def tokens(self, last: int, messages: Sequence[Message]) -> list[int]:
        """Return the tokens from a sampled turn to the next: its end, if it has none, the messages, an opening.

        last: the turn's last token, which may be the one that ends it. Raises RolloutError where the template refuses
        the messages.
        """
        [hidden], names = self.special.hidden(list(messages))
        ended = str(self.tokenizer.convert_ids_to_tokens(last))
        ended = ended if ended in self.special.names else ""
        problem = "it leaves out a part of the conversation"
        for turn in _stand_ins(messages):
            try:
                text = self.template.render([ASKED, turn, *hidden], self.arguments, answer_next=True)
            except Exception as error:  # templates raise anything
                problem = first_line(error)
                continue
            rest = text[text.rindex(STAND_IN) + len(STAND_IN) :] if STAND_IN in text else None
            found = None if rest is None else _after(rest, ended, "tool_calls" in turn)
            if found is not None and all(first_word(m) in found for m in hidden):
                return self._encoded(found, names)
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise RolloutError(
            f"environment: the chat template of {self.template.name} cannot render what the environment says after a "
            f"turn (roles: {roles}): {problem}"
        )

    def _encoded(self, text: str, names: Mapping[str, str]) -> list[int]:
        """Tokenise; special tokens that a message spells out, hidden behind characters, are plain text."""
        pieces = re.split(f"([{''.join(map(re.escape, names))}])", text) if names else [text]
        found: list[int] = []
        for piece in pieces:
            spelled = piece in names
            given = {"add_special_tokens": False, "split_special_tokens": spelled}
            found += self.tokenizer(names[piece] if spelled else piece, **given)["input_ids"] if piece else []
        return found


def _stand_ins(messages: Sequence[Message]) -> list[Message]:
    """Return stand-ins for a sampled turn: one that calls the tools that answer, which some templates ask for."""
    plain = {"role": "assistant", "content": STAND_IN}
    calls = [
        {
            "type": "function",
            "id": m.get("tool_call_id", "call00001"),
            "function": {"name": m.get("name", "tool"), "arguments": {"key": STAND_IN}},
        }
        for m in messages
        if m.get("role") == "tool"
    ]
    # without a text: some templates write it behind the tools' answers
    return [{"role": "assistant", "content": "", "tool_calls": calls}, plain] if calls else [plain]


def _after(rest: str, ended: str, calls: bool) -> str | None:
    """Return what follows the turn's last token; None where that cannot be told. rest: from inside of the turn on."""
    if calls:  # the rest begins with the end of a call
        return rest[rest.index(ended) + len(ended) :] if ended and ended in rest else None
    return rest.lstrip()[len(ended) :] if ended and rest.lstrip().startswith(ended) else rest


def first_word(message: Message) -> str:
    """Return the first word of a message's text, which no template writes otherwise; "" without one."""
    found = re.search(r"\w+", str(message.get("content") or ""))
    return found[0] if found else ""
