"""Conversations -> text by a tokenizer's chat template, and which of its characters are learned.

settings.py   what a user can set about conversations
special.py    control tokens: finding them in text, hiding those that a message spells out
template.py   a tokenizer's template: rendering, what it accepts, a pinned date
parts.py      the parts of a message (content, reasoning, tool calls), found in rendered text
conversation.py   a conversation, and its renderings up to each turn
turns.py      where each of the assistant's turns is: rendered at once, or turn by turn
drafts.py     a row -> its draft
rendering.py  rows -> drafts, in a process with limits
helper.py     that process; timeout.py a time limit without one
"""

from alignkit.data.chat.conversation import common
from alignkit.data.chat.drafts import Draft
from alignkit.data.chat.rendering import render, turn_end
from alignkit.data.chat.settings import Chat
from alignkit.data.chat.special import SpecialTokens
from alignkit.data.chat.template import pinned
from alignkit.data.chat.turns import Span

__all__ = ["Chat", "Draft", "Span", "SpecialTokens", "common", "pinned", "render", "turn_end"]
