"""Ascent of the escape speed from many starts: L-BFGS on `log s`, one gradient evaluation a turn of the loop."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..networks import Weights, safe_norm
from .origin import Origin, energy

_MEMORY = 16
_ARMIJO, _WOLFE = 1e-4, 0.9
_LINE_EVALUATIONS = 12
_FIRST_EVALUATIONS = 60  # before kinks that stop the ascent are rounded
_ROUNDINGS = (3e-2, 3e-3, 3e-4)  # lengths over which they are, in units of the inputs' size


class Climb(NamedTuple):
    """Where an ascent ended: unit-norm layers, the speed, the plain residual, and the gradient evaluations used."""

    weights: Weights
    speed: Float[Array, ""]
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


def unit_layers(weights: Weights) -> Weights:
    """Every layer divided by its Frobenius norm."""
    return tuple(w / safe_norm(w) for w in weights)


def random_starts(sizes: tuple[int, ...], starts: int, key: PRNGKeyArray, dtype: jnp.dtype) -> Weights:
    """Gaussian layers of unit norm, a leading axis of starts."""

    def one(key: PRNGKeyArray) -> Weights:
        keys = jax.random.split(key, len(sizes) - 1)
        shapes = zip(keys, sizes[1:], sizes[:-1], strict=True)
        return unit_layers(tuple(jax.random.normal(k, (rows, columns), dtype) for k, rows, columns in shapes))

    return jax.vmap(one)(jax.random.split(key, starts))


@eqx.filter_jit
def climb(starts: Weights, origin: Origin, tolerance: Array, most: Array) -> Climb:
    """Ascend from every start (a leading axis) to the residual `tolerance` or `most` gradient evaluations.

    The starts run one after another on a CPU and together on an accelerator.
    """
    numbers = sum(w[0].size for w in starts)
    together = len(starts[0]) if jax.default_backend() != "cpu" else 1
    together = max(1, min(together, 2**27 // (2 * _MEMORY * numbers)))
    return jax.lax.map(lambda start: _climb_one(start, origin, tolerance, most), starts, batch_size=together)


def _climb_one(start: Weights, origin: Origin, tolerance: Array, most: Array) -> Climb:
    # A start of negative energy becomes one of positive energy by turning the sign of its last layer.
    sign = jnp.where(energy(start, origin) < 0, -1, 1)
    first = _lbfgs((*start[:-1], sign * start[-1]), origin, tolerance, jnp.minimum(most, _FIRST_EVALUATIONS), None)
    lengths = jnp.asarray(_ROUNDINGS, first.speed.dtype) * jnp.sqrt(jnp.mean(jnp.sum(origin.x**2, axis=1)))

    def stage(climbed: Climb, length: Array) -> tuple[Climb, None]:
        left = jnp.where(climbed.residual > tolerance, (most - first.evaluations) // len(_ROUNDINGS), 0)
        following = _lbfgs(climbed.weights, origin, tolerance, left, length)
        return following._replace(evaluations=climbed.evaluations + following.evaluations), None

    rounded = jax.lax.scan(stage, first._replace(evaluations=first.evaluations + 1), lengths)[0]
    speed = energy(rounded.weights, origin)
    exact, slopes = jax.value_and_grad(energy)(rounded.weights, origin)
    misses = [slope - exact * w for slope, w in zip(slopes, rounded.weights, strict=True)]
    residual = jnp.sqrt(sum(jnp.sum(jnp.square(miss)) for miss in misses)) / exact
    done = first.residual <= tolerance
    return jax.tree.map(
        lambda plain, other: jnp.where(done | (first.speed >= speed), plain, other),
        first._replace(evaluations=jnp.where(done, first.evaluations + 1, rounded.evaluations + 1)),
        Climb(rounded.weights, speed, residual, rounded.evaluations + 1),
    )


def _lbfgs(start: Weights, origin: Origin, tolerance: Array, most: Array, rounding: Array | None) -> Climb:
    """L-BFGS on `−log s` of the layers divided by their norms; no evaluation where `most` is zero."""
    first, restore = ravel_pytree(start)

    def cost(point: Array) -> Array:
        value = energy(unit_layers(restore(point)), origin, rounding)
        return jnp.where(value > 0, -jnp.log(jnp.where(value > 0, value, 1)), jnp.inf)

    evaluate = jax.value_and_grad(cost)
    value, slope = evaluate(first)
    size = jnp.linalg.norm(slope)
    nothing = jnp.zeros((_MEMORY, first.size), first.dtype)
    zero, count = jnp.zeros((), first.dtype), jnp.zeros((), int)
    state = _State(
        first, value, slope, -slope, 0.5 / size, zero, zero + jnp.inf, count,
        nothing, nothing, count, count + 1, ~jnp.isfinite(value) | (size == 0),
    )

    def going(s: _State) -> Array:
        return ~s.stalled & (jnp.linalg.norm(s.slope) > tolerance) & (s.evaluations < most)

    def turn(s: _State) -> _State:
        point = s.point + s.step * s.direction
        value, slope = evaluate(point)
        along = jnp.dot(s.slope, s.direction)
        enough = value <= s.value + _ARMIJO * s.step * along
        far = jnp.dot(slope, s.direction) >= _WOLFE * along
        s = s._replace(evaluations=s.evaluations + 1, tried=s.tried + 1)
        accepted = enough & (far | (s.tried >= _LINE_EVALUATIONS))
        return jax.lax.cond(accepted, lambda: _accept(s, point, value, slope), lambda: _rescale(s, enough, value, along))

    end = jax.lax.while_loop(going, turn, state)
    used = jnp.where(most > 0, end.evaluations, 0)
    return Climb(unit_layers(restore(end.point)), jnp.exp(-end.value), jnp.linalg.norm(end.slope), used)


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
    place = s.pairs % _MEMORY
    steps = jnp.where(curved, s.steps.at[place].set(move), s.steps)
    gradients = jnp.where(curved, s.gradients.at[place].set(change), s.gradients)
    pairs = s.pairs + curved
    direction = -_inverse_hessian_times(slope, steps, gradients, pairs)
    downhill = jnp.dot(direction, slope) < 0
    direction = jnp.where(downhill, direction, -slope)
    zero = jnp.zeros_like(s.step)
    return s._replace(
        point=point, value=value, slope=slope, direction=direction, step=zero + 1, low=zero, high=zero + jnp.inf,
        tried=jnp.zeros_like(s.tried), steps=steps, gradients=gradients, pairs=pairs,
    )


def _inverse_hessian_times(vector: Array, steps: Array, gradients: Array, pairs: Array) -> Array:
    """The two-loop recursion of L-BFGS over a ring of `(step, change of gradient)` pairs."""
    newest_first = (pairs - 1 - jnp.arange(_MEMORY)) % _MEMORY
    present = jnp.arange(_MEMORY) < pairs
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
