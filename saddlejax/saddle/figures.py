"""Figures of escape directions: Axes in, Axes out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array

from ..networks import AbstractNetwork
from .low_rank import singular_values as singular_values_of
from .result import EscapeDirection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"  # Okabe & Ito's palette, safe for colour-blind readers


def singular_values(best: EscapeDirection | AbstractNetwork | Sequence[Array], ax: "Axes | None" = None) -> "Axes":
    """The singular values of every layer but its largest, relative to that, with the line `l^{−1/4}`.

    In the optimal escape direction of a deep ReLU network all of `σ_i/σ_1`, `i ≥ 2`, lie on or below that line, that is
    `σ_1/σ_i ≥ l^{1/4}` (Bantzis, Simon & Jacot, arXiv:2505.21722).

    **Arguments:** `best`, an escape direction, a network, or matrices; `ax`, the axes to draw in, by default new ones.

    **Returns:** the axes.
    """
    axes = _axes(ax)
    values = singular_values_of(best.weights if isinstance(best, EscapeDirection) else best)
    layers = np.arange(1, len(values) + 1)
    for layer, layer_values in zip(layers, values, strict=True):
        relative = np.asarray(layer_values[1:] / layer_values[0])
        label = r"$\sigma_i/\sigma_1$, $i \geq 2$" if layer == 1 else None
        axes.plot(np.full(len(relative), layer), relative, "o", color=_BLUE, alpha=0.6, ms=5, mew=0, label=label)
    fine = np.linspace(1, max(len(values), 2), 100)
    axes.plot(fine, fine**-0.25, "--", color=_ORANGE, lw=1.2, label=r"$l^{-1/4}$")
    axes.set(xlabel="layer $l$", ylabel=r"$\sigma_i / \sigma_1$", ylim=(-0.04, 1.06), xticks=layers)
    return _quiet(axes)


def speeds(directions: Sequence[EscapeDirection], ax: "Axes | None" = None) -> "Axes":
    """Escape speed against depth: the best found, the best with all layers of rank one, and the upper bound.

    **Arguments:** `directions`, one escape direction a depth; `ax`, the axes to draw in, by default new ones.

    **Returns:** the axes.
    """
    axes = _axes(ax)
    depths = [one.depth for one in directions]
    axes.plot(depths, [float(one.upper_bound) for one in directions], "--", color=_GREY, lw=1.2, label="upper bound")
    axes.plot(depths, [float(one.speed) for one in directions], "o-", color=_BLUE, ms=5, lw=1.2, label="best found")
    axes.plot(depths, [float(one.rank_one_speed) for one in directions], "x", color=_ORANGE, ms=6, label="rank one")
    axes.set(xlabel="depth $L$", ylabel="escape speed $s$", xticks=depths)
    axes.set_ylim(bottom=0)
    return _quiet(axes)


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(4.5, 3.2), layout="constrained")[1]


def _quiet(axes: "Axes") -> "Axes":
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes
