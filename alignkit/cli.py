"""The command line: run, pipeline, compare, demo, methods, settings, ... Heavy imports wait until they are needed.

Exit codes: 0 done; 1 an unexpected error, damaged values that `cache verify` removed, a method of `compare` that
failed, or a problem that `doctor` found; 2 something that was given cannot be used; 130 and 143 stopped by Ctrl-C or
SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignkit import console
from alignkit.commands import audit, best_of_n, doctor, health, init, inspect, plan, recommend, report

if TYPE_CHECKING:
    from alignkit.logpcache import LogpCache

app = typer.Typer(
    name="alignkit",
    help="Align language models from preferences. Methods are plugins; see `alignkit methods`.",
    epilog="Start with `alignkit demo`: it needs no data, no GPU and no network.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="The persistent cache of reference log-probabilities.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(inspect.app, name="inspect")

Text = str | None
CacheFile = Annotated[Path | None, typer.Option(help="The cache's file; default: $ALIGNKIT_CACHE or the home's")]
RUN_EXAMPLES = """\b
Examples:
  alignkit run dpo --model MODEL --data prefs.jsonl --set beta=0.2
  alignkit run dpo --model MODEL --data prefs.jsonl --lora 16 --eval-fraction 0.05
  alignkit run config.yaml --seed 1
  alignkit run runs/dpo-001/config.yaml --resume

