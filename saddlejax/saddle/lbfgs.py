"""L-BFGS with a weak Wolfe line search as one JAX loop, one gradient evaluation per iteration.

The weak Wolfe conditions, bracketed by bisection, keep quasi-Newton methods moving on functions with kinks
(Lewis & Overton, *Nonsmooth optimization via quasi-Newton methods*, Math. Program. 141, 2013).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MEMORY = 16
_ARMIJO, _WOLFE = 1e-4, 0.99
_LINE_EVALUATIONS = 12


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
    direction: Array
    step: Array
    low: Array
    high: Array
    tried: Array
    steps: Array
    gradients: Array
    pairs: Array
    evaluations: Array
    stalled: Array


def lbfgs(
    cost: Callable[[Array], Array],
    first: Array,
    residual: Callable[[Array, Array], Array],
    tolerance: Array,
    most: Array,
) -> Descent:
    """Minimise `cost` from `first` until `residual(point, slope) ≤ tolerance`, or for `most` gradient evaluations.

    A cost of infinity marks points that are out of bounds; nothing starts from one.
    """
    evaluate = jax.value_and_grad(cost)
    nothing = jnp.zeros((MEMORY, first.size), first.dtype)
    flat, zero, count = jnp.zeros_like(first), jnp.zeros((), first.dtype), jnp.zeros((), int)
    # The first turn evaluates at the start: a step of no length, from a cost of infinity.
    state = _State(
        first,
        zero + jnp.inf,
        flat,
        flat,
        zero,
        zero,
        zero + jnp.inf,
        count,
        nothing,
        nothing,
        count,
        count,
        jnp.zeros((), bool),
    )

    def going(s: _State) -> Array:
        unknown = (s.evaluations == 0) | (residual(s.point, s.slope) > tolerance)
        return ~s.stalled & unknown & (s.evaluations < most)

    def turn(s: _State) -> _State:
        point = s.point + s.step * s.direction
        value, slope = evaluate(point)
        along = jnp.dot(s.slope, s.direction)
        enough = value <= s.value + _ARMIJO * s.step * along
        far = jnp.dot(slope, s.direction) >= _WOLFE * along
        s = s._replace(evaluations=s.evaluations + 1, tried=s.tried + 1)
        accepted = enough & (far | (s.tried >= _LINE_EVALUATIONS))
        return jax.lax.cond(
            accepted, lambda: _accept(s, point, value, slope), lambda: _rescale(s, enough, value, along)
        )

    end = jax.lax.while_loop(going, turn, state)
    return Descent(end.point, end.value, residual(end.point, end.slope), end.evaluations)


def _rescale(s: _State, enough: Array, value: Array, along: Array) -> _State:
    """Another step length on the same line: bracket the weak Wolfe conditions."""
    low, high = jnp.where(enough, s.step, s.low), jnp.where(enough, s.high, s.step)
    # Too long: the minimum of the parabola through value, slope and trial, kept well inside the bracket.
    curve = value - s.value - along * s.step
    parabola = jnp.where(jnp.isfinite(curve) & (curve > 0), -along * s.step**2 / (2 * curve), 0)
    width = high - low
    inside = jnp.clip(parabola, low + 0.2 * width, low + 0.6 * width)
    middle = jnp.where(jnp.isfinite(high), jnp.where(enough, low + 0.5 * width, inside), 2 * s.step)
    return s._replace(low=low, high=high, step=middle, stalled=s.tried >= 2 * _LINE_EVALUATIONS)


def _accept(s: _State, point: Array, value: Array, slope: Array) -> _State:
    move, change = point - s.point, slope - s.slope
    curved = jnp.dot(move, change) > 1e-12 * jnp.dot(change, change)
    place = s.pairs % MEMORY
    steps = jnp.where(curved, s.steps.at[place].set(move), s.steps)
    gradients = jnp.where(curved, s.gradients.at[place].set(change), s.gradients)
    pairs = s.pairs + curved
    direction = -_inverse_hessian_times(slope, steps, gradients, pairs)
    downhill = jnp.dot(direction, slope) < 0
    direction = jnp.where(downhill, direction, -slope)
    zero = jnp.zeros_like(s.step)
    step = jnp.where(pairs == 0, 0.5 / jnp.linalg.norm(slope), 1)  # relative to layers of unit norm
    return s._replace(
        point=point,
        value=value,
        slope=slope,
        direction=direction,
        step=step,
        stalled=~jnp.isfinite(value + step),
        low=zero,
        high=zero + jnp.inf,
        tried=jnp.zeros_like(s.tried),
        steps=steps,
        gradients=gradients,
        pairs=pairs,
    )


def _inverse_hessian_times(vector: Array, steps: Array, gradients: Array, pairs: Array) -> Array:
    """The two-loop recursion of L-BFGS over a ring of `(step, change of gradient)` pairs."""
    newest_first = (pairs - 1 - jnp.arange(MEMORY)) % MEMORY
    present = jnp.arange(MEMORY) < pairs
    products = jnp.sum(steps * gradients, axis=1)
    weights = jnp.where(products > 0, 1 / jnp.where(products > 0, products, 1), 0)

    def back(q: Array, item: tuple[Array, Array]) -> tuple[Array, Array]:
        index, there = item
        a = jnp.where(there, weights[index] * jnp.dot(steps[index], q), 0)
        return q - a * gradients[index], a

    q, coefficients = jax.lax.scan(back, vector, (newest_first, present))
    newest = newest_first[0]
    square = jnp.dot(gradients[newest], gradients[newest])
    q = q * jnp.where(pairs > 0, products[newest] / jnp.where(square > 0, square, 1), 1)

    def forth(q: Array, item: tuple[Array, Array, Array]) -> tuple[Array, None]:
        index, there, a = item
        b = jnp.where(there, weights[index] * jnp.dot(gradients[index], q), 0)
        return q + steps[index] * (a - b), None

    return jax.lax.scan(forth, q, (newest_first[::-1], present[::-1], coefficients[::-1]))[0]
