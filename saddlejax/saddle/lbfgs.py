"""L-BFGS as one JAX loop that ends at a residual or after a number of gradient evaluations."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

MEMORY = 16
_LINE_EVALUATIONS = 20
_CURVATURE = 0.99  # steps that hardly flatten the slope serve: functions with kinks let no step flatten it much


class Descent(NamedTuple):
    """Where a descent ended: the point, the cost, the residual, and the gradient evaluations used."""

    point: Float[Array, " numbers"]
    value: Float[Array, ""]
    residual: Float[Array, ""]
    evaluations: Int[Array, ""]


class _State(NamedTuple):
    point: Array
    value: Array
    slope: Array
    memory: optax.OptState
    evaluations: Array
    stalled: Array


def lbfgs(
    cost: Callable[[Array], Array],
    first: Array,
    residual: Callable[[Array, Array], Array],
    tolerance: Array,
    most: Array,
) -> Descent:
    """Minimise `cost` from `first` until `residual(point, slope) ≤ tolerance`, or for about `most` gradient evaluations.

    A cost of infinity marks points that are out of bounds; nothing starts from one. The last line search may take up to 20
    evaluations more.
    """
    search = optax.scale_by_zoom_linesearch(_LINE_EVALUATIONS, curv_rtol=_CURVATURE, initial_guess_strategy="one")
    solver = optax.lbfgs(memory_size=MEMORY, linesearch=search)

    def unfinished(state: _State) -> Array:
        missed = residual(state.point, state.slope) > tolerance
        return ~state.stalled & missed & (state.evaluations < most)

    def step(state: _State) -> _State:
        update, memory = solver.update(
            state.slope, state.memory, state.point, value=state.value, grad=state.slope, value_fn=cost
        )
        point, line = state.point + update, memory[-1]
        evaluations = state.evaluations + line.info.num_linesearch_steps
        stalled = ~jnp.isfinite(line.value) | jnp.all(point == state.point)
        return _State(point, line.value, line.grad, memory, evaluations, stalled)

    value, slope = jax.value_and_grad(cost)(first)
    start = _State(first, value, slope, solver.init(first), jnp.ones((), int), ~jnp.isfinite(value))
    end = jax.lax.while_loop(unfinished, step, start)
    return Descent(end.point, end.value, residual(end.point, end.slope), end.evaluations)