Options win over the YAML file, --set wins over both."""


def main() -> None:
    """Run the command line; what alignkit refuses on purpose is printed without a traceback, exit code 2."""
    from alignkit.errors import AlignkitError

    try:
        app(prog_name="alignkit")
    except AlignkitError as error:
        console.complain(str(error))
        raise SystemExit(2) from None
    except Exception as error:  # whatever else: a person wants a line, a bug report the traceback
        console.complain(console.unexpected(error))
        raise SystemExit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        from alignkit import __version__

        typer.echo(f"alignkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit")
    ] = False,
) -> None:
    pass


@app.command(no_args_is_help=True, epilog=RUN_EXAMPLES)
def run(
    what: Annotated[str, typer.Argument(help="A method's name, or a YAML file of settings", metavar="METHOD|CONFIG")],
    model: Annotated[Text, typer.Option(help="Folder or hub name of the model")] = None,
    data: Annotated[Text, typer.Option(help="JSONL, JSON, Parquet or CSV file, or hub name")] = None,
    eval_data: Annotated[Text, typer.Option(help="Held-out rows, in the same forms")] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="Part of the data to hold out, such as 0.05")] = None,
    output: Annotated[Text, typer.Option(help="Folder that holds the runs  [default: runs]")] = None,
    name: Annotated[Text, typer.Option(help="Folder of this run in it  [default: METHOD-001, ...]")] = None,
    reference: Annotated[Text, typer.Option(help="auto, full, int8, adapter-off or cached  [default: auto]")] = None,
    reward: Annotated[Text, typer.Option(help="What scores samples: a name, module:function, or folder")] = None,
    judge: Annotated[Text, typer.Option(help="What compares two samples, in the same forms")] = None,
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank instead of all weights")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data  [default: 1]")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; wins over --epochs")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in an optimiser step  [default: 32]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate  [default: the method's]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn  [default: 0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run --name")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that came with the model")
    ] = False,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; see `alignkit settings METHOD`"),
    ] = None,
) -> None:
    """Train a model by a method, or by a YAML file of settings."""
    given = {k: v for k, v in locals().items() if k not in ("what", "more") and v is not None and v is not False}
    given |= {name: console.value_of(given[name]) for name in ("reward", "judge") if name in given}
    settings = console.settings_of(what, given, more or [])
    console.checked(settings)
    console.speak()
    from alignkit.engine import Engine

    result = Engine().run(**settings)
    if console.rank() == 0:
        typer.echo(f"model: {result.folder / 'model'}")


@app.command(no_args_is_help=True)
def pipeline(
    file: Annotated[Path, typer.Argument(help="A YAML file with `stages`, see docs/pipeline.md", metavar="PIPELINE")],
    output: Annotated[Text, typer.Option(help="Folder that holds the pipeline's  [default: runs]")] = None,
    name: Annotated[Text, typer.Option(help="Folder of this pipeline in it  [default: pipeline-001, ...]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with it where it stopped")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that came with the model")
    ] = False,
) -> None:
    """Run a chain of methods, such as SFT, reward model, PPO: each begins with what the earlier ones trained."""
    given = {k: v for k, v in locals().items() if k != "file" and v is not None and v is not False}
    console.speak()
    from alignkit.engine import Engine
    from alignkit.pipeline import read_pipeline, table

    settings = read_pipeline(file) | given
    result = Engine().pipeline(settings.pop("stages", None), **settings)
    if console.rank() == 0:
        console.show(table(result))
        typer.echo(f"folder: {result.folder}")


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help="all, or names, comma-separated")] = "all",
    model: Annotated[Text, typer.Option(help="Folder or hub name of the base  [default: the demo's]")] = None,
    data: Annotated[Text, typer.Option(help="Rows, a tenth of which is held out  [default: the demo's]")] = None,
    eval_data: Annotated[Text, typer.Option(help="Held-out rows instead, in the same forms")] = None,
    reward: Annotated[Text, typer.Option(help="What scores answers, see docs/rewards.md")] = None,
    judge: Annotated[Text, typer.Option(help="What compares two answers, see docs/rewards.md")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the runs and the samples")] = 0,
    output: Annotated[Path, typer.Option(help="Folder that holds the runs")] = Path("runs"),
    json: Annotated[Path | None, typer.Option(help="File for all numbers")] = None,
    png: Annotated[Path | None, typer.Option(help="File for a picture of win rate against KL")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, for the methods that have it")
    ] = None,
) -> None:
    """Train a base by every method that the rows can serve, and show what each has made of it."""
    given = {"model": model, "data": data, "eval_data": eval_data, "reward": reward, "judge": judge}
    given = {k: console.value_of(v) if k in ("reward", "judge") else v for k, v in given.items() if v is not None}
    _check_compared(given, output, json, png)
    if not given:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for the demo
    console.speak()
    from alignkit import compare as room

    if png:
        room.check_picture()
    names = None if methods == "all" else [m.strip() for m in methods.split(",") if m.strip()]
    found = room.compare(given, console.pairs_of(more or []), names, output, seed)
    console.show(room.table(found))
    for name, reason in found.left_out.items():
        typer.echo(f"left out: {name}: {reason}")
    if json:
        room.write_json(found, json)
    if png:
        room.draw(found, png)
    raise typer.Exit(1 if any(row.failed for row in found.rows) else 0)


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="dpo, ipo, kto, orpo, simpo, cpo, ppo, grpo, rloo or nash")] = "dpo",
    output: Annotated[Path, typer.Option(help="Folder that holds the runs")] = Path("runs"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the task, the models and the samples")] = 0,
) -> None:
    """Align a small model on a made-up task: no downloads.

    Makes the task, fine-tunes a small model on it, aligns it, and shows what changed.
    """
    # A model this small gains nothing from threads, and loses much where other programs hold the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from alignkit import registry

    registry.get(method)
    registry.get("sft")
    console.speak()
    from alignkit.demo import run_demo

    typer.echo(run_demo(method, output, seed))


app.command(no_args_is_help=True, epilog=audit.EXAMPLES)(audit.audit)
app.command(no_args_is_help=True, epilog=best_of_n.EXAMPLES)(best_of_n.best_of_n)
app.command(no_args_is_help=True, epilog=recommend.EXAMPLES)(recommend.recommend)
app.command(no_args_is_help=True, epilog=init.EXAMPLES)(init.init)
app.command(no_args_is_help=True, epilog=plan.EXAMPLES)(plan.plan)
app.command(no_args_is_help=True, epilog=report.EXAMPLES)(report.report)
app.command(no_args_is_help=True, epilog=health.EXAMPLES)(health.health)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)


@app.command()
def methods() -> None:
    """List the installed methods, and the broken ones with their reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from alignkit import registry

    table = Table("method", "data", "roles", "distribution", "version", box=None, pad_edge=False)
    found = registry.plugins()
    for p in found:
        if p.method is None:
            table.add_row(p.name, "broken", "", p.distribution, p.version)
        else:
            table.add_row(p.name, p.method.data, ", ".join(sorted(p.method.uses)), p.distribution, p.version)
    shown = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    shown.print(table if found else "no method is installed; try: pip install alignkit-dpo")
    for p in found:
        if p.problem:
            shown.print(f"broken: {escape(p.problem)}")


@app.command()
def settings(
    method: Annotated[str, typer.Argument(help="A method's name", metavar="METHOD")],
) -> None:
    """List every setting of a run with a method: name, default, values, meaning."""
    from alignkit import registry
    from alignkit.config import RunConfig

    own = registry.get(method).Config
    for title, cls in ((f"settings of {method}", own), ("settings of every run", RunConfig)):
        typer.echo(f"{title}:")
        for name, default, values, meaning in console.described(cls):
            typer.echo(f"  {name:23} {default:12} {meaning} ({values})")
    typer.echo(f"\nIn YAML: `name: value`. As options: `alignkit run {method} ... --set name=value`.")


