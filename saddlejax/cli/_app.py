"""What all commands share: the application, the console, how a command runs and ends, warnings and errors."""

import json
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, no_type_check

import jax
import matplotlib
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..sweeps.describe import versions

FAILED, WRONG_USAGE, NOT_REACHED, STOPPED = 1, 2, 3, 130
"""The exit statuses besides zero; `docs/cli.md` says what they mean."""
Context = Any
"""What typer hands to a command that asks for a `typer.Context`, which is an object of another class."""
LISTENING = 0.2
"""Seconds between two looks at whether the work is done."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: paragraphs are filled, and what stands in brackets is shown
    help="How deep networks leave the plateaus of training from small weights.",
)
console = Console(markup=False)  # what stands in brackets, in paths and messages, is shown


@app.callback()
@no_type_check
def _begin(context: typer.Context) -> None:
    """How deep networks leave the plateaus of training from small weights."""
    jax.config.update("jax_enable_x64", True)
    matplotlib.use("Agg")
    context.with_resource(_warnings_in_words())


@app.command(hidden=True)
def version() -> None:
    """Print the version."""
    console.print(metadata.version("saddlejax"), highlight=False)


def complete(
    context: Context,
    work: Callable[[Progress], None],
    report: Callable[[bool], None],
    *,
    bar: Progress | None = None,
    errors: tuple[type[Exception], ...] = (ValueError, OSError),
) -> None:
    """Do the work of a command, then report; on Ctrl-C report what is finished, and end with exit status 130.

    The work is done in another thread, so that the main thread, which Python lets hear Ctrl-C, is never inside a
    compilation or a running program, where it would hear it late or not at all.

    **Arguments:** `work(bar)`, which starts the progress bar once nothing is left to refuse; `report(finished)`, called
    in the main thread, after Ctrl-C with False; `bar`, where it is not the usual one; `errors`, those to tell in words.
    """
    bar = bar or progress_bar()
    done: Future = Future()

    def run() -> None:
        try:
            work(bar)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    try:
        threading.Thread(target=run, daemon=True).start()
        while not wait([done], timeout=LISTENING).done:
            pass
        if done.exception() is not None:
            bar.live.transient = True  # a bar that came to nothing is taken away
        _stop(bar)
        done.result()
        report(True)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C ends the process at once
        try:
            _stop(bar)
            report(False)
        finally:
            # Without the interpreter's own end: it takes away what the programs and compilations that still run in
            # other threads use, which makes them crash, or waits for them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STOPPED)
    except errors as error:
        fail(error, context)


def _stop(bar: Progress) -> None:
    if bar.live.is_started:
        bar.stop()


def fail(error: Exception, context: Context) -> NoReturn:
    """Print an error and end: with the status of wrong usage where an option, or what it names, is at fault."""
    console.print(Text.assemble(("error:", "red"), f" {_as_typed(str(error), context)}"))
    raise typer.Exit(WRONG_USAGE if isinstance(error, ValueError | TypeError | FileNotFoundError) else FAILED) from None


def _as_typed(message: str, context: Context) -> str:
    """A message with the argument it begins with as it was typed: `--scale must be positive`."""
    argument = re.match(r"\w*", message)[0]  # type: ignore[index]
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        typed = source is not None and source.name == "COMMANDLINE"
        if typed and argument in (parameter.name, f"{parameter.name}s") and parameter.opts[0].startswith("--"):
            return parameter.opts[0] + message[len(argument) :]
    return message


@contextmanager
def _warnings_in_words() -> Iterator[None]:
    """Warnings, each once, without the place in the program that they come from."""
    shown = set()

    def show(message: Warning | str, *_: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            console.print(Text.assemble(("warning:", "yellow"), f" {message}"))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def progress_bar() -> Progress:
    """A bar that tells what is done, how many are, and the time gone and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def write_numbers(path: Path, context: Context, *, finished: bool, **results: Any) -> None:
    """Write results as JSON, with the options of the command and the versions that computed them.

    JSON knows neither infinities nor NaN: they are null. The file is replaced as a whole, never half written.
    """
    numbers = {"finished": finished, **results, "options": context.params, "versions": versions()}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_finite(numbers), indent=2, default=str, allow_nan=False))
    part.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
