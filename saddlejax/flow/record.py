"""What is kept along a flow: functions of the state, one row an accepted step or a time asked for."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .. import _check
from .coordinates import Coordinates
from .field import PlateauField
from .state import ClockState


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
        self,
        times: Array | np.ndarray | Sequence[float | int] | None = None,
        *,
        steps: bool = True,
        singular_values: bool = True,
        weights: bool = False,
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


class Row(NamedTuple):
    """One row, or all of them with a leading axis: floating-point numbers alone."""

    log_time: Float[Array, "*rows"]
    loss: Float[Array, "*rows"]
    gradient_norm: Float[Array, "*rows"]
    group_norms: Float[Array, "*rows groups"]
    energy: Float[Array, "*rows"]
    drift: Float[Array, "*rows hidden"]
    sliding: Float[Array, "*rows"]
    singular_values: tuple[Float[Array, "*rows _"] | None, ...] | None
    arrays: tuple[Float[Array, "..."], ...] | None


def row(save: Save, field: PlateauField, state: ClockState) -> Row:
    """The row of a state whose rate is known."""
    here, moving = field.layout.split(state.vector), field.layout.split(state.rate)
    coordinates = here.coordinates
    return Row(
        log_time=field.log_time(state),
        loss=moving.loss,
        gradient_norm=jnp.exp(field.log_gradient_norm(state.vector, state.rate)),
        group_norms=coordinates.norms(),
        energy=here.energy,
        drift=here.drift,
        sliding=state.memory.sliding,
        singular_values=spectra(coordinates) if save.singular_values else None,
        arrays=coordinates.arrays() if save.weights else None,
    )


def where_rows(choice: Bool[Array, " rows"], yes: Row, no: Row) -> Row:
    """Rows of the one or the other, row by row; a single row serves for all."""
    return jax.tree.map(lambda a, b: jnp.where(choice.reshape(-1, *[1] * (b.ndim - 1)), a, b), yes, no)


def spectra(coordinates: Coordinates) -> tuple[Float[Array, " _"] | None, ...]:
    """The singular values of every group as a matrix `(shape[0], rest)`; None for vectors and numbers."""
    found: list[Array | None] = []
    for unit, direction in zip(jnp.exp(coordinates.log_units), coordinates.directions, strict=True):
        if direction.ndim < 2:
            found.append(None)
            continue
        # A step that will be rejected may have led to NaN, of which LAPACK complains.
        finite = jnp.where(jnp.all(jnp.isfinite(direction)), direction, 0)
        found.append(unit * jnp.linalg.svd(finite.reshape(finite.shape[0], -1), compute_uv=False))
    return tuple(found)


def imbalance_residual(rows: Row, first: Float[Array, " hidden"]) -> Float[Array, "rows hidden"]:
    """`Δ(t) − Δ(0) − ∫ rate dt` of the layers of a perceptron, relative to the squared norms of the two concerned."""
    squares = jnp.square(rows.group_norms)
    size = squares[..., 1:] + squares[..., :-1]
    return (jnp.diff(squares) - first - rows.drift) / jnp.where(size == 0, 1, size)
