"""The main job: how long networks of tiny weights stay on the first plateau."""

from collections import Counter
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated, no_type_check

import matplotlib.pyplot as plt
import typer
import xarray as xr
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from .. import plot, tasks
from .._numerics import power_of_ten
from ..flow import Status
from ..networks.activation_class import value_at_zero
from ..sweeps.scan import NOT_COMPUTED, escape_scan
from ._app import NOT_REACHED, app, complete, console

ESCAPED = Status[Status.escaped]


@app.command(short_help="Escape times from the first plateau, over init scales.")
@no_type_check
def escape(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="'digits'; 'openml' for MNIST by download; a folder or .npz file with MNIST; or an .npz file with arrays "
            "x and y: real y for regression, integer y for classes."
        ),
    ] = "digits",
    samples: Annotated[int | None, typer.Option(min=1, help="Use the first so many samples; by default all.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Size of the hidden layers.")] = 24,
    depth: Annotated[int, typer.Option(min=2, help="Number L of weight matrices.")] = 4,
    activation: Annotated[
        list[str] | None, typer.Option(help="Activation; repeat for several.  [default: tanh, relu]")
    ] = None,
    bottleneck: Annotated[
        list[int] | None,
        typer.Option(help="Number r of small layers; repeat for several.  [default: 2, 3, 4, up to the depth]"),
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
    activations = ["tanh", "relu"] if activation is None else activation
    bottlenecks = [r for r in (2, 3, 4) if r <= depth] if bottleneck is None else bottleneck
    scales = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5] if scale is None else scale
    lanes = len(activations) * len(bottlenecks) * len(scales) * seeds
    latest: list[xr.Dataset] = []
    numbers, figure = out / "escape_times.csv", out / "escape_times.png"

    def computed() -> int:
        return int((latest[0].status != NOT_COMPUTED).sum()) if latest else 0

    def work(bar: Progress) -> None:
        task = tasks.load(data, samples)
        out.mkdir(parents=True, exist_ok=True)
        job = bar.add_task("flows (the first ones compile)", total=lanes)

        def show(results: xr.Dataset) -> None:
            if not latest:
                console.print(f"{task}\nnetworks: depth {depth}, width {width}, {seeds} seeds")
                bar.start()
            latest[:] = [results]
            bar.update(job, completed=computed())

        latest[:] = [
            escape_scan(
                task,
                width=width,
                depth=depth,
                activation=activations,
                bottleneck=bottlenecks,
                scale=scales,
                seed=range(seeds),
                on_lane=show,
            )
        ]

    def report(finished: bool) -> None:
        if not finished:
            kept = f"{computed()} of {lanes} networks are finished and kept" if computed() else "nothing was finished"
            console.print(f"stopped: {kept}. The same command begins anew; saddlejax sweep keeps a store and goes on.")
        if computed() == 0:
            return
        results = latest[0]
        results.to_dataframe().to_csv(numbers)
        _print_table(results)
        _figure(results, figure)
        console.print(f"figure: {figure}\nnumbers: {numbers}", highlight=False)

    complete(context, work, report)
    if (latest[0].status != ESCAPED).any():
        raise typer.Exit(NOT_REACHED)


def _print_table(results: xr.Dataset) -> None:
    """One row a cell of the grid; what does not fit in a column stands below, by a letter."""
    table = Table(
        box=SIMPLE_HEAD,
        title="Escape from the first plateau",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in ("", "r", "ε", "escape time", "exponent", "law", "grads", "GD steps", ""):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    notes: dict[str, str] = {}
    for name in results.activation.values:
        at_saddle = value_at_zero(str(name)) == 0
        for r in results.bottleneck.values:
            for scale in results.scale.values:
                cell = results.sel(activation=name, bottleneck=r, scale=scale)
                texts = _notes(cell, at_saddle=at_saddle)
                letters = [notes.setdefault(text, ascii_lowercase[len(notes) % 26]) for text in texts]
                cells = _cells(cell, int(r), at_saddle=at_saddle)
                table.add_row(str(name), str(r), f"{scale:.2g}", *cells, ", ".join(letters))
            table.add_section()
    console.print(table)
    for note, letter in notes.items():
        console.print(f"{letter}: {note}")
    seeds = (
        "One seed."
        if results.seed.size == 1
        else f"Over {results.seed.size} seeds: medians, and mean ± standard deviation of the exponent."
    )
    console.print(
        f"{seeds} exponent: -dlogτ/dlogε. law: r-2, the exponent as ε → 0 (a logarithm for r = 2). grads: gradients the "
        "measurement took. GD steps: what gradient descent at learning rate 2/λ would need."
    )


def _notes(cell: xr.Dataset, *, at_saddle: bool) -> list[str]:
    """What there is to say of a cell, in sentences."""
    notes = (
        [] if at_saddle else [f"{cell.activation.item()} is not 0 at 0: the origin is no saddle, and no law applies."]
    )
    for status, count in Counter(str(one) for one in cell.status.values if one != ESCAPED).most_common():
        what = "have not been computed" if status == NOT_COMPUTED else f"did not escape: {status}"
        notes.append(f"{count} of {cell.status.size} {what}.")
    return notes


def _cells(cell: xr.Dataset, r: int, *, at_saddle: bool) -> list[str]:
    law = {1: "0", 2: "log"}.get(r, str(r - 2)) if at_saddle else "–"
    escaped = cell.where(cell.status == ESCAPED, drop=True)
    if escaped.seed.size == 0:
        return ["–", "–", law, "–", "–"]
    middle, spread = float(escaped.exponent.mean()), float(escaped.exponent.std())
    digits = ".4f" if max(abs(middle), spread) < 100 else ".0e"  # large where there was no plateau to speak of
    exponent = f"{middle:{digits}}" + (f" ± {spread:{digits}}" if escaped.seed.size > 1 else "")
    return [
        power_of_ten(float(escaped.log_escape_time.median()), digits=3),
        exponent if at_saddle else "–",
        law,
        f"{float(escaped.gradient_evaluations.median()):.0f}",
        power_of_ten(float(escaped.log_descent_steps.median()), digits=1),
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
        if column > 0:
            axes[0, column].set_ylabel("")
            axes[1, column].set_ylabel("")
    figure.suptitle(f"Leaving the first plateau: depth {int(results.depth)}, width {int(results.width)}")
    figure.savefig(path, dpi=160)
    plt.close(figure)
