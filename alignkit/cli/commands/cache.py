"""`alignkit cache`: the persistent cache of reference log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignkit.insight import terminal

if TYPE_CHECKING:
    from alignkit.reference.cache import LogpCache

app = typer.Typer(help="The persistent cache of reference log-probabilities.", no_args_is_help=True)
Text = str | None
CacheFile = Annotated[
    Path | None, typer.Option(help="The cache's file; default: $ALIGNKIT_CACHE, or ~/.cache/alignkit")
]


@app.command("info")
def info(file: CacheFile = None) -> None:
    """Show the cache's path, its size, and its references."""
    with _cache(file) as cache:
        about = cache.info()
        typer.echo(f"path: {about['path']}")
        typer.echo(f"values: {about['entries']}")
        typer.echo(f"size: {terminal.size(about['bytes'])}")
        for r in about["references"]:
            label = f" {r['label']}," if r["label"] else ""
            used = f"first used {r['first_used'][:10]}, last used {r['last_used'][:10]}"
            typer.echo(
                f"reference {r['fingerprint'][:12]}:{label} {r['entries']} values, {terminal.size(r['bytes'])}, {used}"
            )


@app.command("verify")
def verify(file: CacheFile = None) -> None:
    """Check every value's checksum; damaged values are removed, and computed again when needed."""
    with _cache(file) as cache:
        good, bad = cache.verify()
    typer.echo(f"{good} values are intact, {bad} were damaged and have been removed")
    if bad:
        raise typer.Exit(1)


@app.command("clear")
def clear(
    reference: Annotated[Text, typer.Option(help="Only this reference's: the beginning of its name in `info`")] = None,
    file: CacheFile = None,
) -> None:
    """Remove all values, or those of one reference."""
    with _cache(file) as cache:
        typer.echo(f"{cache.clear(reference)} values removed")


@contextmanager
def _cache(file: Path | None) -> Iterator[LogpCache]:
    """Open the cache; a missing one is not created."""
    from alignkit.errors import CacheError
    from alignkit.reference.cache import LogpCache, default_path

    if file is not None and not file.is_file():
        raise CacheError(f"no such file: {file}. The default is {default_path()}; omit --file to use it")
    if not (file or default_path()).is_file():
        typer.echo(f"no cache at {default_path()} yet; the first run with a reference creates it")
        raise typer.Exit
    with LogpCache(file) as cache:
        yield cache
