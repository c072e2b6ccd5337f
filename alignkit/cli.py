"""The command line: run, demo, methods, settings, validate, cache. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from alignkit.config import RunConfig

app = typer.Typer(
    name="alignkit",
    help="Align language models from preferences. Methods are plugins; see `alignkit methods`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="The persistent cache of reference log-probabilities.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

Text = str | None


def main() -> None:
    """Run the command line; errors that alignkit raises on purpose are printed without a traceback, exit code 2."""
    from alignkit.errors import AlignkitError

    try:
        app(prog_name="alignkit")
    except AlignkitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.command(no_args_is_help=True)
def run(
    what: Annotated[str, typer.Argument(help="A method's name, or a YAML file of settings", metavar="METHOD|CONFIG")],
    model: Annotated[Text, typer.Option(help="Folder or hub name of the model")] = None,
    data: Annotated[Text, typer.Option(help="JSONL, Parquet or CSV file, or hub name")] = None,
    eval_data: Annotated[Text, typer.Option(help="Held-out rows")] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="Part of the data to hold out")] = None,
    output: Annotated[Text, typer.Option(help="Folder that holds the runs")] = None,
    name: Annotated[Text, typer.Option(help="Folder of this run in the output folder")] = None,
    reference: Annotated[Text, typer.Option(help="auto, full, int8, adapter-off or cached")] = None,
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank instead of all weights")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; wins over --epochs")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples of an optimiser step")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate; default: the method's")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the data's order and of all that is drawn")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run --name")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that came with the model")] = False,
    more: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, key=value; see `alignkit settings METHOD`")
    ] = None,
) -> None:
    """Train: `alignkit run dpo --model M --data D --set beta=0.2`, or `alignkit run config.yaml`."""
    given = {k: v for k, v in locals().items() if k not in ("what", "more") and v is not None and v is not False}
    settings = _settings(what, given, more or [])
    _speak()
    from alignkit.engine import Engine

    result = Engine().run(**settings)
    typer.echo(f"model: {result.folder / 'model'}")


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="dpo, ipo, kto, orpo, simpo or cpo")] = "dpo",
    output: Annotated[Path, typer.Option(help="Folder that holds the runs")] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Of the task, the models and the samples")] = 0,
) -> None:
    """Make a small task, fine-tune a small model on it, align it, and show what changed. No downloads."""
    _speak()
    from alignkit.demo import run_demo

    typer.echo(run_demo(method, output, seed))


@app.command()
def methods() -> None:
    """List the installed methods, what each needs, and the broken ones with their reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from alignkit import registry

    table = Table("method", "data", "roles", "distribution", "version", box=None)
    found = registry.plugins()
    for p in found:
        if p.method is None:
            table.add_row(p.name, "broken", "", p.distribution, p.version)
        else:
            table.add_row(p.name, p.method.data, ", ".join(sorted(p.method.uses)), p.distribution, p.version)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    console.print(table if found else "no method is installed; try: pip install alignkit-dpo")
    for p in found:
        if p.problem:
            console.print(f"broken: {escape(p.problem)}")


@app.command()
def settings(
    method: Annotated[str, typer.Argument(help="A method's name")],
) -> None:
    """List every setting of a run with that method: name, default, meaning."""
    from alignkit import registry
    from alignkit.config import RunConfig

    own = registry.get(method).Config
    for title, cls in ((f"settings of {method}", own), ("settings of every run", RunConfig)):
        typer.echo(f"{title}:")
        for name, field in cls.model_fields.items():
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            typer.echo(f"  {name:24} {default!s:28} {field.description}")


@app.command()
def validate(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings")],
) -> None:
    """Check a configuration and every row of its data, without loading a model."""
    _speak()
    checked, method = _checked(_settings(str(config), {}, []))
    from alignkit import assemble, models

    rows = assemble.read(checked, method, models.load_tokenizer(checked))
    typer.echo(f"{config}: fine, {len(rows.train)} rows to train on with '{checked.method}'")


@cache_app.command("info")
def cache_info(file: Annotated[Path | None, typer.Option(help="The cache's file")] = None) -> None:
    """Show where the cache is, its size, and its references."""
    from alignkit.logpcache import LogpCache

    with LogpCache(file) as cache:
        for name, value in cache.info().items():
            if name != "references":
                typer.echo(f"{name}: {value}")
                continue
            for reference in value:
                typer.echo("  " + ", ".join(f"{k} {v}" for k, v in reference.items()))


@cache_app.command("verify")
def cache_verify(file: Annotated[Path | None, typer.Option(help="The cache's file")] = None) -> None:
    """Check every value's checksum; bad ones are removed, and will be computed again."""
    from alignkit.logpcache import LogpCache

    with LogpCache(file) as cache:
        good, bad = cache.verify()
    typer.echo(f"{good} good, {bad} bad and removed")
    if bad:
        raise typer.Exit(1)


@cache_app.command("clear")
def cache_clear(
    reference: Annotated[Text, typer.Option(help="Only this reference's, by its fingerprint")] = None,
    file: Annotated[Path | None, typer.Option(help="The cache's file")] = None,
) -> None:
    """Remove all values, or one reference's."""
    from alignkit.logpcache import LogpCache

    with LogpCache(file) as cache:
        typer.echo(f"{cache.clear(reference)} values removed")


def _settings(what: str, given: dict[str, Any], pairs: list[str]) -> dict[str, Any]:
    """Flat settings from a method's name or a YAML file, then options, then --set."""
    import yaml

    from alignkit.config import read_yaml
    from alignkit.errors import ConfigError

    from_file = Path(what).suffix in (".yaml", ".yml")
    settings = read_yaml(what) if from_file else {"method": what}
    settings |= given
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"--set wants key=value, given: '{pair}'")
        try:
            settings[key.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key.strip().replace("-", "_")] = value
    for needed in ("method", "model", "data"):
        if settings.get(needed) is None:
            raise ConfigError(f"no {needed} given; " + (f"add it to {what}" if from_file else f"add --{needed}"))
    return settings


def _checked(settings: dict[str, Any]) -> tuple[RunConfig, Any]:
    from alignkit import registry
    from alignkit.config import split

    cls = registry.get(settings["method"])
    config, method_config = split(settings, cls.Config)
    return config, cls(method_config)


def _speak() -> None:
    """Let alignkit's own log reach the terminal, once."""
    import logging
    import os

    from alignkit.progress import PlainHandler

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logger = logging.getLogger("alignkit")
    if not logger.handlers and int(os.environ.get("RANK", "0")) == 0:
        logger.addHandler(PlainHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


if __name__ == "__main__":
    main()
