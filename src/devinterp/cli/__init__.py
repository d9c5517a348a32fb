"""The command line: thin over the public calls.

Exit codes: 0 done; 1 the run or the estimate failed (a chain diverged, a store is damaged); 2 an argument cannot be used;
130 interrupted.
"""

import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer

from devinterp.cli import commands, stores, sweeping
from devinterp.cli.printing import inert
from devinterp.errors import DevinterpError, DevinterpInputError, StoreError

app = typer.Typer(
    help="What a network has learned, read from the geometry of its loss around a checkpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("sample")(commands.sample_command)
app.command("llc")(commands.llc_command)
app.command("bif")(commands.bif_command)
app.command("susceptibilities")(commands.susceptibilities_command)
app.command("sweep")(sweeping.sweep_command)
app.command("components")(commands.components_command)
app.command("calibrate")(commands.calibrate_command)
app.command("diagnose")(stores.diagnose_command)
app.command("show")(stores.show_command)
app.command("report")(stores.report_command)
app.command("verify")(stores.verify_command)
app.command("convert")(stores.convert_command)

INTERRUPTED = 130


@app.callback()
def main_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; errors are one message, exit codes as in the module's docstring."""
    debug = "--debug" in sys.argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning
    if not sys.stderr.isatty():  # bars are for terminals
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(standalone_mode=False)  # Typer turns Ctrl-C into a returned 130
    except typer.Exit as exit_:
        code = exit_.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        code = _report(error)
    if code == INTERRUPTED:
        typer.echo("interrupted; the same command goes on from the last commit", err=True)
    if code:
        sys.exit(code)


def _report(error: Exception) -> int:
    usage = getattr(error, "format_message", None)
    typer.echo(inert(f"error: {usage() if usage else error}"), err=True)
    if usage or (isinstance(error, DevinterpInputError) and not isinstance(error, StoreError)):
        return 2
    if not isinstance(error, DevinterpError | OSError):
        typer.echo(f"({type(error).__name__}; devinterp --debug ... shows where)", err=True)
    return 1


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(inert(f"warning: {message}"), err=True)
