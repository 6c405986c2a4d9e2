"""Figures: matplotlib Axes in, Axes out."""

from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from ._check import layer_indices
from .flow import Flow
from .saddle.figures import singular_values as singular_values

# Dark enough for print, and told apart by colour-blind readers (Okabe & Ito), with a marker each besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")


def _quiet(ax: Axes | None) -> Axes:
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def escape_times(results: xr.Dataset, ax: Axes | None = None, *, activation: str | None = None) -> Axes:
    """Escape time against init scale, one colour for each depth and number of bottleneck layers, with the law's slope.

    Points are seeds, lines their medians, dashes `τ ∝ ε^{−(r−2)}` (`log 1/ε` for `r = 2`) through the smallest scale.

    **Arguments:** `results` of a sweep or scan; `ax`, made anew by default; `activation`, by default the first.
    """
    ax = _quiet(ax)
    results = _of_activation(results, activation)
    scale = results.scale.values
    for i, (label, r, times) in enumerate(_curves(results)):
        logs = times.transpose("scale", "seed").values / np.log(10)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        middle = _median(logs)
        for j in range(logs.shape[1]):
            ax.plot(scale, logs[:, j], marker, color=colour, markersize=4, alpha=0.45, markeredgewidth=0)
        ax.plot(scale, middle, color=colour, linewidth=1.6, label=label)
        law = _law(scale, int(r), middle)
        if law is not None:
            ax.plot(*law, color="0.45", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.plot(
        [],
        [],
        color="0.45",
        linewidth=1,
        linestyle=(0, (4, 3)),
        label=r"law: $\varepsilon^{-(r-2)}$, or $\log 1/\varepsilon$",
    )
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.set_xlabel(r"init scale $\varepsilon$ of the $r$ bottleneck layers")
    ax.set_ylabel(r"escape time $\log_{10}\tau$  (steps × learning rate)")
    ax.set_title(str(results.activation.values))
    ax.legend(frameon=False)
    return ax


def exponents(results: xr.Dataset, ax: Axes | None = None, *, activation: str | None = None) -> Axes:
    """Local exponent `−d log τ/d log ε` against init scale, with the law's `r − 2` as dashes; bars span the seeds."""
    ax = _quiet(ax)
    results = _of_activation(results, activation)
    scale = results.scale.values
    for i, r in enumerate(results.bottleneck.values):
        values = results.exponent.sel(bottleneck=r).transpose("scale", "seed").values
        known = np.isfinite(values).any(axis=1)
        if known.any():
            low, middle, high = (
                np.nanmin(values[known], axis=1),
                _median(values[known]),
                np.nanmax(values[known], axis=1),
            )
            ax.errorbar(
                scale[known],
                middle,
                (middle - low, high - middle),
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=f"$r = {r}$",
            )
        ax.axhline(max(int(r) - 2, 0), color="0.45", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.set_xlabel(r"init scale $\varepsilon$ of the $r$ bottleneck layers")
    ax.set_ylabel(r"$-\mathrm{d}\log\tau/\mathrm{d}\log\varepsilon$")
    return ax


def collapse(results: xr.Dataset, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Escape times of many activations side by side: as they are, and multiplied by their prefactors.

    **Arguments:** `results` of [`saddlejax.collapse`][]; `axes`, two of them, made anew by default.
    """
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), sharey=True, layout="constrained")
    named = ((axes[0], "log_escape_time", r"\tau"), (axes[1], "log_collapsed_time", r"\alpha^{L-1}\,\tau"))
    for ax, variable, symbol in named:
        _quiet(ax)
        for i, name in enumerate(results.activation.values):
            times = results[variable].sel(activation=name) / np.log(10)
            style = ("-", "--", ":")[i // len(COLOURS) % 3]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            ax.plot(results.scale, times, style, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)
        ax.set_xscale("log")
        ax.set_xlim(float(results.scale.max()) * 1.6, float(results.scale.min()) / 1.6)
        ax.set_xlabel(r"init scale $\varepsilon$")
        ax.set_ylabel(rf"$\log_{{10}}\,{symbol}$")
    axes[0].set_title("raw")
    axes[1].set_title("collapsed")
    axes[1].legend(frameon=False, fontsize="small", ncols=2)
    return axes


def flow(flow: Flow, ax: Axes | None = None) -> Axes:
    """Loss against time along a flow, the escape marked where there is one."""
    ax = _quiet(ax)
    log_times = np.asarray(flow.log_times) / np.log(10)
    shown = np.isfinite(log_times)
    ax.plot(log_times[shown], np.asarray(flow.losses)[shown], color=COLOURS[0], marker=".", linewidth=1.6)
    escape = float(flow.log_escape_time) / np.log(10)
    if np.isfinite(escape):
        ax.axvline(escape, color="0.45", linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate(
            "escape", (escape, 1), xycoords=("data", "axes fraction"), ha="right", va="top", rotation=90, color="0.35"
        )
    ax.set_xlabel(r"time $\log_{10} t$  (steps × learning rate)")
    ax.set_ylabel(r"loss $\mathcal{L}$")
    return ax


def staircase(flow: Flow, axes: Sequence[Axes] | None = None, *, layer: int = 0) -> Sequence[Axes]:
    """A flow from saddle to saddle: the loss, plateaus shaded and labelled with their rank, and singular values below.

    The label is the smallest rank of a layer (see [`saddlejax.staircase.plateaus`][]). Time begins at most a
    factor of ten before the first escape.

    **Arguments:** `flow`, with its singular values; `axes`, two of them, made anew by default; `layer`, whose singular
    values to show.
    """
    if axes is None:
        _, axes = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
    (layer,) = layer_indices(layer, flow.net.depth)
    found = flow.plateaus()
    times = np.asarray(flow.log_times) / np.log(10)
    shown = np.isfinite(times)
    last = times[shown][-1]
    escapes = [p.log_end / np.log(10) for p in found if np.isfinite(p.log_end)]
    first = max(min(escapes[0] if escapes else last, last) - 1, times[shown][0])
    edge = last + 0.02 * (last - first)
    loss, values = _quiet(axes[0]), _quiet(axes[1])
    for i, plateau in enumerate(found):
        begin = max(plateau.log_start / np.log(10), first)
        end = min(plateau.log_end / np.log(10), last)
        for ax in (loss, values):
            ax.axvspan(begin, end, color="0.55", alpha=(0.10, 0.22)[i % 2], linewidth=0, zorder=0)
        loss.annotate(
            f"rank {plateau.bottleneck_rank[1]}",
            (0.5 * (begin + end), plateau.loss),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color="0.25",
            fontsize="small",
        )
    loss.plot(times[shown], np.asarray(flow.losses)[shown], color=COLOURS[0], linewidth=1.6)
    assert flow.singular_values is not None
    for i, series in enumerate(np.asarray(flow.singular_values[layer])[shown].T):
        values.plot(times[shown], series, color=COLOURS[i % len(COLOURS)], linewidth=1.2)
    loss.set_xlim(first, edge)
    loss.set_ylim(0, 1.12 * float(flow.losses[0]))
    loss.set_ylabel(r"loss $\mathcal{L}$")
    values.set_yscale("log")
    values.set_ylabel(f"singular values of layer {layer + 1}")
    values.set_xlabel(r"time $\log_{10} t$  (steps × learning rate)")
    values.set_xlim(first, edge)
    return axes


def _of_activation(results: xr.Dataset, activation: str | None) -> xr.Dataset:
    if "activation" not in results.dims:
        return results
    return results.isel(activation=0) if activation is None else results.sel(activation=activation)


def _curves(results: xr.Dataset) -> Iterator[tuple[str, int, xr.DataArray]]:
    """Label, number of small layers and times of every depth and bottleneck; a bottleneck of 0 is all layers."""
    times = results.log_escape_time
    for depth in results.depth.values if "depth" in times.dims else [None]:
        for r in results.bottleneck.values:
            chosen = times.sel(bottleneck=r) if depth is None else times.sel(bottleneck=r, depth=depth)
            small = int(r) or int(results.depth if depth is None else depth)
            if np.isfinite(chosen).any():
                names = [f"L = {depth}"] if times.sizes.get("depth", 1) > 1 else []
                names += [f"r = {small}"] if int(r) or not names else []
                yield "$" + ", ".join(names) + "$", small, chosen


def _median(values: np.ndarray) -> np.ndarray:
    """Medians over seeds that escaped; NaN where none did."""
    known = np.isfinite(values).any(axis=1)
    middle = np.full(len(values), np.nan)
    middle[known] = np.nanmedian(values[known], axis=1)
    return middle


def _law(scale: np.ndarray, r: int, middle: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The critical-depth law through the smallest scale at which there is a time."""
    known = np.flatnonzero(np.isfinite(middle))
    if len(known) == 0 or r < 2:
        return None
    anchor = known[np.argmin(scale[known])]
    if r > 2:
        return scale, middle[anchor] + (r - 2) * np.log10(scale[anchor] / scale)
    inside = scale < 1
    times = 10 ** middle[anchor] * np.log(scale[inside]) / np.log(scale[anchor])
    return scale[inside], np.log10(times)
