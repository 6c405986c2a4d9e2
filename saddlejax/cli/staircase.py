"""A network's way from saddle to saddle."""

from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import matplotlib.pyplot as plt
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .. import plot, tasks
from .._check import layer_indices
from ..activation_classes import slope_jumps_at_zero
from ..flow import Loss, Save, gradient_flow
from ..flow.gradient_flow import KINKED_RTOL, STIFF_RTOL
from ..flow.result import power_of_ten
from ..networks import MLP, scale_layers
from ..staircase import Plateaus
from ..tasks.task import zero_loss
from .app import app, console, fail, progress_bar, write_numbers

CHECK = 3.0


@app.command(short_help="One network, from saddle to saddle.")
def staircase(
    context: typer.Context,
    activation: Annotated[
        str, typer.Option(help="Activation; 'identity' makes a linear network, the textbook staircase.")
    ] = "identity",
    data: Annotated[
        str, typer.Option(help="'teacher', a linear map with singular values 4, 2, 1, ½, or as for saddlejax escape.")
    ] = "teacher",
    samples: Annotated[int, typer.Option(min=1, help="Use the first so many samples of the data.")] = 200,
    width: Annotated[int, typer.Option(min=1, help="Size of the hidden layers.")] = 10,
    depth: Annotated[int, typer.Option(min=2, help="Number L of weight matrices.")] = 4,
    scale: Annotated[float, typer.Option(help="Init scale ε of all layers.")] = 1e-3,
    loss: Annotated[
        float, typer.Option(help="End where the loss is down to this part of its value at zero weights.")
    ] = 1e-3,
    rtol: Annotated[
        float | None, typer.Option(help="Tolerance of a step.  [default: 1e-2 where smooth, 2e-4 for kinks]")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="End after so many steps at the latest.")] = 4000,
    seed: Annotated[int, typer.Option(help="Seed of the random initialisation.")] = 0,
    layer: Annotated[int, typer.Option(help="The layer, from 0, whose singular values to draw.")] = 0,
    polish: Annotated[bool, typer.Option(help="Search for the saddles next to the plateaus.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("saddlejax-staircase"),
) -> None:
    """Follow a network from saddle to saddle, through all its plateaus.

    A deep linear network learns the modes of its teacher one at a time, the largest singular value first; the loss on
    the plateau after k modes is half the sum of the squares of those left. The flow of a smooth network is integrated
    by an exponential method whose work grows like log 1/ε, however long the plateaus are; that of a ReLU network by an
    explicit one. The last column says how much the end of a plateau moves, in log t, at three times the tolerance.

    \b
    Examples:
      saddlejax staircase
      saddlejax staircase --activation tanh --depth 3 --data digits
    """
    try:
        task = (
            tasks.linear_teacher([4.0, 2.0, 1.0, 0.5], in_size=10) if data == "teacher" else tasks.load(data, samples)
        )
        layer_indices(layer, depth)
        net = MLP([task.in_size, *[width] * (depth - 1), task.out_size], activation, key=jax.random.key(seed))
        net = scale_layers(net, scale)
        kinked = slope_jumps_at_zero(net.activation)
        rtol = rtol or (KINKED_RTOL if kinked else STIFF_RTOL)
        target = Loss(loss * float(zero_loss(task)))
        out.mkdir(parents=True, exist_ok=True)
        console.print(f"{task}\nnetwork: {net}, init scale {scale:g}")
        with progress_bar() as bar:
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
        fail(error)
    console.print(str(flow), highlight=False)
    console.print(_plateau_table(found))
    if polish:
        console.print(_saddle_table(found))
    numbers, figure = out / "staircase.json", out / "staircase.png"
    write_numbers(numbers, context, plateaus=found.record())
    canvas, axes = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
    plot.staircase(flow, axes, layer=layer)
    canvas.savefig(figure, dpi=160)
    plt.close(canvas)
    console.print(f"figure: {figure}\nnumbers: {numbers}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _plateau_table(found: Plateaus) -> Table:
    table = _table("Plateaus", "", "until t", "loss", "‖∇L‖", "ranks of layers", "bottleneck rank", "± log t")
    for number, p in enumerate(found):
        low, high = p.bottleneck_rank
        table.add_row(
            str(number),
            power_of_ten(p.log_end, 3),
            f"{p.loss:.5g}",
            f"{p.gradient_norm:.0e}",
            " ".join(map(str, p.ranks)),
            str(low) if low == high else f"{low} to {high}",
            "" if p.log_end_error is None else f"{abs(p.log_end_error):.0e}",
        )
    return table


def _saddle_table(found: Plateaus) -> Table:
    table = _table("Stationary points near them", "", "loss", "distance", "‖∇L‖", "λ min", "λ max", "")
    for number, p in enumerate(found):
        if p.saddle is not None:
            table.add_row(
                str(number),
                f"{float(p.saddle.loss):.6g}",
                f"{float(p.saddle.distance):.2g}",
                f"{float(p.saddle.gradient_norm):.0e}",
                f"{float(p.saddle.lowest_eigenvalue):.3g}",
                f"{float(p.saddle.highest_eigenvalue):.4g}",
                "" if p.saddle.converged else "not converged",
            )
    return table
