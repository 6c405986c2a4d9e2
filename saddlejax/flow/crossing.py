"""Where a condition crosses zero within a step: a bracketing root finder for events, as a solver of optimistix."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree


class Bracket(eqx.Module):
    """The last point, one on the other side of the crossing, the values of the function there, and evaluations made."""

    last: Float[Array, ""]
    other: Float[Array, ""]
    f_last: Float[Array, ""]
    f_other: Float[Array, ""]
    evaluations: Int[Array, ""]


class Chandrupatla(optx.AbstractRootFinder):
    """Chandrupatla's method: inverse quadratic interpolation where three points allow it, bisection elsewhere.

    Needs `options=dict(lower=..., upper=...)`, between which the function changes its sign, as events of diffrax give
    them. Jumps are located as safely as smooth crossings. The result is the end of the last bracket that lies after the
    crossing. A function may return several numbers, of which all but one are zero: their sum counts.

    **Arguments:** `rtol`, `atol`: how well the crossing is located.

    Source: Chandrupatla, Advances in Engineering Software 28 (1997).
    """

    rtol: Float[Array, ""] | float
    atol: Float[Array, ""] | float
    norm: ClassVar[Callable[[PyTree], Array]] = optx.max_norm

    def init(
        self, fn: Any, y: Any, args: Any, options: dict[str, Any], f_struct: Any, aux_struct: Any, tags: Any
    ) -> Bracket:
        """The bracket before anything is evaluated."""
        del fn, args, f_struct, aux_struct, tags
        lower, upper = (jnp.asarray(options[end], y.dtype) for end in ("lower", "upper"))
        unknown = jnp.full_like(y, jnp.nan)
        return Bracket(upper, lower, unknown, unknown, jnp.asarray(0))

    def step(
        self, fn: Any, y: Any, args: Any, options: dict[str, Any], state: Bracket, tags: Any
    ) -> tuple[Array, Bracket, Any]:
        """One evaluation, and where to look next."""
        del options, tags
        # The first two evaluations are those at the ends, in whatever place the search was told to begin.
        ends = state.evaluations < 2
        x = jnp.where(ends, state.other, y)
        values, aux = fn(x, args)
        f = jax.tree.reduce(lambda a, b: a + b, values).astype(state.f_last.dtype)
        same = ~ends & ((f < 0) == (state.f_last < 0))
        x3, f3 = jnp.where(same, state.last, state.other), jnp.where(same, state.f_last, state.f_other)
        x2, f2 = jnp.where(same, state.other, state.last), jnp.where(same, state.f_other, state.f_last)
        secant = f / (f - f2)
        xi, phi = (x - x2) / (x3 - x2), (f - f2) / (f3 - f2)
        quadratic = f / (f2 - f) * f3 / (f2 - f3) + (x3 - x) / (x2 - x) * f / (f3 - f) * f2 / (f3 - f2)
        trusted = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & jnp.isfinite(quadratic)
        share = jnp.where(trusted, quadratic, 0.5)
        share = jnp.where(ends & jnp.isfinite(secant), secant, share)
        width = x2 - x
        # Never closer to an end than half the tolerance: a step beyond the crossing closes the bracket.
        least = jnp.minimum(0.5 * self._tolerance(x) / jnp.abs(width), 0.5)
        y = x + jnp.clip(share, least, 1 - least) * width
        return y, Bracket(x, x2, f, f2, state.evaluations + 1), aux

    def terminate(
        self, fn: Any, y: Any, args: Any, options: dict[str, Any], state: Bracket, tags: Any
    ) -> tuple[Bool[Array, ""], Any]:
        """Whether the bracket is closed."""
        del fn, y, args, options, tags
        closed = jnp.abs(state.other - state.last) <= self._tolerance(state.last)
        return (closed | (state.f_last == 0)) & (state.evaluations > 1), optx.RESULTS.successful

    def postprocess(
        self,
        fn: Any,
        y: Any,
        aux: Any,
        args: Any,
        options: dict[str, Any],
        state: Bracket,
        tags: Any,
        result: optx.RESULTS,
    ) -> tuple[Array, Any, dict[str, Any]]:
        """The end of the bracket beyond the crossing."""
        del fn, y, args, options, tags, result
        return jnp.maximum(state.last, state.other), aux, {}

    def _tolerance(self, x: Array) -> Array:
        return self.atol + self.rtol * jnp.abs(x)
