"""What all commands share: the application, the console, progress bars and errors."""

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
import matplotlib
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..sweep.describe import versions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: paragraphs are filled, and what stands in brackets is shown
    help="How deep networks leave the plateaus of training from small weights.",
)
console = Console(markup=False)  # what stands in brackets, in paths and messages, is shown


@app.callback()
def _precision() -> None:
    """How deep networks leave the plateaus of training from small weights."""
    jax.config.update("jax_enable_x64", True)
    matplotlib.use("Agg")


@app.command(hidden=True)
def version() -> None:
    """Print the version."""
    console.print(metadata.version("saddlejax"), highlight=False)


def fail(error: Exception) -> NoReturn:
    """Print an error and end with exit status 2."""
    console.print(Text.assemble(("error:", "red"), f" {error}"))
    raise typer.Exit(2) from None


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


def write_numbers(path: Path, context: typer.Context, **results: Any) -> None:
    """Write results as JSON, with the options of the command and the versions that computed them.

    JSON knows neither infinities nor NaN: they are null.
    """
    numbers = {**results, "options": context.params, "versions": versions()}
    path.write_text(json.dumps(_finite(numbers), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
