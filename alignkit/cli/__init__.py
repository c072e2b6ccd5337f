"""The command line: one module a command, and what they share."""

from alignkit.cli.app import app, main

__all__ = ["app", "main"]
