"""One step of an explicit Runge-Kutta solver in the plateau clock, with the rate at its end."""

from functools import singledispatch
from typing import NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..networks.mlp import AbstractNetwork
from .clock import PlateauField
from .state import FlowState
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
    """A step of `size` from a state whose rate is known; `net` is that of the field. Networks may register their own way.

    Over the step the units grow at the rates that their layers have at its start, so that no stage has to find them.
    """
    del net
    tableau = solver.tableau
    assert isinstance(tableau, dfx.ButcherTableau)
    stages = tableau.num_stages
    y0, shapes, growth = state.vector, state.shapes, rate.coordinates.log_units
    lower = np.zeros((stages, stages))
    for number, row in enumerate(tableau.a_lower, start=1):
        lower[number, :number] = row
    weights, error_weights = jnp.asarray(lower, y0.dtype), jnp.asarray(tableau.b_error, y0.dtype)

    def stage(number: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        moves, _ = carry
        y = y0 + jnp.matmul(weights[number], moves, precision="highest")
        move = size * field.rate(FlowState(y, shapes), growth).vector
        return jax.lax.dynamic_update_index_in_dim(moves, move, number, 0), y

    # The rate at the end of a step is kept, so that the next one starts from it and the loss and the curvature at
    # the end of a step come without another gradient.
    moves = jnp.zeros((stages, y0.size), y0.dtype).at[0].set(size * rate.vector)
    moves, y1 = jax.lax.fori_loop(1, stages, stage, (moves, y0))
    after = FlowState(y1, shapes)
    error = FlowState(jnp.matmul(error_weights, moves, precision="highest"), shapes)
    relative, of_time = jax.lax.stop_gradient(relative_errors(error, after))
    return ExplicitStep(after, _grow_along(after, FlowState(moves[-1] * (1 / size), shapes)), moves, relative, of_time)


def _grow_along(state: FlowState, rate: FlowState) -> FlowState:
    """The same motion, with units that grow as their layers do."""
    here = state.coordinates
    motion = here.along(here.velocity(rate.coordinates))
    return FlowState.of(motion, rate.time, rate.imbalance_drift, rate.loss_integral)
