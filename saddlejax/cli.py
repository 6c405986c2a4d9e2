"""The command line."""

import json
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import jax
import matplotlib
import typer
import xarray as xr
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import plot, saddle, tasks
from .escape_scan import escape_scan
from .flow.result import power_of_ten
from .sweep.execute import Progress as Done
from .sweep.spec_file import read_specification
from .sweep.sweep import sweep as run_sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How deep networks leave the plateaus of training from small weights.",
)
console = Console()


@app.callback()
def _precision() -> None:
    """How deep networks leave the plateaus of training from small weights."""
    jax.config.update("jax_enable_x64", True)
    matplotlib.use("Agg")


@app.command()
def escape(
    data: Annotated[
        str, typer.Option(help="'digits', 'openml' for MNIST by download, or a folder or .npz file with MNIST.")
    ] = "digits",
    samples: Annotated[int | None, typer.Option(min=1, help="Use the first so many samples; by default all.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Size of the hidden layers.")] = 24,
    depth: Annotated[int, typer.Option(min=2, help="Number of weight matrices.")] = 4,
    activation: Annotated[list[str] | None, typer.Option(help="Repeat for several.  [default: tanh, relu]")] = None,
    bottleneck: Annotated[
        list[int] | None, typer.Option(help="Number r of small layers; repeat for several.  [default: 2, 3, 4]")
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="Init scale ε of the small layers; repeat.  [default: 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of random initialisations.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("saddlejax-escape"),
) -> None:
    """Measure how long networks of tiny weights stay on the first plateau, and compare with the theory.

    A network of DEPTH weight matrices starts He-normal, its first r layers multiplied by ε. Training stalls near the
    saddle at the origin; the escape is the steepest point of the first descent. The theory says the escape time grows
    like ε^-(r-2) for r ≥ 3 and like log 1/ε for r = 2, whatever the total depth: the local exponent -dlogτ/dlogε,
    computed by differentiating the flow, should tend to r-2.

    The table also says how much work the measurement took (gradients) and how many steps gradient descent would have
    needed for the same escape at the largest learning rate that is stable there (2/λ, λ the top Hessian eigenvalue).

    Examples:

      saddlejax escape

      saddlejax escape --activation gelu --bottleneck 3 --bottleneck 5 --depth 6 --scale 1e-2 --scale 1e-6

      saddlejax escape --data path/to/mnist --samples 2000 --width 50
    """
    try:
        task = tasks.load(data, samples)
        activations, bottlenecks = activation or ["tanh", "relu"], bottleneck or [2, 3, 4]
        scales = scale or [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
        out.mkdir(parents=True, exist_ok=True)
        console.print(f"{task}\nnetworks: depth {depth}, width {width}, {seeds} seeds")
        lanes = len(activations) * len(bottlenecks) * len(scales) * seeds
        with _progress() as bar:
            job = bar.add_task("flows (the first ones compile)", total=lanes)
            results = escape_scan(
                task,
                width=width,
                depth=depth,
                activation=activations,
                bottleneck=bottlenecks,
                scale=scales,
                seed=range(seeds),
                on_lane=lambda: bar.advance(job),
            )
    except (ValueError, OSError) as error:
        _fail(error)
    console.print(_table(results))
    numbers, figure = out / "escape_times.csv", out / "escape_times.png"
    results.to_dataframe().to_csv(numbers)
    _figure(results, figure)
    console.print(f"figure: {figure}\nnumbers: {numbers}", highlight=False)


@app.command()
def direction(
    data: Annotated[str, typer.Option(help="As for the command escape.")] = "digits",
    samples: Annotated[int | None, typer.Option(min=1, help="Use the first so many samples; by default all.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Size of the hidden layers.")] = 24,
    depth: Annotated[
        list[int] | None, typer.Option(min=2, help="Number of weight matrices; repeat.  [default: 2 to 8]")
    ] = None,
    activation: Annotated[str, typer.Option(help="A homogeneous or smooth activation.")] = "relu",
    starts: Annotated[int, typer.Option(min=1, help="Random starts a depth.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the random starts.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("saddlejax-direction"),
) -> None:
    """Optimal escape directions from the saddle at zero weights, over depth.

    An escape direction is a point ρ with unit layers where -∇L0(ρ) = s ρ, L0 the leading order of the loss; the largest
    speed s is the way a network of tiny weights leaves. The table compares the speeds with an upper bound, and the
    singular values of every layer with the bound σ1/σ2 ≥ l^¼ for deep ReLU networks.
    """
    try:
        task = tasks.load(data, samples)
        out.mkdir(parents=True, exist_ok=True)
        depths = depth or list(range(2, 9))
        console.print(f"{task}\nnetworks: width {width}, {activation}, {starts} random starts a depth")
        with _progress() as bar:
            job = bar.add_task("depths", total=len(depths))
            found = saddle.directions_over_depth(
                task,
                depths,
                width=width,
                activation=activation,
                starts=starts,
                key=jax.random.key(seed),
                progress=lambda best: bar.advance(job),
            )
    except (ValueError, OSError) as error:
        _fail(error)
    console.print(saddle.directions_table(found))
    numbers, figure = out / "directions.json", out / "directions.png"
    numbers.write_text(json.dumps([saddle.record(best) for best in found], indent=2))
    saddle.directions_figure(found).savefig(figure, dpi=160)
    console.print(f"figure: {figure}\nnumbers: {numbers}", highlight=False)


@app.command()
def sweep(
    specification: Annotated[Path, typer.Argument(metavar="SPEC.toml", help="What to compute, and where to keep it.")],
    store: Annotated[Path | None, typer.Option(help="Folder for the results, in place of the file's.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Address of a Dask scheduler, such as tcp://host:8786, to compute on its workers."),
    ] = None,
) -> None:
    """A grid of flows or escape directions from a file, kept in a Zarr store; call it again to go on after any stop.

    An example of SPEC.toml:

      [task]
      data = "digits"
      samples = 500

      [grid]
      width = 24
      depth = [2, 3, 4]
      activation = ["tanh", "relu"]
      bottleneck = "all"
      scale = { from = 1e-1, to = 1e-5, count = 5 }
      seed = { count = 8 }

      [flow]
      until = "escape"

    Read the results, at any time: xarray.open_zarr("SPEC.zarr").
    """
    try:
        task, arguments = read_specification(specification)
        if store is not None:
            arguments["store"] = store
        console.print(f"{task}\nstore: {arguments['store']}", highlight=False)
        with _executor(cluster) as executor, _sweep_progress() as bar:
            job = bar.add_task("lanes", total=None, outcome="")

            def show(done: Done) -> None:
                if done.done == done.kept:  # what an earlier call computed says nothing about the time left
                    bar.reset(job, completed=done.kept)
                bar.update(job, total=done.lanes, completed=done.done, outcome=_outcome(done))

            results = run_sweep(task, **arguments, executor=executor, on_progress=show)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        _fail(error)
    counts = results.status.to_series().value_counts()
    for status, count in counts.items():
        console.print(f"{count:8d}  {status}", highlight=False)
    if any(str(status).startswith("failed") for status in counts.index):
        raise typer.Exit(1)


@app.command(hidden=True)
def version() -> None:
    """Print the version."""
    from importlib.metadata import version

    console.print(version("saddlejax"), highlight=False)


def _fail(error: Exception) -> NoReturn:
    console.print(f"[red]error:[/red] {error}", highlight=False)
    raise typer.Exit(2) from None


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
    words = [f"{done.rate:.3g}/s"] if done.rate > 0 else ["compiling"]
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


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _table(results: xr.Dataset) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Escape from the first plateau", title_justify="left", pad_edge=False)
    for heading in ("", "r", "ε", "escape time", "-dlogτ/dlogε", "law", "grads", "GD steps", ""):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for name in results.activation.values:
        for r in results.bottleneck.values:
            for scale in results.scale.values:
                cell = results.sel(activation=name, bottleneck=r, scale=scale)
                table.add_row(str(name), str(r), f"{scale:.0e}", *_cells(cell, int(r)))
            table.add_section()
    table.caption = (
        f"Over {results.seed.size} seeds: medians, and mean ± standard deviation of the exponent. law: r-2, the exponent "
        "as ε → 0 (a logarithm for r = 2).\ngrads: gradients the measurement took. GD steps: what gradient descent at "
        "learning rate 2/λ would need."
    )
    table.caption_justify = "left"
    return table


def _cells(cell: xr.Dataset, r: int) -> list[str]:
    law = {1: "0", 2: "log"}.get(r, str(r - 2))
    escaped = cell.where(cell.status == "escaped")
    known = int((cell.status == "escaped").sum())
    others = sorted({str(s).split(":")[0] for s in cell.status.values} - {"escaped"})
    note = f"{cell.status.size - known} of {cell.status.size}: {', '.join(others)}" if others else ""
    if known == 0:
        return ["–", "–", law, "–", "–", note]
    return [
        power_of_ten(float(escaped.log_escape_time.median()), digits=3),
        f"{float(escaped.exponent.mean()):.4f} ± {float(escaped.exponent.std()):.4f}",
        law,
        f"{float(escaped.gradient_evaluations.median()):.0f}",
        power_of_ten(float(escaped.log_descent_steps.median()), digits=1),
        note,
    ]


def _figure(results: xr.Dataset, path: Path) -> None:
    import matplotlib.pyplot as plt

    names = [str(name) for name in results.activation.values]
    figure, axes = plt.subplots(
        2,
        len(names),
        figsize=(4.4 * len(names), 6),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(2, 1),
        layout="constrained",
    )
    for column, name in enumerate(names):
        plot.escape_times(results, axes[0, column], activation=name).set_xlabel("")
        plot.exponents(results, axes[1, column], activation=name)
        # The axes share their scale: inverting it once for each of them would undo it.
        axes[0, column].set_xlim(float(results.scale.max()) * 1.6, float(results.scale.min()) / 1.6)
        if column > 0:
            axes[0, column].set_ylabel("")
            axes[1, column].set_ylabel("")
    figure.suptitle(f"Leaving the first plateau: depth {int(results.depth)}, width {int(results.width)}")
    figure.savefig(path, dpi=160)
    plt.close(figure)
