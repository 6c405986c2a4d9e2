"""Where a function crosses zero within a step, differentiably."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_EVALUATIONS = 40


@eqx.filter_custom_jvp
def crossing(
    params: Any,
    bracket: tuple[Array, Array],
    values: tuple[Array, Array],
    tolerance: Array,
    *,
    function: Callable[[Any, Array], Array],
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The `s` in a bracket where `function(params, s)` rises through zero, and the evaluations spent.

    Chandrupatla's method: inverse quadratic interpolation where three points show the function to be monotone enough
    for it, else the bracket is halved, so that jumps are located as safely as smooth crossings. Its derivative is that
    of the implicit function theorem, `ds = −(∂f/∂params · d params)/(∂f/∂s)`.

    **Arguments:** `bracket` and the `values` of the function at its ends, the first negative, the second not;
    `tolerance` in `s`.
    """

    def unfinished(carry: tuple) -> Array:
        new, other, *_, evaluations = carry
        return (jnp.abs(other - new) > tolerance) & (evaluations < MAX_EVALUATIONS)

    def step(carry: tuple) -> tuple:
        # The last point, that on the other side of the crossing, and where to go between them.
        x1, x2, f1, f2, share, evaluations = carry
        x = x1 + share * (x2 - x1)
        f = function(params, x)
        same_side = (f < 0) == (f1 < 0)
        x3, f3 = jnp.where(same_side, x1, x2), jnp.where(same_side, f1, f2)
        x2, f2 = jnp.where(same_side, x2, x1), jnp.where(same_side, f2, f1)
        xi, phi = (x - x2) / (x3 - x2), (f - f2) / (f3 - f2)
        quadratic = f / (f2 - f) * f3 / (f2 - f3) + (x3 - x) / (x2 - x) * f / (f3 - f) * f2 / (f3 - f2)
        trusted = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & jnp.isfinite(quadratic)
        return x, x2, f, f2, within(jnp.where(trusted, quadratic, 0.5), x2 - x), evaluations + 1

    def within(share: Array, width: Array) -> Array:
        """Never closer to an end than half a tolerance: a step beyond the crossing closes the bracket."""
        least = jnp.minimum(0.5 * tolerance / jnp.abs(width), 0.5)
        return jnp.clip(share, least, 1 - least)

    (low, high), (f_low, f_high) = bracket, values
    secant = f_low / (f_low - f_high)
    first = within(jnp.where(jnp.isfinite(secant), secant, 0.5), high - low)
    init = (low, high, f_low, f_high, first, jnp.asarray(0))
    x1, x2, f1, _f2, _, evaluations = jax.lax.while_loop(unfinished, step, init)
    return jnp.where(f1 < 0, x2, x1), evaluations


@crossing.def_jvp
def _crossing_jvp(primals: tuple, tangents: tuple, *, function: Callable[[Any, Array], Array]) -> tuple:
    params, bracket, values, tolerance = primals
    s, evaluations = crossing(params, bracket, values, tolerance, function=function)
    slope = jax.jvp(lambda at: function(params, at), (s,), (jnp.ones_like(s),))[1]
    if all(t is None for t in jax.tree.leaves(tangents[0], is_leaf=lambda t: t is None)):
        change = jnp.zeros_like(s)
    else:
        _, change = eqx.filter_jvp(lambda p: function(p, s), (params,), (tangents[0],))
    flat = slope == 0
    ds = jnp.where(flat, 0, -change / jnp.where(flat, 1, slope))
    return (s, evaluations), (ds, None)
