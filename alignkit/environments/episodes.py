"""A sampler of trajectories: it asks another sampler for each turn, and an environment for what comes between them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from alignkit.data.stream import seed_of
from alignkit.environment_settings import EnvironmentSettings
from alignkit.environments.calling import called
from alignkit.environments.contract import Environment, Message, Step, wrong
from alignkit.environments.tools import Tools
from alignkit.environments.turns import Turns
from alignkit.errors import AlignkitError, RolloutError, at_place, first_line
from alignkit.models.ranks import Ranks
from alignkit.rewards.event_loop import EventLoop
from alignkit.rewards.limits import LateError
from alignkit.rollout.sampler import Request, Sampled, Sampler
from alignkit.rollout.tool_calls import tool_calls
from alignkit.types import Example

logger = logging.getLogger(__name__)
OVER, LIVE, FAILED = range(3)  # of a rank's trajectories; the largest of all ranks counts


@dataclass
class Trajectory:
    """One completion of several turns, as far as it goes.

    number: identifies its randomness after the first turn. tokens, trained, logps: of all turns; what an environment
    says is read only. over: nothing is added any more. ended: by the environment, not by a limit.
    """

    example: Example
    number: int
    environment: Environment
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    logps: list[float] | None = None
    reward: float = 0.0
    turns: int = 0
    over: bool = False
    ended: bool = False

    def says(self, turn: Sampled) -> None:
        """Add a sampled turn."""
        if turn.logps is not None:
            self.logps = [*(self.logps or []), *turn.logps]
        self.tokens += turn.tokens
        self.trained += [True] * len(turn.tokens)
        self.turns += 1

    def reads(self, tokens: Sequence[int]) -> None:
        """Add what the environment says."""
        self.tokens += tokens
        self.trained += [False] * len(tokens)

    def sampled(self) -> Sampled:
        """Return it as a completion."""
        return Sampled(self.tokens, self.ended, self.logps, self.trained, self.reward, self.messages, self.turns)


class Episodes(Sampler):
    """Samples trajectories by a sampler of turns.

    make: returns a new environment. shared: the ranks, where they sample in step because they share a sharded policy.
    """

    def __init__(
        self,
        turns: Sampler,
        make: Callable[[], Environment],
        settings: EnvironmentSettings,
        text: Turns,
        shared: Ranks | None = None,
    ) -> None:
        self.turns, self.make, self.settings, self.text, self.shared = turns, make, settings, text, shared
        self.processed = turns.processed
        self._loop: EventLoop | None = None  # kept from turn to turn: what is async belongs to the loop that began it

    @property
    def version(self) -> int | None:  # type: ignore[override]
        """That of the sampler of turns."""
        return self.turns.version

    @version.setter
    def version(self, value: int | None) -> None:
        """Set that of the sampler of turns."""
        self.turns.version = value

    def update(self, version: int, model: nn.Module) -> None:
        """Put the weights in force, in the sampler of turns."""
        self.turns.update(version, model)
        self.processed = self.turns.processed

    def close(self) -> None:
        """Close the sampler of turns, and end what async environments still do."""
        self.turns.close()
        if self._loop is not None:
            self._loop.close()

    def sample(self, request: Request) -> list[list[Sampled]]:
        """Return the trajectories of each prompt, [prompt][trajectory]. Raises RolloutError, the environment's too."""
        played: list[Trajectory] = []
        try:
            self._play(request, played)
        finally:
            self._end(played)
        flat = [t.sampled() for t in played]
        return [flat[i : i + request.n] for i in range(0, len(flat), request.n)]

    def _begin(self, request: Request, played: list[Trajectory]) -> None:
        """Add the trajectories of the request's prompts, each with an environment that begins."""
        numbers = request.numbers or range(len(request.prompts))
        for example, number in zip(request.examples, numbers, strict=True):
            if isinstance(example.asked, str):
                raise RolloutError(f"environment: the prompt of row {example.row} is text; give it as messages")
            for k in range(request.n):
                try:
                    made = self.make()
                except AlignkitError as error:
                    raise RolloutError(str(error)) from error
                played.append(Trajectory(example, number * request.n + k, made, list(example.asked)))
        self._answers([(t, t.environment.reset, t.example.columns) for t in played])

    def _end(self, played: Sequence[Trajectory]) -> None:
        """Close all environments; one that fails is a warning, so that it hides no error and no trajectory."""

        async def one(t: Trajectory) -> None:
            try:
                await asyncio.wait_for(called(t.environment.close), self.settings.timeout)
            except Exception as error:  # an environment is the user's code
                logger.warning("environment: row %d: close failed: %s", t.example.row, first_line(error))

        if any(type(t.environment).close is not Environment.close for t in played):
            try:
                self._run([one(t) for t in played])
            except RolloutError as error:
                logger.warning("%s", error)

    def _run(self, calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run calls, all at the same time. Raises RolloutError where they block each other."""

        async def every() -> list[Any]:
            return await asyncio.gather(*calls)

        deadline = time.monotonic() + 2 * self.settings.timeout + 5
        self._loop = self._loop or EventLoop()
        try:
            return self._loop.run(every(), lambda: "blocked" if time.monotonic() > deadline else "")
        except LateError:
            self._loop = None
            raise RolloutError(
                "environment: an async function blocks the others; await in it, or define it without async"
            ) from None

    def _play(self, request: Request, played: list[Trajectory]) -> None:
        """Play all to their ends. Ranks that share a policy play as many turns, and stop where one fails."""
        problem: RolloutError | None = None
        for turn in range(-1, self.settings.max_turns):
            try:
                if turn < 0:
                    self._begin(request, played)
                else:
                    self._turn(request, played, turn)
            except RolloutError as error:
                problem = error  # the others are told before it is raised
            state = FAILED if problem else LIVE if any(not t.over for t in played) else OVER
            if (self.shared.most(state) if self.shared else state) != LIVE:
                break
        if problem is not None:
            raise problem

    def _turn(self, request: Request, played: Sequence[Trajectory], turn: int) -> None:
        """Sample a turn of all trajectories that go on, and let their environments answer."""
        live = [t for t in played if not t.over]
        if turn == 0:
            found = [s for some in self.turns.sample(request) for s in some]
        else:
            later = replace(
                request, prompts=[[*t.example.prompt.tolist(), *t.tokens] for t in live], n=1,
                seed=seed_of(request.seed, 13, turn), numbers=[t.number for t in live], examples=(),
            )  # fmt: skip
            found = [some[0] for some in self.turns.sample(later)]
        answering = []
        for t, sampled in zip(live, found, strict=True):
            t.says(sampled)
            t.messages = [*t.messages, self._message(sampled)]
            t.over = not sampled.ended  # a turn that was cut in the middle cannot be answered
            if not t.over:
                answering.append(t)
        steps = self._answers([(t, t.environment.step, t.messages) for t in answering])
        for t, step in zip(answering, steps, strict=True):
            if problem := wrong(step):
                raise RolloutError(f"environment: row {t.example.row}: {type(t.environment).__name__}.step {problem}")
            self._take(t, step, request.sampling.max_new_tokens)

    def _message(self, turn: Sampled) -> Message:
        raw = self.text.tokenizer.decode(turn.tokens, skip_special_tokens=False)
        said = {"role": "assistant", "content": self.text.tokenizer.decode(turn.tokens, skip_special_tokens=True)}
        calls = tool_calls(raw)
        return {**said, "tool_calls": calls} if calls else said

    def _take(self, t: Trajectory, step: Step, longest_turn: int) -> None:
        """Add an answer; a trajectory ends by it, or where no whole turn fits any more, before what nothing follows."""
        t.reward += step.reward
        t.ended = step.done
        t.messages = [*t.messages, *step.messages]
        tokens = [] if step.done else self.text.tokens(t.tokens[-1], step.messages)
        fits = len(t.tokens) + len(tokens) + longest_turn <= self.settings.max_tokens
        t.over = step.done or t.turns == self.settings.max_turns or not fits
        if not t.over:
            t.reads(tokens)

    def _answers(self, asked: Sequence[tuple[Trajectory, Callable[[Any], Any], Any]]) -> list[Any]:
        """Call environments, all at the same time, each within the time-out. Raises RolloutError naming the row."""

        async def one(t: Trajectory, call: Callable[[Any], Any], value: Any) -> Any:
            seconds = None if isinstance(t.environment, Tools) else self.settings.timeout  # tools limit each call
            try:
                return await asyncio.wait_for(called(partial(call, value)), seconds)
            except TimeoutError:
                problem = f"gave no answer within {self.settings.timeout:g} s (environment.timeout)"
            except Exception as error:  # an environment is the user's code
                problem = f"failed: {type(error).__name__}: {error}{at_place(error)}"
            raise RolloutError(f"environment: row {t.example.row}: {type(t.environment).__name__} {problem}") from None

        return self._run([one(*each) for each in asked])
