"""What is kept along a flow: functions of the state, one row an accepted step or a time asked for."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import _check
from ..networks.mlp import Weights
from .clock import PlateauField
from .state import FlowState


class Save(eqx.Module):
    """What a flow keeps on its way.

    **Arguments:**

    - `times`: increasing positive times `t` at which to keep a row. By default a row is kept at the start, after every
      accepted step and at the end.
    - `steps`: `False` keeps the start and the end only.
    - `singular_values`: whether to keep those of every layer, the default. It costs a decomposition of every layer a row,
      for wide networks more than the flow itself: at width 2,000 a flow takes 53 s with them and 19 s without.
    - `weights`: whether to keep the weights themselves.
    """

    times: Float[Array, " rows"] | None
    steps: bool = eqx.field(static=True)
    singular_values: bool = eqx.field(static=True)
    weights: bool = eqx.field(static=True)

    def __init__(
        self, times: Array | None = None, *, steps: bool = True, singular_values: bool = True, weights: bool = False
    ):
        if times is not None:
            if np.ndim(times) != 1 or np.size(times) == 0:
                raise _check.fail("times", "be a non-empty list of times", f"of shape {np.shape(times)}")
            _check.positive_number("times", times)
            if _check.is_concrete(times) and not np.all(np.diff(np.asarray(times)) > 0):
                raise _check.fail("times", "increase", times)
            times = jnp.asarray(times, dtype=float)
            if not steps:
                raise _check.fail("steps", "be left alone where times are given", steps)
        self.times = times
        self.steps = steps
        self.singular_values = singular_values
        self.weights = weights

    def rows(self, max_steps: int) -> int:
        """The number of rows to make room for."""
        if self.times is not None:
            return self.times.size
        return max_steps + 2 if self.steps else 2


class Row(NamedTuple):
    """One row, or all of them with a leading axis."""

    log_time: Float[Array, "*rows"]
    steps: Int[Array, "*rows"]
    loss: Float[Array, "*rows"]
    gradient_norm: Float[Array, "*rows"]
    layer_norms: Float[Array, "*rows layers"]
    imbalance: Float[Array, "*rows hidden"]
    imbalance_drift: Float[Array, "*rows hidden"]
    singular_values: tuple[Float[Array, "*rows _"], ...] | None
    weights: Weights | None


def row(save: Save, field: PlateauField, state: FlowState, rate: FlowState, steps: Int[Array, ""]) -> Row:
    """The row of a state, whose rate is known, after so many steps."""
    net, coordinates = field.state_net(state), state.coordinates
    norms = coordinates.norms()
    # A step that will be rejected may have led to NaN, of which LAPACK complains.
    directions = [jnp.where(jnp.all(jnp.isfinite(v)), v, 0) for v in coordinates.directions]
    spectra = tuple(
        jnp.exp(u) * jnp.linalg.svd(v, compute_uv=False) for u, v in zip(coordinates.log_units, directions, strict=True)
    )
    return Row(
        log_time=field.log_time(state),
        steps=steps,
        loss=rate.loss_integral,
        gradient_norm=jnp.exp(field.log_gradient_norm(state, rate)),
        layer_norms=norms,
        imbalance=jnp.diff(jnp.square(norms)),
        imbalance_drift=state.imbalance_drift,
        singular_values=spectra if save.singular_values else None,
        weights=tuple(net.weights) if save.weights else None,
    )


def imbalance_residual(rows: Row, first: Float[Array, " hidden"]) -> Float[Array, "rows hidden"]:
    """`Δ(t) − Δ(0) − ∫ rate dt` relative to the squared norms of the two layers concerned."""
    squares = jnp.square(rows.layer_norms)
    size = squares[..., 1:] + squares[..., :-1]
    return (rows.imbalance - first - rows.imbalance_drift) / jnp.where(size == 0, 1, size)


def empty_rows(like: Row, rows: int) -> Row:
    """Room for so many rows, filled with NaN (counts with −1)."""

    def room(a: Array) -> Array:
        fill = jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else -1
        return jnp.full((rows, *a.shape), fill, a.dtype)

    return jax.tree.map(room, like)
