"""`alignkit plan`."""

from __future__ import annotations

import json as js
import re
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.insight import terminal

EXAMPLES = """\b
Examples:
  alignkit plan config.yaml
  alignkit plan config.yaml --memory 24GB --set lora=16
  alignkit plan config.yaml --gpu --processes 8 --set fsdp=true --json plan.json
  alignkit plan config.yaml --gpu --memory 80GB --processes 64 --servers 2 --server-gpus 8"""
_UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20, "tb": 10**12, "tib": 2**40}


def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings", metavar="CONFIG")],
    memory: Annotated[str | None, typer.Option(help="Memory to fit into, such as 24GB or 80GiB")] = None,
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--cpu", help="Plan for a GPU or a CPU  [default: this machine]")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of torchrun, each with its own GPU")] = 1,
    servers: Annotated[int, typer.Option(min=0, help="vLLM servers that sample, on GPUs of their own")] = 0,
    server_gpus: Annotated[int, typer.Option(min=1, help="GPUs of each server")] = 1,
    hits: Annotated[bool, typer.Option("--hits", help="Load the weights, to count the values in the cache")] = False,
    columns: console.Columns = None,
    more: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file")] = None,
) -> None:
    """Plan a run: what it does and the memory that it needs, from configurations and rows, without loading a model."""
    terminal.check_target("--json", json)
    limit = bytes_of(memory)
    settings = console.settings_of(str(config), console.named(columns), more or [], only_file=True)
    console.checked(settings)
    console.show_log()
    from alignkit.insight import plan as planning

    found = planning.plan(
        settings, limit=limit, gpu=gpu, processes=processes, hits=hits, servers=servers, server_gpus=server_gpus
    )
    planning.print_plan(found)
    if json:
        from alignkit.files import write_text

        write_text(json, js.dumps(found.describe(), indent=1) + "\n")


def bytes_of(text: str | None) -> int | None:
    """Read a size such as 24GB (10^9) or 24GiB (2^30). Raises ConfigError."""
    from alignkit.errors import ConfigError

    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise ConfigError(f"'{text}' is not a size of memory; give a size such as 24GB or 80GiB")
    size = int(float(found[1]) * _UNITS[found[2].lower()])
    if not size:
        raise ConfigError(f"'{text}' is less than one byte; give a size such as 24GB or 80GiB")
    return size
