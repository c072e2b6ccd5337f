"""How a run ends before its last step: by an error of rows, rewards, samplers or a method, or by an alarm."""

from __future__ import annotations

import logging

from alignkit.engine.saving import save
from alignkit.engine.state import RunState
from alignkit.errors import AlarmError, AlignkitError, PluginError
from alignkit.runs.folder import resume_command
from alignkit.runs.log import RunLog
from alignkit.runs.progress import StopSignals

logger = logging.getLogger(__name__)


def halted(state: RunState, done: int, error: AlignkitError, moved: bool, stop: StopSignals) -> BaseException:
    """Save the state before a step whose rows, samples, scores or method failed, so that nothing is lost.

    Returns its error. Rows, samples and scores fail on all ranks together, a method may fail on one; after an update
    (moved) there is nothing to save. After a signal the run stops as it was asked to, and the error is a warning.
    """
    together = not isinstance(error, PluginError) or state.parts.ranks.n == 1
    command = resume_command(state.folder)
    if moved or not together:
        newest = f"continue from the newest checkpoint in {state.folder}, if there is one, with: {command}"
        error.args = (f"{error}\nStopped in step {done + 1}; {newest}",)
        return error
    if done:
        save(state, done)
    if stop.received:
        logger.warning("%s\nstopped after step %d; continue with: %s", error, done, command)
        return SystemExit(128 + stop.received)
    error.args = (f"{error}\nStopped after step {done}; continue with: {command}",)
    return error


def alarmed(state: RunState, done: int, log: RunLog) -> AlarmError:
    """Return the error that ends a run for an alarm of `stop_on`; its checkpoint is written."""
    reason = "an alarm of stop_on ended the run; see the error of rank 0"
    if alarm := log.alarm:
        reason = f"alarm {alarm.name} ended the run (stop_on): {alarm.message}. {alarm.remedy}"
    command = resume_command(state.folder)
    return AlarmError(f"{reason}\nStopped after step {done}; to continue anyway: {command}")
