"""The program `adamerging` and its commands. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import Annotated

import typer

from .. import __version__
from .cache import cache
from .compare import compare
from .compress import compress
from .evaluate import evaluate
from .failing import TRACEBACK, guard
from .finetuning import finetune
from .inspect import inspect
from .merge import merge
from .methods import methods
from .report import report
from .serving import export, predict
from .sharing import share
from .store import store
from .suite import suite

EPILOG = (
    "Exit codes: 0 done, 1 unexpected error, 2 usage, 3 weights that cannot be opened, "
    "4 base and experts do not belong together, 5 NaN or infinity, 6 output cannot be written, "
    "7 memory ran out, 130 interrupted, 141 nobody reads the output."
)

app = typer.Typer(
    name="adamerging",
    help="Merge experts fine-tuned from one base into one multi-task model, with no training data.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=EPILOG)(merge)
app.command(epilog=EPILOG)(inspect)
app.command(epilog=EPILOG)(compare)
app.command(epilog=EPILOG)(evaluate)
app.command(epilog=EPILOG)(finetune)
app.command(epilog=EPILOG)(share)
app.command(epilog=EPILOG)(suite)
app.command(epilog=EPILOG)(compress)
app.add_typer(store)
app.command()(methods)
app.command()(cache)
app.command()(report)
app.command()(predict)
app.command()(export)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"adamerging {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar=TRACEBACK, help="Show where in the code an error arose.")
    ] = False,
) -> None:
    """Options of every command."""
    if traceback:
        os.environ[TRACEBACK] = "1"
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # quiet when piped


def main() -> None:
    """Run the program."""
    gc.set_threshold(100_000)  # importing torch makes many objects and no garbage
    with guard():
        app()


def program() -> None:
    """The console script: `main`, and an end that leaves taking torch apart to the system (half a second)."""
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
