"""`alignkit convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.insight import terminal

EXAMPLES = """\b
Examples:
  alignkit convert train.py
  alignkit convert trl.yaml --method dpo --processes 8 -o config.yaml"""


def convert(
    file: Annotated[Path, typer.Argument(help="A YAML file of TRL's command line, or a script (never run)")],
    method: Annotated[str | None, typer.Option(help="Our method, where the file does not tell")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the run, a factor of batch_size")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write  [default: the terminal]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file")] = False,
) -> None:
    """Convert a configuration or a script of TRL, and list what cannot be carried over."""
    from alignkit.errors import ConfigError
    from alignkit.files import write_text
    from alignkit.insight import convert as package

    terminal.check_target("--output", output)
    if output is not None and output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output '{output}': a file of settings must end in .yaml or .yml")
    if output is not None and output.exists() and not force:
        raise ConfigError(f"'{output}' exists; give another --output, or --force to overwrite it")
    found = package.convert(file, method, processes)
    if output is None:
        typer.echo(found.text(file.name), nl=False)
        return
    write_text(output, found.text(file.name))
    typer.echo(f"{output}: {found.settings['method']}, {len(found.settings)} settings")
    for name, why in found.left:
        typer.echo(f"not carried over as it is: {name}: {why}")
