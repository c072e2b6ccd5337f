"""The contract of environments: what answers the assistant's turns of a trajectory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """What an environment answers.

    messages: go on with the conversation, such as {"role": "tool", ...} or {"role": "user", ...}; they are read by the
    policy and never learned. reward: added to the trajectory's. done: whether the trajectory ends here.
    """

    messages: Sequence[Message] = ()
    reward: float = 0.0
    done: bool = False


class Environment(ABC):
    """The surroundings of one trajectory: a run makes one for each completion that it samples.

    schemas: JSON schemas of tools, for the prompts of rows without `tools`.
    """

    schemas: Sequence[Mapping[str, Any]] = ()

    def reset(self, row: Mapping[str, Any]) -> None:  # noqa: B027 - most environments read nothing
        """Begin a trajectory. row: the columns of the prompt's row."""

    @abstractmethod
    def step(self, messages: Sequence[Message]) -> Step | Awaitable[Step]:
        """Answer the assistant, in all trajectories at the same time: async in one event loop, else in threads.

        messages: the conversation, its prompt first. The last one is the assistant's: "content", its text, and
        "tool_calls" where it has some, each {"name": ..., "arguments": {...}}. What this raises ends the run.
        """

    def close(self) -> None:  # noqa: B027 - most environments hold nothing
        """End a trajectory, however it ended."""


def wrong(step: Any) -> str | None:
    """Return what is wrong about an environment's answer, after its name; None where it is a valid Step."""
    if not isinstance(step, Step):
        return f"must return an alignkit.Step, got {type(step).__name__}"
    if isinstance(step.reward, bool | str) or not isinstance(step.reward, Real) or not math.isfinite(step.reward):
        return f"must give a finite number as reward, got {step.reward!r}"
    said = step.messages
    if isinstance(said, str | Mapping) or not isinstance(said, Sequence):
        return f"must give a list of messages, got {type(said).__name__}"
    for message in said:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"must give messages with a role, got {message!r:.200}"
        if message["role"] == "assistant":
            return "must not speak as the assistant: only what the policy samples is learned"
    if not said and not step.done:
        return "gave no message to go on with; set done=True where the trajectory ends"
    return None
