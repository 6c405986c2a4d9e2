"""The command line."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import jax
import matplotlib
import matplotlib.pyplot as plt
import typer
import xarray as xr
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import plot, saddle, tasks
from ._check import layer_indices
from .activation_classes import slope_jumps_at_zero
from .escape_scan import escape_scan
from .flow import Loss, Save, gradient_flow
from .flow.gradient_flow import KINKED_RTOL, STIFF_RTOL
from .flow.result import power_of_ten
from .networks import MLP, scale_layers
from .staircase import Plateaus
from .tasks import Task
from .tasks.task import zero_loss

CHECK = 3.0

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
        task = _task(data, samples)
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
        task = _task(data, samples)
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
def staircase(
    activation: Annotated[
        str, typer.Option(help="'identity' makes a linear network, the textbook staircase; tanh and relu are others.")
    ] = "identity",
    data: Annotated[
        str, typer.Option(help="'teacher', a linear map with singular values 4, 2, 1, ½, or as for the command escape.")
    ] = "teacher",
    samples: Annotated[int, typer.Option(min=1, help="Use the first so many samples of the data.")] = 200,
    width: Annotated[int, typer.Option(min=1, help="Size of the hidden layers.")] = 10,
    depth: Annotated[int, typer.Option(min=2, help="Number of weight matrices.")] = 4,
    scale: Annotated[float, typer.Option(help="Init scale ε of all layers.")] = 1e-3,
    loss: Annotated[float, typer.Option(help="End where the loss is down to this part of its value at zero.")] = 1e-3,
    rtol: Annotated[
        float | None, typer.Option(help="Tolerance of a step.  [default: 1e-2 where smooth, 2e-4 for kinks]")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="End after so many steps at the latest.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the random initialisation.")] = 0,
    layer: Annotated[int, typer.Option(help="The layer, from 0, whose singular values to draw.")] = 0,
    polish: Annotated[bool, typer.Option(help="Search for the saddles themselves.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("saddlejax-staircase"),
) -> None:
    """Follow a network from saddle to saddle, through all its plateaus.

    A deep linear network learns the modes of its teacher one at a time, the largest singular value first; the loss on
    the plateau after k modes is half the sum of the squares of those left. The flow of a smooth network is integrated
    by an exponential method whose work grows like log 1/ε, however long the plateaus are; that of a ReLU network by an
    explicit one. The last column says how much the end of a plateau moves, in log t, at three times the tolerance.

    Examples:

      saddlejax staircase

      saddlejax staircase --activation tanh --depth 3 --data digits
    """
    try:
        task = tasks.linear_teacher([4.0, 2.0, 1.0, 0.5], in_size=10) if data == "teacher" else _task(data, samples)
        layer_indices(layer, depth)
        net = MLP([task.in_size, *[width] * (depth - 1), task.out_size], activation, key=jax.random.key(seed))
        net = scale_layers(net, scale)
        kinked = slope_jumps_at_zero(net.activation)
        rtol = rtol or (KINKED_RTOL if kinked else STIFF_RTOL)
        target = Loss(loss * float(zero_loss(task)))
        out.mkdir(parents=True, exist_ok=True)
        console.print(f"{task}\nnetwork: {net}, init scale {scale:g}")
        with _progress() as bar:
            job = bar.add_task("flow", total=None)
            run = partial(gradient_flow, net, task, target, stiff=True, save=Save(weights=True), max_steps=max_steps)
            flow = run(rtol=rtol)
            bar.update(job, total=1, completed=1)
            job = bar.add_task("the same at another tolerance", total=None)
            check = run(rtol=CHECK * rtol)
            bar.update(job, total=1, completed=1)
            job = bar.add_task("saddles" if polish else "plateaus", total=None)
            found = flow.plateaus(polish=polish, check=check)
            bar.update(job, total=1, completed=1)
    except (ValueError, OSError) as error:
        _fail(error)
    console.print(str(flow), highlight=False)
    console.print(_plateau_table(found))
    numbers, figure = out / "staircase.json", out / "staircase.png"
    numbers.write_text(json.dumps(found.record(), indent=2))
    canvas, axes = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
    plot.staircase(flow, axes, layer=layer)
    canvas.savefig(figure, dpi=160)
    plt.close(canvas)
    console.print(f"figure: {figure}\nnumbers: {numbers}", highlight=False)


@app.command(hidden=True)
def version() -> None:
    """Print the version."""
    from importlib.metadata import version

    console.print(version("saddlejax"), highlight=False)


def _plateau_table(found: Plateaus) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Plateaus", title_justify="left", pad_edge=False)
    for heading in (
        "until t",
        "loss",
        "‖∇L‖",
        "ranks",
        "stable ranks",
        "bottleneck",
        "distance",
        "λ min",
        "λ max",
        "±log t",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for p in found:
        low, high = p.bottleneck_rank
        saddle = ["", "", ""]
        if p.saddle is not None:
            ends = (p.saddle.distance, p.saddle.lowest_eigenvalue, p.saddle.highest_eigenvalue)
            saddle = [f"{float(value):.2g}" for value in ends]
        table.add_row(
            power_of_ten(p.log_end, 3),
            f"{p.loss:.5g}",
            f"{p.gradient_norm:.0e}",
            " ".join(map(str, p.ranks)),
            " ".join(f"{r:.1f}" for r in p.stable_ranks),
            str(low) if low == high else f"{low} to {high}",
            *saddle,
            "" if p.log_end_error is None else f"{abs(p.log_end_error):.0e}",
        )
    return table


def _fail(error: Exception) -> NoReturn:
    console.print(f"[red]error:[/red] {error}", highlight=False)
    raise typer.Exit(2) from None


def _task(data: str, samples: int | None) -> Task:
    if data != "digits":
        return tasks.mnist(data, samples=samples)
    task = tasks.digits()
    if samples is None:
        return task
    if samples > task.samples:
        raise ValueError(f"--samples must be at most {task.samples}, the size of the digits, but it was {samples}.")
    return Task(task.x[:samples], task.y[:samples])


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
