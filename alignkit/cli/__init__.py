"""The command line: one module for each command, and the code that they share."""

from alignkit.cli.app import app, main

__all__ = ["app", "main"]
