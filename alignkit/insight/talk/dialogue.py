"""The lines that a person types, and what answers them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from alignkit.errors import AlignkitError
from alignkit.insight.talk.speaker import Speaker

COMMANDS = {
    "/undo": "forget the last message and its answers",
    "/reset": "start a new conversation",
    "/quit": "end, as Ctrl-D does",
}
"""What can be typed in the place of a message; any other text is one, "/no_think" too."""


def converse(speakers: Sequence[Speaker], lines: Iterable[str], write: Callable[[str], None], system: str = "") -> None:
    """Answer every line by all speakers, in turns. write: gets the text for the terminal, in pieces.

    system: the first message of each conversation, "" for none. Ctrl-C ends an answer, not the conversation. A message
    that cannot be answered is reported, and the conversation goes on without it.
    """
    for speaker in speakers:
        speaker.messages = _opening(speaker, system)
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            for speaker in speakers:
                speaker.messages = _opening(speaker, system)
            write("a new conversation\n")
        elif text == "/undo":
            write("forgotten\n" if _undo(speakers) else "nothing was said\n")
        elif text:
            _answers(speakers, text, write)


def _opening(speaker: Speaker, system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system and speaker.converses else []


def _undo(speakers: Sequence[Speaker]) -> bool:
    """Forget the last exchange of each; False where there is none."""
    spoken = [s for s in speakers if s.messages and s.messages[-1]["role"] == "assistant"]
    for speaker in spoken:
        speaker.messages = speaker.messages[:-2]
    return bool(spoken)


def _answers(speakers: Sequence[Speaker], text: str, write: Callable[[str], None]) -> None:
    before = [speaker.messages for speaker in speakers]
    for speaker in speakers:
        write(f"{speaker.name}> ")
        try:
            speaker.answer(text, write)
        except KeyboardInterrupt:
            write(" (stopped)")
        except AlignkitError as error:
            write(f"\n{error}\nthe message is left out; /undo or /reset makes room\n")
            for one, messages in zip(speakers, before, strict=True):
                one.messages = messages
            return
        write("\n")
