"""Figures of one flow: an escape, a staircase."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .._check import layer_indices, not_traced
from ..flow import Flow
from ._style import COLOURS, DASHES, GREY, quiet


def flow(flow: Flow, ax: Axes | None = None) -> Axes:
    """Loss against time along a flow, the escape marked where there is one.

    After a long plateau the descent is too short to be seen in `log t`. It is then drawn again, by the steps of the
    integrator, in a corner of the axes.

    **Arguments:** `flow`; `ax`, made anew by default.
    """
    not_traced("plot.flow", flow=flow)
    ax = quiet(ax)
    log_times, losses = np.asarray(flow.log_times) / np.log(10), np.asarray(flow.losses)
    shown = np.isfinite(log_times)
    line: dict[str, Any] = {"color": COLOURS[0], "marker": ".", "linewidth": 1.6}
    ax.plot(log_times[shown], losses[shown], **line)
    escape = float(flow.log_escape_time) / np.log(10)
    if np.isfinite(escape):
        ax.axvline(escape, **DASHES)
        words: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "right",
            "va": "top",
            "rotation": 90,
            "color": GREY,
        }
        ax.annotate("escape", (escape, 0.9), xytext=(-3, 0), xycoords=("data", "axes fraction"), **words)
    if _descent_is_a_moment(log_times[shown], losses[shown]):
        inset = quiet(ax.inset_axes((0.12, 0.13, 0.55, 0.55)))
        inset.plot(np.asarray(flow.steps)[shown], losses[shown], **line)
        inset.tick_params(labelsize="small")
        inset.locator_params(axis="x", integer=True, nbins=6)
        inset.set_xlabel("step of the integrator", fontsize="small")
    ax.set_xlabel(r"time $\log_{10} t$  (steps × learning rate)")
    ax.set_ylabel(r"loss $\mathcal{L}$")
    return ax


def _descent_is_a_moment(log_times: np.ndarray, losses: np.ndarray) -> bool:
    """Whether four fifths of what the loss loses go in less than a twentieth of the axis, at its end."""
    if len(losses) < 3 or losses[-1] >= losses[0]:
        return False
    lost = (losses[0] - losses) / (losses[0] - losses[-1])
    begin = log_times[np.flatnonzero(lost <= 0.1)[-1]]
    return bool(log_times[-1] - begin < 0.05 * (log_times[-1] - log_times[0]))


def staircase(
    flow: Flow, axes: Sequence[Axes] | np.ndarray | None = None, *, layer: int = 0
) -> Sequence[Axes] | np.ndarray:
    """A flow from saddle to saddle: the loss, plateaus shaded and labelled with their rank, and singular values below.

    Singular values that stay below a tenth of the largest are grey. The label is the smallest rank of a layer (see
    [`saddlejax.staircase.plateaus`][]). Time begins at most a factor of ten before the first escape, so that the first
    plateau takes no more than half of the axis.

    **Arguments:** `flow`, with its singular values; `axes`, two of them, made anew by default; `layer`, whose singular
    values to show.
    """
    not_traced("plot.staircase", flow=flow)
    if axes is None:
        _, axes = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
    (layer,) = layer_indices(layer, flow.net.depth)
    found = flow.plateaus()
    times = np.asarray(flow.log_times) / np.log(10)
    shown = np.isfinite(times)
    last = times[shown][-1]
    escapes = [p.log_end / np.log(10) for p in found if np.isfinite(p.log_end)]
    escape = min(escapes[0] if escapes else last, last)
    first = max(escape - min(max(last - escape, 0.05) if len(escapes) > 1 else 1, 1), times[shown][0])
    edge = last + 0.02 * (last - first)
    loss, values = quiet(axes[0]), quiet(axes[1])
    for i, plateau in enumerate(found):
        begin = max(plateau.log_start / np.log(10), first)
        end = min(plateau.log_end / np.log(10), last)
        for ax in (loss, values):
            ax.axvspan(begin, end, color="0.55", alpha=(0.10, 0.22)[i % 2], linewidth=0, zorder=0)
        narrow = end - begin < 0.09 * (edge - first)
        rank = min(plateau.ranks, default="")
        loss.annotate(
            f"{'' if narrow else 'rank '}{rank}",
            (0.5 * (begin + end), plateau.loss),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=GREY,
            fontsize="small",
        )
    loss.plot(times[shown], np.asarray(flow.losses)[shown], color=COLOURS[0], linewidth=1.6)
    assert flow.singular_values is not None
    all_series = np.asarray(flow.singular_values[layer])[shown].T
    for i, series in enumerate(all_series):
        learned = series.max() > 0.1 * all_series.max()
        values.plot(times[shown], series, color=COLOURS[i % len(COLOURS)] if learned else "0.7", linewidth=1.2)
    loss.set_xlim(first, edge)
    loss.set_ylim(0, 1.12 * float(flow.losses[0]))
    loss.set_ylabel(r"loss $\mathcal{L}$")
    values.set_yscale("log")
    values.set_ylabel(f"singular values of layer {layer + 1}")
    values.set_xlabel(r"time $\log_{10} t$  (steps × learning rate)")
    values.set_xlim(first, edge)
    return axes
