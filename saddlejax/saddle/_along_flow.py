"""How a network turns to an escape direction, and loses rank, along a flow."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _check
from ..flow.result import Flow
from ..networks.fits import check_perceptron_fits
from ..networks.network import Weights
from ..tasks.task import Task
from .alignment import layer_cosines
from .energy import instantaneous_speed
from .low_rank import low_rank_margin
from .result import EscapeDirection


class AlongFlow(eqx.Module):
    """A flow compared with an escape direction `ρ` of speed `s*`: one row for each row of the flow.

    - `log_times`: `log t`, `(rows,)`.
    - `layer_cosines`: the cosine between `W_l` and the closest equivalent of `ρ_l`, `(rows, L)`; see
      [`saddlejax.saddle.layer_cosines`][].
    - `speed_ratio`: `−𝓛_0(θ̄)/s*`, `(rows,)`, with `θ̄` the network with every layer divided by its norm. At most one
      if `ρ` is optimal, near zero or negative for a random network.
    - `low_rank_margin`: `(σ_1/σ_2)/l^{1/4}`, `(rows, L)`; see [`saddlejax.low_rank_margin`][].

    Rows that the flow did not use are `nan`.
    """

    log_times: Float[Array, " rows"]
    layer_cosines: Float[Array, "rows layers"]
    speed_ratio: Float[Array, " rows"]
    low_rank_margin: Float[Array, "rows layers"]


def along_flow(flow: Flow, task: Task, best: EscapeDirection) -> AlongFlow:
    """Cosines with an escape direction, speed over `s*`, and low-rank margins at every saved row of a flow.

    In the optimal direction of a deep ReLU network `σ_1(W_l)/σ_i(W_l) ≥ l^{1/4}` for `i ≥ 2` (Bantzis, Simon & Jacot,
    arXiv:2505.21722). Gradient flow need not have turned to that direction when it escapes, nor to the best one of
    several; this shows how far it has.

    **Arguments:** `flow`, one flow with its weights, from [`saddlejax.gradient_flow`][] with
    `save=saddlejax.Save(weights=True)`; `task`, the problem it was run on; `best`, an escape direction of as many
    layers (values, not traced ones), from [`saddlejax.escape_direction`][]. Its width may differ.

    **Returns:** an [`saddlejax.saddle.AlongFlow`][].

    **Raises:** `ValueError` for a flow without weights, for a batch of flows (use `jax.vmap`), where the flow, the
    task and the direction do not fit, and for a direction of speed zero, which is none.
    """
    if flow.weights is None:
        raise _check.fail(
            "flow", "hold its weights", "run without them", "Run it with save=saddlejax.Save(weights=True)."
        )
    if flow.losses.ndim != 1:
        raise _check.fail("flow", "be a single one", f"a batch of shape {flow.losses.shape[:-1]}", "Use jax.vmap.")
    net = flow.net
    check_perceptron_fits(net, task)
    layer_cosines(net, best.weights)  # refuses a direction that does not fit
    if _check.is_concrete(best.speed) and not float(best.speed) > 0:
        raise _check.fail(
            "best",
            "be a direction of positive speed",
            f"one of speed {float(best.speed):.6g}",
            "Small weights feel no signal of its task at the leading order of the loss, so there is no direction to "
            "compare with.",
        )

    def row(weights: Weights) -> tuple[Array, Array, Array]:
        here = net.with_weights(weights)
        return layer_cosines(here, best.weights), instantaneous_speed(here, task), low_rank_margin(here)

    cosines, speeds, margins = jax.lax.map(row, flow.weights)
    unused = jnp.isnan(flow.losses)[:, None]
    return AlongFlow(
        log_times=flow.log_times,
        layer_cosines=jnp.where(unused, jnp.nan, cosines),
        speed_ratio=speeds / best.speed,
        low_rank_margin=jnp.where(unused, jnp.nan, margins),
    )
