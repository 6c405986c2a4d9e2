"""Figures of escape directions."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes

from .._check import not_traced
from ..networks.network import AbstractNetwork
from ..saddle import EscapeDirection
from ..saddle.low_rank import singular_values as singular_values_of
from ._style import COLOURS, DASHES, GREY, MARKERS, quiet

LOGARITHMIC_BELOW = 1e-2


def singular_values(best: EscapeDirection | AbstractNetwork | Sequence[Array], ax: Axes | None = None) -> Axes:
    """The singular values of every layer but its largest, relative to that, with the line `l^{−1/4}`.

    In the optimal escape direction of a deep ReLU network all of `σ_i/σ_1`, `i ≥ 2`, lie on or below that line, that is
    `σ_1/σ_i ≥ l^{1/4}` (Bantzis, Simon & Jacot, arXiv:2505.21722). Where some are small the axis is logarithmic, down to
    the rounding error of the largest: in a layer of rank one all lie at or below that.

    **Arguments:** `best`, an escape direction, a network, or matrices; `ax`, made anew by default.
    """
    not_traced("plot.singular_values", best=best)
    ax = quiet(ax)
    values = singular_values_of(best.weights if isinstance(best, EscapeDirection) else best)
    layers = np.arange(1, len(values) + 1)
    relative = [np.asarray(layer[1:] / layer[0]) for layer in values]
    fine = np.linspace(0.75, len(values) + 0.25, 100)
    ax.plot(fine, np.maximum(fine, 1) ** -0.25, **DASHES, label="bound $l^{-1/4}$")
    ax.set(
        xlabel="layer $l$", ylabel=r"$\sigma_i / \sigma_1$,  $i \geq 2$", xticks=layers, xlim=(0.6, len(values) + 0.4)
    )
    least = min((float(ratios.min()) for ratios in relative if ratios.size), default=1.0)
    if least < LOGARITHMIC_BELOW:
        rounding = float(np.finfo(values[0].dtype).eps)
        relative = [np.maximum(ratios, rounding / 5) for ratios in relative]
        if least > 30 * rounding:
            ax.set(yscale="log", ylim=(least / 10, 10))
        else:
            ax.set(yscale="log", ylim=(rounding / 30, 10))
            ax.axhspan(rounding / 30, rounding, color="0.93", linewidth=0, zorder=0)
            ax.text(0.65, 2 * rounding, "below: rounding error, rank one", color=GREY, fontsize="small")
    else:
        ax.set_ylim(-0.04, 1.06)
    for layer, ratios in zip(layers, relative, strict=True):
        label = r"$\sigma_i/\sigma_1$" if layer == 1 else None
        style: dict[str, Any] = {"color": COLOURS[0], "markersize": 5, "markeredgewidth": 0, "alpha": 0.6}
        ax.plot(np.full(len(ratios), layer), ratios, MARKERS[0], label=label, **style)
    ax.legend(frameon=False, loc="center right")
    return ax


def speeds(directions: Sequence[EscapeDirection], ax: Axes | None = None) -> Axes:
    """Escape speed against depth: the best found, the best with all layers of rank one, and the upper bound.

    **Arguments:** `directions`, one escape direction a depth; `ax`, made anew by default.
    """
    not_traced("plot.speeds", directions=directions)
    ax = quiet(ax)
    depths = [one.depth for one in directions]
    ax.plot(
        depths, [float(one.upper_bound) for one in directions], **DASHES, marker="_", markersize=9, label="upper bound"
    )
    best, rank_one = ([float(getattr(one, name)) for one in directions] for name in ("speed", "rank_one_speed"))
    ax.plot(depths, best, color=COLOURS[0], marker=MARKERS[0], markersize=5, linewidth=1.2, label="best found")
    ax.plot(depths, rank_one, "x", color=COLOURS[1], markersize=8, label="best of rank one")
    ax.set(xlabel="depth $L$", ylabel="escape speed $s$  (1 / time)", xticks=depths)
    ax.set_ylim(0, 1.25 * max(float(one.upper_bound) for one in directions) or 1)
    ax.legend(frameon=False, loc="lower right")
    return ax


def directions(found: Sequence[EscapeDirection], axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Escape directions over depth: their speeds, and the singular values of the deepest one.

    **Arguments:** `found`, one escape direction a depth; `axes`, two of them, made anew by default.
    """
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    speeds(found, axes[0])
    deepest = max(found, key=lambda one: one.depth)
    singular_values(deepest, axes[1]).set_title(f"$L = {deepest.depth}$")
    return axes
