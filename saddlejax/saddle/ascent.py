"""Ascent of the escape speed from many starts: L-BFGS on `log s`, with kinks rounded where they stop it."""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._numerics import safe_norm
from ..networks.network import Weights
from .lbfgs import MEMORY, lbfgs
from .origin import Origin, energy

_BATCH_NUMBERS = 2**27  # in the memories of all starts that run together
_FIRST_EVALUATIONS = 60  # before kinks that stop the ascent are rounded
_ROUNDINGS = (3e-2, 3e-3, 3e-4)  # lengths over which they are, in units of the inputs' size


StartWeights = tuple[Float[Array, "starts _ _"], ...]


class Climb(NamedTuple):
    """Where an ascent ended: unit-norm layers, the speed, the plain residual, and the gradient evaluations used."""

    weights: Weights
    speed: Float[Array, ""]
    residual: Float[Array, ""]
    evaluations: Int[Array, ""]


def unit_layers(weights: Weights) -> Weights:
    """Every layer divided by its Frobenius norm; a layer of zeros stays zero."""
    norms = [safe_norm(w) for w in weights]
    return tuple(w / jnp.where(norm > 0, norm, 1) for w, norm in zip(weights, norms, strict=True))


@partial(jax.jit, static_argnums=(0, 1, 3))
def random_starts(sizes: tuple[int, ...], starts: int, key: PRNGKeyArray, dtype: jnp.dtype) -> StartWeights:
    """Gaussian layers of unit norm, a leading axis of starts."""

    def one(key: PRNGKeyArray) -> Weights:
        keys = jax.random.split(key, len(sizes) - 1)
        shapes = zip(keys, sizes[1:], sizes[:-1], strict=True)
        return unit_layers(tuple(jax.random.normal(k, (rows, columns), dtype) for k, rows, columns in shapes))

    return jax.vmap(one)(jax.random.split(key, starts))


@eqx.filter_jit
def climb(starts: StartWeights, origin: Origin, tolerance: Array, most: Array) -> Climb:
    """Ascend from every start (a leading axis) to the residual `tolerance` or `most` gradient evaluations.

    The starts run one after another on a CPU and together on an accelerator.
    """
    numbers = sum(w[0].size for w in starts)
    together = 1 if jax.default_backend() == "cpu" else max(1, _BATCH_NUMBERS // (2 * MEMORY * numbers))
    batch = None if together == 1 else together  # a batch of one would be mapped over all the same
    return jax.lax.map(lambda start: _climb_one(start, origin, tolerance, most), starts, batch_size=batch)


def _climb_one(start: Weights, origin: Origin, tolerance: Array, most: Array) -> Climb:
    # A start of negative energy becomes one of positive energy by turning the sign of its last layer.
    sign = jnp.where(energy(start, origin) < 0, -1, 1)
    first = _ascend((*start[:-1], sign * start[-1]), origin, tolerance, jnp.minimum(most, _FIRST_EVALUATIONS), None)
    first = first._replace(evaluations=first.evaluations + 1)
    done = first.residual <= tolerance
    share = jnp.where(done, 0, (most - first.evaluations) // len(_ROUNDINGS))  # a batch runs both sides of a cond
    lengths = jnp.asarray(_ROUNDINGS, first.speed.dtype) * jnp.sqrt(jnp.mean(jnp.sum(origin.x**2, axis=1)))

    def stage(climbed: Climb, length: Array) -> tuple[Climb, None]:
        def further() -> Climb:
            following = _ascend(climbed.weights, origin, tolerance, share, length)
            return following._replace(evaluations=climbed.evaluations + following.evaluations)

        return jax.lax.cond(done, lambda: climbed, further), None

    rounded = jax.lax.scan(stage, first, lengths)[0]
    speed, slopes = jax.value_and_grad(energy)(rounded.weights, origin)
    misses = [slope - speed * w for slope, w in zip(slopes, rounded.weights, strict=True)]
    residual = jnp.sqrt(sum(jnp.sum(jnp.square(miss)) for miss in misses)) / speed
    after = Climb(rounded.weights, speed, residual, rounded.evaluations + 1)
    better = ~done & (speed > first.speed)
    chosen = jax.tree.map(lambda a, b: jnp.where(better, a, b), after, first)
    return chosen._replace(evaluations=jnp.where(done, first.evaluations, after.evaluations))


def _ascend(start: Weights, origin: Origin, tolerance: Array, most: Array, rounding: Array | None) -> Climb:
    """L-BFGS on `−log s` of the layers divided by their norms."""
    first, restore = ravel_pytree(start)

    def cost(point: Array) -> Array:
        value = energy(unit_layers(restore(point)), origin, rounding)
        return jnp.where(value > 0, -jnp.log(jnp.where(value > 0, value, 1)), jnp.inf)

    def residual(point: Array, slope: Array) -> Array:
        # Steps lengthen the layers; at unit norm the gradient of a layer is as much longer.
        layers = zip(restore(point), restore(slope), strict=True)
        return safe_norm(jnp.stack([safe_norm(w) * safe_norm(g) for w, g in layers]))

    end = lbfgs(cost, first, residual, tolerance, most)
    return Climb(unit_layers(restore(end.point)), jnp.exp(-end.value), end.residual, end.evaluations)
