"""How fast the signal energy grows along a flow, against the bound that gives the escape-time law."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _check
from ..flow import Flow
from ..networks.fits import check_perceptron_fits, match_precision
from ..networks.network import AbstractNetwork, Weights
from ..objective import task_loss
from ..tasks.task import Task
from .energy import signal_energy


class SignalGrowth(NamedTuple):
    """Row by row of a flow, `(rows,)` each.

    - `energy`: `γ = −E⟨∇c(0, y), f(x)⟩`.
    - `rate`: `dγ/dt = −⟨∂γ/∂θ, ∂𝓛/∂θ⟩` along the flow.
    - `leading_rate`: `Σ_l ‖∂γ/∂W_l‖²`, what it is while the outputs are small.
    - `constant`: `dγ/dt / γ^{2−2/r}`, taken in logarithms, so that it is right where the rates underflow; NaN where `γ`
      is not positive or has itself underflown.
    """

    energy: Float[Array, " rows"]
    rate: Float[Array, " rows"]
    leading_rate: Float[Array, " rows"]
    constant: Float[Array, " rows"]


def signal_growth(flow: Flow, task: Task, bottleneck: int) -> SignalGrowth:
    """The signal energy along a flow and the constant `c` of `dγ/dt ≥ c γ^{2−2/r}` at every row.

    While the loss is on its first plateau such a constant exists for a network with `r` bottleneck layers, and with
    `γ(0) ∝ ε^r` the bound gives an escape time of at most order `ε^{−(r−2)}` (Rawal & DeWeese, arXiv:2605.01288). The
    smallest `constant` over the rows of the plateau (say, with a loss above 99 % of the first) that have positive energy is
    the constant found. At the very start a network may have negative energy, which grows just as well.

    **Arguments:** `flow`, with its weights (`save=saddlejax.Save(weights=True)`); its `task`; `bottleneck`, `r`.

    **Raises:** `ValueError` for a flow without weights.
    """
    _check.whole_number("bottleneck", bottleneck)
    if not isinstance(flow, Flow):
        raise _check.fail("flow", "be a saddlejax.Flow", type(flow).__name__)
    if flow.weights is None:
        raise _check.fail("flow", "have kept its weights", "one without", "Pass save=saddlejax.Save(weights=True).")
    check_perceptron_fits(flow.net, task)
    if bottleneck > flow.net.depth:
        raise _check.fail("bottleneck", f"be at most the depth, {flow.net.depth}", bottleneck)
    net, task = match_precision(flow.net, task)

    power = 2 - 2 / bottleneck

    def at(weights: Weights) -> tuple[Array, Array, Array, Array]:
        here: AbstractNetwork = net.with_weights(weights)
        energy, pulls = jax.value_and_grad(lambda w: signal_energy(here.with_weights(w), task))(here.weights)
        slopes = jax.grad(lambda w: task_loss(here.with_weights(w), task))(here.weights)
        # Both are of order ε^{r−1}, so that their products may underflow where the constant does not.
        pull, pull_unit = _unit(pulls)
        slope, slope_unit = _unit(slopes)
        overlap = -jnp.vdot(pull, slope, precision="highest")
        square = jnp.vdot(pull, pull, precision="highest")
        log_units = jnp.log(pull_unit) + jnp.log(slope_unit)
        log_energy = jnp.log(jnp.where(energy > 0, energy, 1))
        constant = jnp.where(energy > 0, overlap * jnp.exp(log_units - power * log_energy), jnp.nan)
        return energy, overlap * pull_unit * slope_unit, square * jnp.square(pull_unit), constant

    return SignalGrowth(*jax.lax.map(at, flow.weights))


def _unit(arrays: Weights) -> tuple[Array, Array]:
    """All entries in units of the largest, and that unit; 1 where all are zero."""
    entries = jnp.concatenate([jnp.ravel(a) for a in arrays])
    largest = jnp.max(jnp.abs(entries))
    unit = jnp.where(largest > 0, largest, 1)
    return entries / unit, unit
