"""Sweeps from a file."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, no_type_check

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..flow import Status
from ..sweeps._sweep import sweep as run_sweep
from ..sweeps.execute import Progress as Done
from ..sweeps.problem import FAILED as FAILED_LANE
from ..sweeps.spec_file import read_specification
from ._app import FAILED, NOT_REACHED, app, complete, console

WITHOUT_FAULT = (
    *(Status[one] for one in (Status.escaped, Status.time_reached, Status.loss_reached, Status.steps_taken)),
    "found",
    "no such network",
)
"""How the statuses of lanes begin that are what was asked for, or that the grid holds no network for."""


@app.command(short_help="A grid of networks from a file, resumable.")
@no_type_check
def sweep(
    context: typer.Context,
    specification: Annotated[Path, typer.Argument(metavar="SPEC.toml", help="What to compute, and where to keep it.")],
    store: Annotated[Path | None, typer.Option(help="Folder for the results, in place of the file's.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Address of a Dask scheduler, such as tcp://host:8786, to compute on its workers."),
    ] = None,
) -> None:
    """A grid of flows or escape directions from a file, kept in a Zarr store; call it again to go on after any stop.

    \b
    An example of SPEC.toml:
      [task]
      data = "digits"
      samples = 500
    \b
      [grid]
      width = 24
      depth = [2, 3, 4]
      activation = ["tanh", "relu"]
      bottleneck = "all"
      scale = { from = 1e-1, to = 1e-5, count = 5 }
      seed = { count = 8 }
    \b
      [flow]
      until = "escape"

    Read the results, at any time: xarray.open_zarr("SPEC.zarr").
    """
    statuses: list[str] = []

    def work(bar: Progress) -> None:
        task, arguments = read_specification(specification)
        if store is not None:
            arguments["store"] = store
        console.print(f"{task}\nstore: {arguments['store']}", highlight=False)
        job = bar.add_task("lanes", total=None, outcome="")

        def show(done: Done) -> None:
            bar.start()
            if done.done == done.kept:  # what an earlier call computed says nothing about the time left
                bar.reset(job, completed=done.kept)
            bar.update(job, total=done.lanes, completed=done.done, outcome=_outcome(done))

        with _executor(cluster) as executor:
            results = run_sweep(task, **arguments, executor=executor, on_progress=show)
        statuses.extend(str(status) for status in results.status.values.ravel())

    def report(finished: bool) -> None:
        if not finished:
            console.print("stopped; the same command goes on from here")
        for status, count in Counter(statuses).most_common():
            console.print(f"{count:8d}  {status}", highlight=False)

    errors = (ValueError, TypeError, OSError, ImportError, RuntimeError)
    complete(context, work, report, bar=_sweep_progress(), errors=errors)
    if any(status.startswith(FAILED_LANE) for status in statuses):
        raise typer.Exit(FAILED)
    if not all(status.startswith(WITHOUT_FAULT) for status in statuses):
        raise typer.Exit(NOT_REACHED)


@contextmanager
def _executor(cluster: str | None) -> Iterator[Executor | None]:
    """Dask's executor for a scheduler's address, closed at the end."""
    if cluster is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise ImportError("--cluster needs Dask: pip install 'saddlejax[cluster]'.") from None
    with Client(cluster) as client:
        yield client.get_executor()


def _outcome(done: Done) -> str:
    words = [f"{done.rate:.3g}/s"] if done.rate > 0 else ["compiling"] if done.done < done.lanes else []
    words += [f"{done.kept} kept"] if done.kept else []
    words += [f"{done.retries} blocks tried again"] if done.retries else []
    return ", ".join([*words, f"{done.failed} failed"])


def _sweep_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[outcome]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
