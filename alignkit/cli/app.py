"""The command line: run, pipeline, compare, demo, methods, settings, ... Heavy imports happen inside commands.

Exit codes: 0 success; 1 an unexpected error, damaged values that `cache verify` removed, a method of `compare` that
failed, or a problem that `doctor` found; 2 invalid input; 130 and 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

from typing import Annotated

import typer

from alignkit.cli import console
from alignkit.cli.commands import (
    audit,
    bench,
    best_of_n,
    cache,
    chat,
    compare,
    convert,
    data,
    demo,
    doctor,
    health,
    init,
    inspect,
    methods,
    pipeline,
    plan,
    push,
    recommend,
    report,
    run,
    serve,
)  # fmt: skip

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


def main() -> None:
    """Run the command line; alignkit's own errors are printed without a traceback, exit code 2."""
    from alignkit.errors import AlignkitError, PluginError

    try:
        app(prog_name="alignkit")
    except AlignkitError as error:
        of_plugin = isinstance(error, PluginError) and error.__cause__ is not None  # its author needs the frames
        console.complain("\n".join([str(error), *(console.whole_traceback(error) if of_plugin else [])]))
        raise SystemExit(2) from None
    except Exception as error:  # anything else: a line for the user, the traceback for a bug report
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


# in the order of `alignkit --help`
app.command(no_args_is_help=True, epilog=run.EXAMPLES)(run.run)
app.command(no_args_is_help=True)(pipeline.pipeline)
app.command(no_args_is_help=True, epilog=serve.EXAMPLES)(serve.serve)
app.command()(compare.compare)
app.command()(demo.demo)
app.command(no_args_is_help=True, epilog=audit.EXAMPLES)(audit.audit)
app.command(no_args_is_help=True, epilog=best_of_n.EXAMPLES)(best_of_n.best_of_n)
app.command(no_args_is_help=True, epilog=chat.EXAMPLES)(chat.chat)
app.command(no_args_is_help=True, epilog=push.EXAMPLES)(push.push)
app.command(no_args_is_help=True, epilog=recommend.EXAMPLES)(recommend.recommend)
app.command(no_args_is_help=True, epilog=init.EXAMPLES)(init.init)
app.command(no_args_is_help=True, epilog=convert.EXAMPLES)(convert.convert)
app.command(no_args_is_help=True, epilog=plan.EXAMPLES)(plan.plan)
app.command(no_args_is_help=True, epilog=report.EXAMPLES)(report.report)
app.command(no_args_is_help=True, epilog=health.EXAMPLES)(health.health)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
app.command()(methods.methods)
app.command()(methods.settings)
app.command()(methods.validate)
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")
app.add_typer(inspect.app, name="inspect")
app.add_typer(data.app, name="data")
