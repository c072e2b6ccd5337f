"""How a function reads completions to prompts of messages: as text, or as messages, as rewards of TRL do.

Both kinds have the same parameters, so the function is called with made-up completions before anything is trained: with
text first. Not called are async functions, built-in ones, models, and those with `probe: false`: they get text, models
messages.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from alignkit.data.rows import Content, shown
from alignkit.errors import RewardError, first_line
from alignkit.rewards.answers import Answers
from alignkit.rewards.functions import Function, called
from alignkit.rewards.limits import Deadline

logger = logging.getLogger(__name__)

Given = Callable[[Answers], Mapping[str, Any]]
MADE_UP = ("The answer is 42.", "I do not know.")
# what reading text as messages raises, or messages as text; others may be a judgement of the made-up text
_SHAPE = (TypeError, KeyError, AttributeError, IndexError)


def made_up(answers: Answers) -> Answers | None:
    """Return MADE_UP as completions to the first prompts of messages, with their rows; None without such a prompt."""
    at = [i for i, prompt in enumerate(answers.prompts) if not isinstance(prompt, str)][: len(MADE_UP)]
    if not at:
        return None
    at = [at[0], at[-1]]
    completions: list[Content] = [[{"role": "assistant", "content": text}] for text in MADE_UP]
    return Answers(
        prompts=[answers.prompts[i] for i in at],
        completions=completions,
        columns={name: [values[i] for i in at] for name, values in answers.columns.items()},
        rows=[answers.rows[i] for i in at],
        lengths=[5, 5],
        ended=[True, True],
        completion_ids=[[0] * 5, [0] * 5],
        raw_completions=list(MADE_UP),
        tool_calls=[[], []],
    )


def probed(function: Function, answers: Answers, given: Mapping[str, Any], seconds: float | None) -> Function:
    """Return the function with what it reads. seconds: its time-out for a call.

    A function that fails on text, as code does that was given another type, reads messages if it does not fail on
    these. Raises RewardError where it fails on both in this way, hangs, or quits; other errors are left to the run.
    """
    as_text = _failure(replace(function, reads="text"), answers, given, seconds)
    if not isinstance(as_text, _SHAPE):
        return replace(function, reads="text")
    what = f"{function.kind} '{function.name}'"
    as_messages = _failure(found := replace(function, reads="messages"), answers, given, seconds)
    if as_messages is None:
        logger.info("%s gets completions as messages: it cannot read text (%s)", what, first_line(as_text))
        return found
    raise RewardError(
        f"{what} failed in a probe, a call before anything is trained with two made-up completions, "
        f"{' and '.join(map(shown, MADE_UP))}, to {answers.place(0)}. With completions as text: {first_line(as_text)}; "
        f"as messages: {first_line(as_messages)}. Mend it, or, if it is right that it cannot read these, switch the "
        "probe off: {use: ..., probe: false}"
    ) from as_text


def _failure(function: Function, answers: Answers, given: Mapping[str, Any], seconds: float | None) -> Exception | None:
    arguments = copy.deepcopy(function.arguments(answers, given))  # it may change what it is given
    deadline = Deadline(seconds)
    try:
        called(function, answers, arguments, deadline)
    except RewardError as error:
        if deadline.passed() or not isinstance(error.__cause__, Exception):  # sys.exit is no Exception
            raise
        return error.__cause__
    return None
