"""One step of an explicit Runge-Kutta solver in the plateau clock, with the rate at its end."""

from functools import singledispatch
from typing import NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ..networks import AbstractNetwork
from .clock import FlowState, PlateauField
from .stepping import relative_errors


class ExplicitStep(NamedTuple):
    """A step of an explicit solver.

    - `after`, `rate`: the state it leads to and the rate there.
    - `moves`: its length times the rate at every stage.
    - `error`: its error relative to every layer, the largest; `time_error`: that of the time, relative to the time.
    """

    after: FlowState
    rate: FlowState
    moves: Float[Array, "stages state"]
    error: Float[Array, ""]
    time_error: Float[Array, ""]


@singledispatch
def explicit_step(
    net: AbstractNetwork,
    field: PlateauField,
    solver: dfx.AbstractERK,
    state: FlowState,
    rate: FlowState,
    size: Float[Array, ""],
) -> ExplicitStep:
    """A step of `size` from a state whose rate is known; `net` is that of the field. Networks may register their own way."""
    del net
    tableau = solver.tableau
    assert isinstance(tableau, dfx.ButcherTableau)
    stages = tableau.num_stages
    y0, to_state = ravel_pytree(state)
    lower = np.zeros((stages, stages))
    for number, row in enumerate(tableau.a_lower, start=1):
        lower[number, :number] = row
    weights, error_weights = jnp.asarray(lower, y0.dtype), jnp.asarray(tableau.b_error, y0.dtype)

    def stage(number: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        moves, _ = carry
        y = y0 + jnp.matmul(weights[number], moves, precision="highest")
        return moves.at[number].set(size * ravel_pytree(field(0.0, to_state(y), None))[0]), y

    # The rate at the end of a step is kept, so that the next one starts from it and the loss and the curvature at
    # the end of a step come without another gradient.
    moves = jnp.zeros((stages, y0.size), y0.dtype).at[0].set(size * ravel_pytree(rate)[0])
    moves, y1 = jax.lax.fori_loop(1, stages, stage, (moves, y0))
    error = to_state(jnp.matmul(error_weights, moves, precision="highest"))
    after = to_state(y1)
    relative, of_time = jax.lax.stop_gradient(relative_errors(error, after))
    return ExplicitStep(after, to_state(moves[-1] * (1 / size)), moves, relative, of_time)
