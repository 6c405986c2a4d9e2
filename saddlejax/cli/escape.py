"""The main job: how long networks of tiny weights stay on the first plateau."""

from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import typer
import xarray as xr
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .. import plot, tasks
from ..escape_scan import escape_scan
from ..flow.result import power_of_ten
from .app import app, console, fail, progress_bar


@app.command(short_help="Escape times from the first plateau, over init scales.")
def escape(
    data: Annotated[
        str, typer.Option(help="'digits', 'openml' for MNIST by download, or a folder or .npz file with MNIST.")
    ] = "digits",
    samples: Annotated[int | None, typer.Option(min=1, help="Use the first so many samples; by default all.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Size of the hidden layers.")] = 24,
    depth: Annotated[int, typer.Option(min=2, help="Number L of weight matrices.")] = 4,
    activation: Annotated[
        list[str] | None, typer.Option(help="Activation; repeat for several.  [default: tanh, relu]")
    ] = None,
    bottleneck: Annotated[
        list[int] | None, typer.Option(help="Number r of small layers; repeat for several.  [default: 2, 3, 4]")
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(
            help="Init scale ε of the small layers; repeat for several.  [default: 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of random initialisations: seeds 0, 1, …")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("saddlejax-escape"),
) -> None:
    """Measure how long networks of tiny weights stay on the first plateau, and compare with the theory.

    A network of DEPTH weight matrices starts He-normal, its first r layers multiplied by ε. Training stalls near the
    saddle at the origin; the escape is the steepest point of the first descent. The theory says the escape time grows
    like ε^-(r-2) for r ≥ 3 and like log 1/ε for r = 2, whatever the total depth: the local exponent -dlogτ/dlogε,
    computed by differentiating the flow, should tend to r-2.

    The table also says how much work the measurement took (gradients) and how many steps gradient descent would have
    needed for the same escape at the largest learning rate that is stable there (2/λ, λ the top Hessian eigenvalue).

    \b
    Examples:
      saddlejax escape
      saddlejax escape --activation gelu --depth 6 --bottleneck 3 --bottleneck 5
      saddlejax escape --data path/to/mnist --samples 2000 --width 50
    """
    try:
        task = tasks.load(data, samples)
        activations, bottlenecks = activation or ["tanh", "relu"], bottleneck or [2, 3, 4]
        scales = scale or [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
        out.mkdir(parents=True, exist_ok=True)
        console.print(f"{task}\nnetworks: depth {depth}, width {width}, {seeds} seeds")
        lanes = len(activations) * len(bottlenecks) * len(scales) * seeds
        with progress_bar() as bar:
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
        fail(error)
    console.print(_table(results))
    numbers, figure = out / "escape_times.csv", out / "escape_times.png"
    results.to_dataframe().to_csv(numbers)
    _figure(results, figure)
    console.print(f"figure: {figure}\nnumbers: {numbers}", highlight=False)


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
