"""`alignkit chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from alignkit.cli import console

EXAMPLES = """\b
Examples:
  alignkit chat runs/dpo-001 --against base
  alignkit chat my-org/my-model --set sampling.temperature=0.7
  alignkit chat runs/dpo-001 --against runs/dpo-002 < questions.txt"""


def chat(
    model: Annotated[str, typer.Argument(help="A run's folder, or folder or hub name of a model or an adapter")],
    against: Annotated[str | None, typer.Option(help="A second one, or base: the run's model before it")] = None,
    system: Annotated[str, typer.Option(help="The system message")] = "",
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="sampling.temperature, seed, ...: as in a run"),
    ] = None,
) -> None:
    """Talk to a model, and to another one beside it; each sees its own answers. Lines of standard input are messages.

    /undo forgets the last message and its answers, /reset starts a new conversation, /quit or Ctrl-D ends it, and
    Ctrl-C ends an answer.
    """
    settings = console.pairs_of(more or [])
    console.show_log()
    from alignkit.insight import talk, terminal

    both = talk.speakers(model, against, settings)
    silent = [one.name for one in both if not one.converses]
    if silent:
        typer.echo(f"without a chat template each message is continued as text: {', '.join(silent)}", err=True)
    if sys.stdin.isatty():
        typer.echo("; ".join(f"{name}: {what}" for name, what in talk.COMMANDS.items()), err=True)
    talk.converse(both, terminal.typed("you> "), terminal.write, system)
