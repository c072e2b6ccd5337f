"""`alignkit serve`."""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from alignkit.cli import console

EXAMPLES = """\b
Examples:
  alignkit serve config.yaml
  alignkit serve config.yaml --processes 2 --port 8100 --vllm ~/vllm/bin/vllm
  alignkit serve config.yaml -- --gpu-memory-utilization 0.7

When the servers answer, the setting `rollout` of the run is printed. Ctrl-C or SIGTERM ends them."""


def serve(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings of a run", metavar="CONFIG")],
    options: Annotated[list[str] | None, typer.Argument(help="Further options of `vllm serve`, after --")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Servers, on ports that follow each other")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on; anybody who reaches it can use it")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the first server")] = 8000,
    vllm: Annotated[
        Path | None, typer.Option(envvar="ALIGNKIT_VLLM", help="The program `vllm` of another environment")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the servers' weights  [default: as the run computes]")] = None,
    logs: Annotated[Path | None, typer.Option(help="Folder for the servers' logs  [default: a temporary one]")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds in which the servers must answer")] = 900,
    more: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting")] = None,
) -> None:
    """Start vLLM servers for a run's rollouts, wait until they answer, and end them with this command."""
    settings = console.settings_of(str(config), {}, more or [], only_file=True)
    console.checked(settings)
    console.show_log()
    from alignkit import registry
    from alignkit.config import split
    from alignkit.rollout import own_servers, serving

    run, _ = split(settings, registry.get(str(settings.get("method"))).Config)
    program = serving.vllm_program(vllm)
    plan = serving.plan(run, program, processes, own_servers.visible_gpus(), dtype, options or [])
    place = logs or Path(tempfile.mkdtemp(prefix="alignkit-serve-"))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    with serving.Servers(plan, host, port, processes, place) as servers:
        typer.echo(f"starting {' '.join(plan.command)} (logs: {place})", err=True)
        servers.wait_until_ready(timeout)
        key = f", key_env: {run.rollout.key_env}" if run.rollout.key_env else ""
        typer.echo(f"rollout: {{backend: vllm, urls: [{', '.join(servers.urls)}]{key}}}")
        while True:
            servers.check()
            time.sleep(1.0)


def _ended(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
