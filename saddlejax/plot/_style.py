"""The one quiet style of all figures."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Dark enough for print, and told apart by colour-blind readers (Okabe & Ito), with a marker each besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "0.35"  # of words in a figure
DASHES: dict[str, Any] = {"color": "0.45", "linewidth": 1, "linestyle": (0, (4, 3))}  # of laws and bounds


def quiet(ax: Axes | None = None) -> Axes:
    """Axes in the style of all figures here: no frame, a light grid behind the data.

    **Arguments:** `ax`, made anew by default.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax
