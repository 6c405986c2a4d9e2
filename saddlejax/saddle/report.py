"""Escape directions over depth, as records and as a table."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import PRNGKeyArray

from .. import _check
from ..networks.activations import Activation, activation_name
from ..tasks.task import Task
from .direction import perceptron_direction
from .low_rank import low_rank_margin
from .result import EscapeDirection
from .settle import RANDOM

if TYPE_CHECKING:
    from rich.table import Table


def directions_over_depth(
    task: Task,
    depths: Sequence[int],
    *,
    width: int,
    activation: str | Activation = "relu",
    starts: int = 16,
    key: PRNGKeyArray,
    progress: Callable[[EscapeDirection], Any] | None = None,
) -> list[EscapeDirection]:
    """The best escape direction for every depth, hidden layers of equal width.

    **Arguments:** as for [`saddlejax.escape_direction`][]; `depths`, numbers of layers, two or more; `progress`, called
    with each direction as it is found.

    **Raises:** `ValueError` for depths below two, and what [`saddlejax.escape_direction`][] raises.
    """
    _check.whole_number("width", width)
    found = []
    for position, depth in enumerate(depths):
        _check.whole_number(f"depths[{position}]", depth, least=2)
        sizes = [task.in_size, *[width] * (depth - 1), task.out_size]
        found.append(perceptron_direction(task, tuple(sizes), activation, starts, key))
        if progress is not None:
            progress(found[-1])
    return found


def record(best: EscapeDirection) -> dict[str, Any]:
    """The main results of an escape direction as plain numbers, for JSON."""
    random = np.asarray(best.start_kinds) == RANDOM
    work = np.asarray(best.gradient_evaluations)[random]
    return {
        "depth": best.depth,
        "activation": activation_name(best.activation),
        "speed": float(best.speed),
        "rank_one_speed": float(best.rank_one_speed),
        "upper_bound": float(best.upper_bound),
        "proven_bound": float(best.proven_bound),
        "relative_gap": float(best.relative_gap),
        "residual": float(best.residual),
        "residual_kind": best.residual_kind,
        "kinks": int(best.kinks),
        "optima": [one._asdict() for one in best.optima],
        "rank_one_optima": [one._asdict() for one in best.rank_one_optima],
        "median_gradient_evaluations": float(np.median(work)) if work.size else 0.0,
        "low_rank_margin": [float(margin) for margin in low_rank_margin(best.weights)],
        "singular_values": [[float(value) for value in values[:8]] for values in best.singular_values],
    }


def directions_table(directions: Sequence[EscapeDirection]) -> "Table":
    """A rich table with one row a depth: speeds, bound, residual, optima, and the smallest margin over `l^{1/4}`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD, title="Optimal escape directions", title_justify="left", pad_edge=False, collapse_padding=True
    )
    for column in ("L", "speed", "rank one", "bound", "residual", "kinks", "margin", "optima"):
        table.add_column(column, justify="right", no_wrap=True)
    for best in directions:
        kept = record(best)
        table.add_row(
            str(best.depth),
            f"{kept['speed']:.9f}",
            f"{kept['rank_one_speed']:.9f}",
            f"{kept['upper_bound']:.9f}",
            f"{kept['residual']:.0e}" if kept["speed"] > 0 else "–",
            str(kept["kinks"]),
            _margin(min(kept["low_rank_margin"])) if kept["speed"] > 0 else "–",
            str(len(kept["optima"])),
        )
    table.caption = (
        "bound: no speed can exceed it. residual: of stationarity, relative to the speed. kinks: (sample, neuron) pairs "
        "on a kink. margin: least (σ1/σ2)/l^¼ over the layers. optima: distinct local optima that the starts found. "
        "A speed of zero is no escape direction: the leading order of the loss falls in none that was found."
    )
    table.caption_justify = "left"
    return table


def _margin(value: float) -> str:
    # Layers of exact rank one have a second singular value of zero or of rounding size.
    return "rank one" if value > 1e9 else f"{value:.4g}"
