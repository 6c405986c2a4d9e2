"""A network's way from saddle to saddle."""

from functools import partial
from pathlib import Path
from typing import Annotated, no_type_check

import jax
import matplotlib.pyplot as plt
import typer
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from .. import _check, plot, tasks
from .._check import layer_indices
from .._numerics import power_of_ten
from ..flow import Flow, Loss, Save, Status, gradient_flow
from ..flow.plan import KINKED_RTOL, STIFF_RTOL
from ..flow.plateaus import Plateaus, interval
from ..networks.activation_class import slope_jumps
from ..networks.mlp import MLP
from ..scaling import scale_layers
from ..tasks.task import zero_loss
from ._app import NOT_REACHED, app, complete, console, write_numbers

SAMPLES = 200
CHECK = 3.0


@app.command(short_help="One network, from saddle to saddle.")
@no_type_check
def staircase(
    context: typer.Context,
    activation: Annotated[
        str, typer.Option(help="Activation; 'identity' makes a linear network, the textbook staircase.")
    ] = "identity",
    data: Annotated[
        str, typer.Option(help="'teacher', a linear map with singular values 4, 2, 1, ½, or as for saddlejax escape.")
    ] = "teacher",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many samples of the data; by default at most 200.")
    ] = None,
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
    by an exponential method whose work grows like log 1/ε, however long the plateaus are; that of a ReLU network slides
    along the kinks of its units, by explicit or exponential steps as it needs. The last column says how much the end of a
    plateau moves, in log t, at three times the tolerance.

    \b
    Examples:
      saddlejax staircase
      saddlejax staircase --activation tanh --depth 3 --data digits
    """
    kept: list[tuple[Flow, Plateaus]] = []
    numbers, figure = out / "staircase.json", out / "staircase.png"

    def keep(flow: Flow, found: Plateaus, *, finished: bool) -> None:
        kept[:] = [(flow, found)]
        outcome = Status[flow.status]
        write_numbers(numbers, context, finished=finished, outcome=outcome, plateaus=found.record())

    def work(bar: Progress) -> None:
        if data == "teacher":
            task = tasks.linear_teacher([4.0, 2.0, 1.0, 0.5], in_size=10)
        else:
            task = tasks.load(data, samples)
            if samples is None and task.samples > SAMPLES:
                task = tasks.load(data, SAMPLES)
        layer_indices(layer, depth)
        net = MLP([task.in_size, *[width] * (depth - 1), task.out_size], activation, key=jax.random.key(seed))
        net = scale_layers(net, scale)
        tolerance, kinked = rtol, slope_jumps(net.activation)
        if tolerance is None:
            tolerance = KINKED_RTOL if kinked else STIFF_RTOL
        _check.positive_number("rtol", tolerance)
        if CHECK * tolerance >= 1:
            raise _check.fail("rtol", f"be below {1 / CHECK:.3g}, since the check takes {CHECK:g} times as much", rtol)
        if not 0 < loss < 1:
            raise _check.fail("loss", "lie between 0 and 1", loss)
        target = Loss(loss * float(zero_loss(task)))
        out.mkdir(parents=True, exist_ok=True)
        console.print(f"{task}\nnetwork: {net}, init scale {scale:g}")
        bar.start()
        job = bar.add_task("flow", total=None)
        stiff = None if kinked else True  # where it slides along kinks a flow chooses its steps
        run = partial(gradient_flow, net, task, target, stiff=stiff, save=Save(weights=True), max_steps=max_steps)
        flow = run(rtol=tolerance)
        keep(flow, flow.plateaus(), finished=False)
        bar.update(job, total=1, completed=1)
        job = bar.add_task("the same at another tolerance", total=None)
        check = run(rtol=CHECK * tolerance)
        keep(flow, flow.plateaus(check=check), finished=False)
        bar.update(job, total=1, completed=1)
        if polish:
            job = bar.add_task("saddles", total=None)
            kept[:] = [(flow, flow.plateaus(polish=True, check=check))]
            bar.update(job, total=1, completed=1)

    def report(finished: bool) -> None:
        if not finished:
            left = "the flow is finished and kept, not all of what follows it" if kept else "nothing was finished"
            console.print(f"stopped: {left}. The same command begins anew.")
        if not kept:
            return
        flow, found = kept[0]
        keep(flow, found, finished=finished)
        console.print(str(flow), highlight=False)
        _print_tables(found)
        canvas, axes = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
        plot.staircase(flow, axes, layer=layer)
        canvas.savefig(figure, dpi=160)
        plt.close(canvas)
        console.print(f"figure: {figure}\nnumbers: {numbers}", highlight=False)

    complete(context, work, report)
    if kept[0][0].status != Status.loss_reached:
        console.print(
            "The flow did not come down to the loss asked for: later plateaus, if there are any, are missing."
        )
        raise typer.Exit(NOT_REACHED)


def _print_tables(found: Plateaus) -> None:
    if len(found) == 0:
        console.print(
            "No plateaus: along the flow ‖∇L‖ has no minimum. Smaller weights (--scale) give longer plateaus."
        )
        return
    console.print(_plateau_table(found))
    if any(plateau.saddle is not None for plateau in found):
        console.print(_saddle_table(found))


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _plateau_table(found: Plateaus) -> Table:
    table = _table("Plateaus", "", "until t", "loss", "‖∇L‖", "ranks of layers", "bottleneck rank", "± log t")
    for number, p in enumerate(found):
        table.add_row(
            str(number),
            power_of_ten(p.log_end, 3),
            f"{p.loss:.5g}",
            f"{p.gradient_norm:.0e}",
            " ".join(map(str, p.ranks)),
            interval(p.bottleneck_rank),
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
