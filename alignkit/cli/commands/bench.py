"""`alignkit bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Benchmarks on this machine.", no_args_is_help=True)
Text = str | None


@app.command("kernels")
def kernels(
    shapes: Annotated[Text, typer.Option(help="N x H x V, comma-separated, such as 2048x512x32000")] = None,
    dtype: Annotated[Text, typer.Option(help="float32, bfloat16 or float16  [default: by device]")] = None,
    only: Annotated[Text, typer.Option(help="Cases, comma-separated: path1 to path4, selective_logps, ...")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes, to check that everything runs")] = False,
    threads: Annotated[Text, typer.Option(help="Threads of the CPU  [default: all]")] = None,
    json: Annotated[Path | None, typer.Option(help="File for rows and versions")] = None,
    png: Annotated[Path | None, typer.Option(help="File for the picture; needs matplotlib")] = None,
) -> None:
    """Compare the log-probability kernels with eager PyTorch and the installed rivals: error, time, memory.

    A contender whose error against float64 is too large is not timed. More options:
    `python -m alignkit_kernels.bench --help`.
    """
    given = {k: v for k, v in locals().items() if v is not None and v is not False}
    from alignkit_kernels.bench import main as bench

    options = [part for k, v in given.items() for part in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    raise typer.Exit(bench(options))
