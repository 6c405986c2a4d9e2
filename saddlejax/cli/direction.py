"""Optimal escape directions over depth."""

from pathlib import Path
from typing import Annotated, no_type_check

import jax
import matplotlib.pyplot as plt
import typer
from rich.progress import Progress

from .. import plot, saddle, tasks
from ..saddle.origin import tangent
from ._app import NOT_REACHED, app, complete, console, write_numbers


@app.command(short_help="Optimal escape directions, over depth.")
@no_type_check
def direction(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="As for saddlejax escape.")] = "digits",
    samples: Annotated[int | None, typer.Option(min=1, help="Use the first so many samples; by default all.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Size of the hidden layers.")] = 24,
    depth: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Number L of weight matrices; repeat for several.  [default: 2 to 8]"),
    ] = None,
    activation: Annotated[str, typer.Option(help="Activation, homogeneous or smooth.")] = "relu",
    starts: Annotated[int, typer.Option(min=1, help="Number of random starts at each depth.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the random starts.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("saddlejax-direction"),
) -> None:
    """Optimal escape directions from the saddle at zero weights, over depth.

    An escape direction is a point ρ with unit layers where -∇L0(ρ) = s ρ, L0 the leading order of the loss; the largest
    speed s is the way a network of tiny weights leaves. The table compares the speeds with an upper bound, and the
    singular values of every layer with the bound σ1/σ2 ≥ l^¼ for deep ReLU networks.

    \b
    Examples:
      saddlejax direction
      saddlejax direction --activation tanh --depth 3 --depth 6
    """
    depths = list(range(2, 9)) if depth is None else depth
    found: list[saddle.EscapeDirection] = []
    numbers, figure = out / "directions.json", out / "directions.png"

    def keep(finished: bool) -> None:
        write_numbers(numbers, context, finished=finished, directions=[saddle.record(best) for best in found])

    def work(bar: Progress) -> None:
        task = tasks.load(data, samples)
        closed = tangent(activation).linear
        out.mkdir(parents=True, exist_ok=True)
        search = "in closed form: linear to leading order" if closed else f"{starts} random starts a depth"
        console.print(f"{task}\nnetworks: width {width}, {activation}, {search}")
        bar.start()
        job = bar.add_task("depths", total=len(depths))

        def add(best: saddle.EscapeDirection) -> None:
            found.append(best)
            keep(finished=False)
            bar.advance(job)

        saddle.directions_over_depth(
            task, depths, width=width, activation=activation, starts=starts, key=jax.random.key(seed), progress=add
        )

    def report(finished: bool) -> None:
        if not finished:
            rest = " ".join(f"--depth {one}" for one in depths[len(found) :])
            kept = f"{len(found)} of {len(depths)} depths are finished and kept; for the others: {rest}, another --out."
            console.print(f"stopped: {kept if found else 'nothing was finished.'}")
        if not found:
            return
        keep(finished)
        console.print(saddle.directions_table(found))
        canvas, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        plot.directions(found, axes)
        canvas.savefig(figure, dpi=160)
        plt.close(canvas)
        console.print(f"figure: {figure}\nnumbers: {numbers}", highlight=False)

    complete(context, work, report)
    unknown = [str(best.depth) for best in found if not best.optima]
    if unknown:
        console.print(f"No optimum was found at depth {', '.join(unknown)}: what stands there is no optimal direction.")
        raise typer.Exit(NOT_REACHED)
