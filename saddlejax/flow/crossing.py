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

    The Illinois variant of false position, held to halve the bracket wherever that fails to shrink it, so that jumps
    are located as safely as smooth crossings. Its derivative is that of the implicit function theorem,
    `ds = −(∂f/∂params · d params)/(∂f/∂s)`.

    **Arguments:** `bracket` and the `values` of the function at its ends, the first negative, the second not;
    `tolerance` in `s`.
    """

    def unfinished(carry: tuple) -> Array:
        low, high, _, _, evaluations, _ = carry
        return (high - low > tolerance) & (evaluations < MAX_EVALUATIONS)

    def step(carry: tuple) -> tuple:
        low, high, f_low, f_high, evaluations, bisect = carry
        middle = 0.5 * (low + high)
        secant = high - f_high * (high - low) / (f_high - f_low)
        inside = jnp.isfinite(secant) & (secant > low) & (secant < high) & ~bisect
        # A trial half a tolerance beyond the estimate closes the bracket from the other side.
        trial = jnp.where(inside, secant + jnp.where(secant < middle, 0.5, -0.5) * tolerance, middle)
        trial = jnp.where((trial > low) & (trial < high), trial, middle)
        value = function(params, trial)
        below = value < 0
        new = (
            jnp.where(below, trial, low),
            jnp.where(below, high, trial),
            jnp.where(below, value, f_low * 0.5),
            jnp.where(below, f_high * 0.5, value),
        )
        slow = new[1] - new[0] > 0.5 * (high - low)
        return (*new, evaluations + 1, slow & ~bisect)

    init = (*bracket, *values, jnp.asarray(0), jnp.asarray(False))
    _low, high, _f_low, _f_high, evaluations, _ = jax.lax.while_loop(unfinished, step, init)
    return high, evaluations


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
