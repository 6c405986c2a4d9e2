"""Figures of sweeps: escape times, exponents, the collapse over activations."""

from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from .._check import fail
from ._style import COLOURS, DASHES, MARKERS, quiet


def escape_times(results: xr.Dataset, ax: Axes | None = None, *, activation: str | None = None) -> Axes:
    """Escape time against init scale, one colour for each depth and number of bottleneck layers, with the law's slope.

    Points are seeds, lines their medians, dashes `τ ∝ ε^{−(r−2)}` (`log 1/ε` for `r = 2`) through the smallest scale.

    **Arguments:** `results` of a sweep or scan; `ax`, made anew by default; `activation`, by default the first.
    """
    ax = quiet(ax)
    results = _of_activation(results, activation)
    scale = results.scale.values
    _scale_axis(ax, scale)
    for i, (label, r, times) in enumerate(_curves(results, "log_escape_time")):
        logs = times.transpose("scale", "seed").values / np.log(10)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        middle = _median(logs)
        for j in range(logs.shape[1]):
            ax.plot(scale, logs[:, j], marker, color=colour, markersize=4, alpha=0.45, markeredgewidth=0)
        ax.plot(scale, middle, color=colour, linewidth=1.6, label=label)
        law = _law(scale, int(r), middle)
        if law is not None:
            ax.plot(*law, **DASHES, zorder=1)
    ax.plot(
        [],
        [],
        **DASHES,
        label=r"law: $\varepsilon^{-(r-2)}$, or $\log 1/\varepsilon$",
    )
    ax.set_xlabel(r"init scale $\varepsilon$ of the $r$ bottleneck layers")
    ax.set_ylabel(r"escape time $\log_{10}\tau$  (steps × learning rate)")
    ax.set_title(str(results.activation.values))
    ax.legend(frameon=False)
    return ax


def exponents(results: xr.Dataset, ax: Axes | None = None, *, activation: str | None = None) -> Axes:
    """Local exponent `−d log τ/d log ε` against init scale, with the law's `r − 2` as dashes; bars span the seeds.

    [`saddlejax.escape_scan`][] measures the exponent by differentiating the flow. For the results of
    [`saddlejax.sweep`][] it is the slope between neighbouring scales, drawn at their geometric mean.

    **Arguments:** `results` of a sweep or scan; `ax`, made anew by default; `activation`, by default the first.

    **Raises:** `ValueError` where there is neither an exponent nor a second scale.
    """
    ax = quiet(ax)
    results = _with_exponents(_of_activation(results, activation))
    scale = results.scale.values
    _scale_axis(ax, scale)
    for i, (label, r, exponent) in enumerate(_curves(results, "exponent")):
        values = exponent.transpose("scale", "seed").values
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
                label=label,
            )
        ax.axhline(max(int(r) - 2, 0), **DASHES, zorder=1)
    ax.set_xlabel(r"init scale $\varepsilon$ of the $r$ bottleneck layers")
    ax.set_ylabel(r"$-\mathrm{d}\log\tau/\mathrm{d}\log\varepsilon$")
    return ax


def collapse(results: xr.Dataset, axes: Sequence[Axes] | np.ndarray | None = None) -> Sequence[Axes] | np.ndarray:
    """Escape times of many activations side by side: as they are, and multiplied by their prefactors.

    **Arguments:** `results` of [`saddlejax.collapse`][]; `axes`, two of them, made anew by default.
    """
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), sharey=True, layout="constrained")
    named = ((axes[0], "log_escape_time", r"\tau"), (axes[1], "log_collapsed_time", r"\alpha^{L-1}\,\tau"))
    for ax, variable, symbol in named:
        quiet(ax)
        _scale_axis(ax, results.scale.values)
        for i, name in enumerate(results.activation.values):
            times = results[variable].sel(activation=name) / np.log(10)
            style = ("-", "--", ":")[i // len(COLOURS) % 3]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            ax.plot(results.scale, times, style, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)
        ax.set_xlabel(r"init scale $\varepsilon$")
        ax.set_ylabel(rf"$\log_{{10}}\,{symbol}$")
    axes[0].set_title("raw")
    axes[1].set_title("collapsed")
    axes[1].legend(frameon=False, fontsize="small", ncols=2)
    return axes


def _scale_axis(ax: Axes, scale: np.ndarray) -> None:
    """Small scales on the right. The limits are set first: one scale alone gives Matplotlib none that it can draw."""
    ax.set_xscale("log")
    ax.set_xlim(float(np.max(scale)) * 1.6, float(np.min(scale)) / 1.6)


def _of_activation(results: xr.Dataset, activation: str | None) -> xr.Dataset:
    if "activation" not in results.dims:
        return results
    return results.isel(activation=0) if activation is None else results.sel(activation=activation)


def _with_exponents(results: xr.Dataset) -> xr.Dataset:
    """The results with the exponents that they have, or that the slopes between neighbouring scales are."""
    if "exponent" in results:
        return results
    if "log_escape_time" not in results or results.sizes.get("scale", 1) < 2:
        raise fail(
            "results",
            "have exponents, or escape times at two scales at least",
            f"a dataset of {', '.join(map(str, results.data_vars))} at {results.sizes.get('scale', 1)} scale",
            "Sweep over more scales, or use saddlejax.escape_scan.",
        )
    results = results.sortby("scale", ascending=False)
    logs = np.log(results.scale.values)
    middles = np.exp((logs[1:] + logs[:-1]) / 2)
    steps = xr.DataArray(np.diff(logs), dims="scale", coords={"scale": middles})
    times = results.log_escape_time
    slopes = -times.diff("scale").assign_coords(scale=middles) / steps
    return slopes.to_dataset(name="exponent")


def _curves(results: xr.Dataset, variable: str) -> Iterator[tuple[str, int, xr.DataArray]]:
    """Label, number of small layers and values of every depth and bottleneck; a bottleneck of 0 is all layers."""
    times = results[variable]
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
