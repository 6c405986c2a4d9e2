"""A convex quadratic problem with bounds on every variable, by an interior point method."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MOST_STEPS = 40
CONVERGED = 4
"""The residual at which the search ends, times the rounding of the slopes."""
RIDGE = 50
"""What is added to the diagonal, times its own rounding."""
NO_VARIABLE = 1e-12
"""Variables whose diagonal is smaller than this part of the largest have no part in the problem."""
MUCH_LESS = 1e-2
"""How much less the conditions of the minimum are violated by a point that is taken for exact."""
TO_BOUND = 0.995
"""The part of the way to the nearest bound that a step goes at most."""


class InteriorPoint(NamedTuple):
    """A point between the bounds 0 and 1, with the multipliers of both.

    - `residual`: how far the conditions of the minimum are from being met.
    """

    x: Float[Array, " n"]
    low: Float[Array, " n"]
    high: Float[Array, " n"]
    residual: Float[Array, ""]
    steps: Int[Array, ""]


def solve_box(matrix: Float[Array, "n n"], linear: Float[Array, " n"], top: Float[Array, " n"]) -> Float[Array, " n"]:
    """The minimum of `½ xᵀKx − cᵀx` over `0 ≤ x ≤ top`, with a positive semidefinite `K`, which may be singular.

    A predictor and corrector method (Mehrotra, SIAM J. Optim. 2, 1992) in variables that run from zero to one. A variable
    whose row vanishes, or whose bound is zero, is zero.
    """
    diagonal = jnp.diagonal(matrix)
    counts = (diagonal > NO_VARIABLE**2 * jnp.max(diagonal)) & (top > 0)
    ends = jnp.where(counts, top, 0)
    scaled = ends[:, None] * matrix * ends[None, :]
    c = jnp.where(counts, linear * ends, 0)
    size = jnp.max(jnp.abs(c))
    size = jnp.where(size > 0, size, 1)
    eps = jnp.finfo(c.dtype).eps
    scaled = scaled / size + jnp.diag(jnp.where(counts, RIDGE * eps * jnp.diagonal(scaled) / size, 1))
    c = jnp.where(counts, c / size, 0.5)
    largest = jnp.maximum(jnp.max(jnp.sum(jnp.abs(scaled), axis=1)), 1)

    def slope(x: Array) -> Array:
        return jnp.matmul(scaled, x, precision="highest") - c

    def gap(x: Array, low: Array, high: Array) -> Array:
        return jnp.mean(x * low + (1 - x) * high) / 2

    def unfinished(at: InteriorPoint) -> Bool[Array, ""]:
        return (at.steps < MOST_STEPS) & (at.residual > CONVERGED * eps)

    def once_more(at: InteriorPoint) -> InteriorPoint:
        x, low, high, up = at.x, at.low, at.high, 1 - at.x
        factors = jax.scipy.linalg.lu_factor(scaled + jnp.diag(low / x + high / up))
        g = slope(x)

        def direction(at_low: Array, at_high: Array) -> tuple[Array, Array, Array]:
            dx = jax.scipy.linalg.lu_solve(factors, at_low / x - at_high / up - g)
            return dx, (at_low - low * dx) / x - low, (at_high + high * dx) / up - high

        def longest(dx: Array, dlow: Array, dhigh: Array) -> Array:
            room = [
                jnp.where(d < 0, -v / jnp.where(d < 0, d, 1), jnp.inf)
                for v, d in ((x, dx), (up, -dx), (low, dlow), (high, dhigh))
            ]
            return jnp.minimum(1, TO_BOUND * jnp.min(jnp.stack(room)))

        dx, dlow, dhigh = direction(jnp.zeros_like(x), jnp.zeros_like(x))
        share = longest(dx, dlow, dhigh)
        now = gap(x, low, high)
        aim = now * (gap(x + share * dx, low + share * dlow, high + share * dhigh) / now) ** 3
        step = direction(aim - dx * dlow, aim + dx * dhigh)
        share = longest(*step)
        x, low, high = (v + share * d for v, d in zip((x, low, high), step, strict=True))
        products = jnp.max(jnp.maximum(x * low, (1 - x) * high))
        residual = jnp.maximum(products, jnp.max(jnp.abs(slope(x) - low + high)) / largest)
        new = InteriorPoint(x, low, high, residual, at.steps + 1)
        # Beyond what rounding allows, the point before is the best there is.
        sound, last = jnp.isfinite(residual), at._replace(steps=jnp.asarray(MOST_STEPS))
        return jax.tree.map(lambda new, last: jnp.where(sound, new, last), new, last)

    x = jnp.full_like(c, 0.5)
    g = slope(x)
    low, high = jnp.maximum(g, 0) + 1, jnp.maximum(-g, 0) + 1
    start = InteriorPoint(x, low, high, jnp.full_like(size, jnp.inf), jnp.asarray(0))
    found = jax.lax.while_loop(unfinished, once_more, start)
    # At a bound are those that the multiplier would take there.
    across = jnp.diagonal(scaled)
    x = jnp.where(found.low > across * found.x, 0, jnp.where(found.high > across * (1 - found.x), 1, found.x))
    # Where the slope vanishes at a bound too, the search comes there only as the root of the gap: once more for all in between.
    free = (x > 0) & (x < 1)
    ridge = jnp.where(free, jnp.sqrt(eps) * across, 1)
    among = jnp.where(free[:, None] & free[None, :], scaled, 0) + jnp.diag(ridge)
    exact = jnp.clip(x - jnp.linalg.solve(among, jnp.where(free, slope(x), 0)), 0, 1)
    better = _violation(exact, slope(exact)) < MUCH_LESS * _violation(x, slope(x))
    return jnp.where(better, exact, x) * ends


def _violation(x: Float[Array, " n"], slope: Float[Array, " n"]) -> Float[Array, ""]:
    """How far a point between 0 and 1 is from being stationary: the largest step down the slope that the bounds allow."""
    return jnp.max(jnp.abs(jnp.clip(x - slope, 0, 1) - x))