@app.command()
def validate(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings", metavar="CONFIG")],
) -> None:
    """Check a YAML file and every row of its data, without loading a model."""
    checked, method = console.checked(console.settings_of(str(config), {}, [], only_file=True))
    console.speak()
    from alignkit import assemble, loading
    from alignkit.online import check_online
    from alignkit.rewards import check_columns

    check_online(checked, method)
    rows = assemble.read(checked, method, loading.load_tokenizer(checked))
    assemble.least_examples(checked, method, rows, n_ranks=1)
    check_columns(checked.reward, checked.judge, {name for e in (*rows.train, *rows.held_out) for name in e.columns})
    typer.echo(f"{config}: fine, ready to run with '{checked.method}'")


@cache_app.command("info")
def cache_info(file: CacheFile = None) -> None:
    """Show where the cache is, its size, and its references."""
    with _cache(file) as cache:
        about = cache.info()
        typer.echo(f"path: {about['path']}")
        typer.echo(f"values: {about['entries']}")
        typer.echo(f"size: {console.size(about['bytes'])}")
        for r in about["references"]:
            label = f" {r['label']}," if r["label"] else ""
            used = f"first used {r['first_used'][:10]}, last used {r['last_used'][:10]}"
            typer.echo(
                f"reference {r['fingerprint'][:12]}:{label} {r['entries']} values, {console.size(r['bytes'])}, {used}"
            )


@cache_app.command("verify")
def cache_verify(file: CacheFile = None) -> None:
    """Check every value's checksum; damaged ones are removed, and will be computed again."""
    with _cache(file) as cache:
        good, bad = cache.verify()
    typer.echo(f"{good} values are whole, {bad} were damaged and are removed")
    if bad:
        raise typer.Exit(1)


@cache_app.command("clear")
def cache_clear(
    reference: Annotated[Text, typer.Option(help="Only this one's: the beginning of its name in `info`")] = None,
    file: CacheFile = None,
) -> None:
    """Remove all values, or those of one reference."""
    with _cache(file) as cache:
        typer.echo(f"{cache.clear(reference)} values removed")


@bench_app.command("kernels")
def bench_kernels(
    shapes: Annotated[Text, typer.Option(help="N x H x V, comma-separated, such as 2048x512x32000")] = None,
    dtype: Annotated[Text, typer.Option(help="float32, bfloat16 or float16  [default: by device]")] = None,
    only: Annotated[Text, typer.Option(help="Cases, comma-separated: path1 to path4, selective_logps, ...")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: does everything run?")] = False,
    threads: Annotated[Text, typer.Option(help="Threads of the CPU  [default: all]")] = None,
    json: Annotated[Path | None, typer.Option(help="File for rows and versions")] = None,
    png: Annotated[Path | None, typer.Option(help="File for the picture; needs matplotlib")] = None,
) -> None:
    """Compare the log-probability kernels with eager PyTorch and what else is installed: error, time, memory.

    A contender that is wrong against float64 gets no time. `python -m alignkit_kernels.bench --help` has more options.
    """
    given = {k: v for k, v in locals().items() if v is not None and v is not False}
    from alignkit_kernels.bench import main as bench

    options = [part for k, v in given.items() for part in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    raise typer.Exit(bench(options))


@contextmanager
def _cache(file: Path | None) -> Iterator[LogpCache]:
    """Open the cache to look at it; one that is not there is not made."""
    from alignkit.errors import CacheError
    from alignkit.logpcache import LogpCache, default_path

    if file is not None and not file.is_file():
        raise CacheError(f"no such file: {file}. The default is {default_path()}; leave out --file to use it")
    if not (file or default_path()).is_file():
        typer.echo(f"no cache yet at {default_path()}; the first run with a reference makes it")
        raise typer.Exit
    with LogpCache(file) as cache:
        yield cache


def _check_compared(given: dict[str, Any], output: Path, json: Path | None, png: Path | None) -> None:
    """Raise ConfigError where only a part of a task is given, or what is asked for could not be written in the end."""
    from alignkit.errors import ConfigError

    missing = [f"--{name}" for name in ("model", "data") if given and name not in given]
    if missing:
        raise ConfigError(f"no {' and no '.join(missing)} given; leave out all of them to compare on the demo's task")
    for option, file in (("--json", json), ("--png", png)):
        console.check_target(option, file, output)
    if png and given and not given.keys() & {"reward", "judge"}:
        raise ConfigError("--png shows win rates, which need a --reward or a --judge")


if __name__ == "__main__":
    main()
