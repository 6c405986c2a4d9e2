"""The escape-time law with its prefactor, in closed form (Rawal & DeWeese, arXiv:2605.01288)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check

ArrayLike = Array | np.ndarray
Numbers = float | int | ArrayLike

_PANELS, _NODES = 128, 8
_EQUAL = 20.0  # e^{-40} is below the rounding of double precision


def escape_time(
    scale: Numbers,
    bottleneck: Any = None,
    speed: Numbers = 1.0,
    *,
    end: Numbers = 1.0,
    layer_norms: Sequence[float | int] | Float[ArrayLike, " bottleneck"] | None = None,
) -> Float[Array, "..."]:
    """The time `τ` that `r` bottleneck layers of norm `ε` take to grow to `end` in a direction of speed `K`.

    For equal norms `dy/dt = K y^{r−1}`, so `τ = (ε^{2−r} − y_1^{2−r}) / ((r−2) K)` for `r ≥ 3`, `log(y_1/ε)/K` for `r = 2`
    and `(y_1 − ε)/K` for `r = 1`. For unequal norms `X_l` the differences `d_l = X_l² − X_1²` are conserved to leading
    order, so `τ = ∫ du / (2K Π_l √(u + d_l))` over `u = X_1²`, `X_1` the smallest (Rawal & DeWeese, arXiv:2605.01288).

    **Arguments:**

    - `scale`: `ε`; any shape.
    - `bottleneck`: `r`: a whole number; for a model of another kind, or for data without a signal, the order of its saddle,
      as [`saddlejax.saddle_order`][] returns it. May be left out where `layer_norms` are given.
    - `speed`: `K`: for a network with gain `α`, whose other layers have norm one and are aligned, `α^{L−1}` times the
      largest singular value of `M = −E[∇c(0, y) xᵀ]`; for ReLU an escape speed of [`saddlejax.escape_direction`][].
    - `end`: `y_1`, the norm (of the smallest layer) at the escape; as `ε → 0` it does not matter for `r ≥ 3`.
    - `layer_norms`: norms of the `r` bottleneck layers at scale one; each starts at `ε` times its own.

    **Returns:** `τ` in the time of `dθ/dt = −∇𝓛` (steps times learning rate), in the shape of `scale`, `speed` and `end`
    together; infinite where it overflows: see [`saddlejax.law.log_escape_time`][].

    **Raises:** `ValueError` for numbers that are not positive, or where the layers start at `end` or above it.
    """
    return jnp.exp(log_escape_time(scale, bottleneck, speed, end=end, layer_norms=layer_norms))


def log_escape_time(
    scale: Numbers,
    bottleneck: Any = None,
    speed: Numbers = 1.0,
    *,
    end: Numbers = 1.0,
    layer_norms: Sequence[float | int] | Float[ArrayLike, " bottleneck"] | None = None,
) -> Float[Array, "..."]:
    """The logarithm of [`saddlejax.escape_time`][], which stays finite where the time overflows.

    Logarithms of plain numbers and NumPy arrays are taken in double precision, so that they may be smaller than JAX's
    default precision can hold: `log_escape_time(1e-50, 8)` is 688.98 in single precision too. Arrays of JAX, traced ones
    included, are taken as they are.
    """
    for name, value in (("scale", scale), ("speed", speed), ("end", end)):
        _check.positive_number(name, value)
    if layer_norms is None and bottleneck is None:
        raise _check.fail("bottleneck", "be given where layer_norms are not", None)
    r = _whole(getattr(bottleneck, "order", bottleneck))
    log_norms = None if layer_norms is None else _log_norms(layer_norms, r)
    log_scale, log_end, log_speed = (_log(value) for value in (scale, end, speed))
    log_start = log_scale if log_norms is None else log_scale + jnp.min(log_norms)
    if _check.is_concrete(log_start, log_end) and np.any(np.asarray(log_start) >= np.asarray(log_end)):
        raise _check.fail(
            "scale",
            "start every bottleneck layer below end",
            scale,
            "At such scales there is no plateau to escape from.",
        )
    if log_norms is not None and not _all_equal(log_norms):
        return _by_quadrature(log_start, log_end, log_norms - jnp.min(log_norms)) - log_speed
    r = r if log_norms is None else log_norms.size
    assert r is not None
    return _log_integral(r - 2, log_start, log_end) - log_speed


def _whole(bottleneck: Any) -> int | None:
    """The order as a plain number: that of a saddle comes as an array, NaN where there is none."""
    if isinstance(bottleneck, jax.Array | np.ndarray | float) and _check.is_concrete(bottleneck):
        value = float(bottleneck)
        bottleneck = int(value) if value.is_integer() else value
    if bottleneck is not None:
        _check.whole_number("bottleneck", bottleneck)
    return bottleneck


def _log(values: Any) -> Array:
    """The logarithm in JAX's default precision; of numbers it is taken in double precision, where they do not underflow."""
    if _check.is_concrete(values):
        return jnp.asarray(np.log(np.asarray(values, np.float64)), float)
    return jnp.log(jnp.asarray(values, float))


def _log_norms(layer_norms: Sequence[float | int] | ArrayLike, bottleneck: int | None) -> Float[Array, " bottleneck"]:
    _check.positive_number("layer_norms", layer_norms)
    shape = np.shape(layer_norms)
    if len(shape) != 1 or shape[0] == 0:
        raise _check.fail("layer_norms", "be a list of at least one norm", f"of shape {shape}")
    if bottleneck is not None and bottleneck != shape[0]:
        raise _check.fail("bottleneck", f"be {shape[0]}, the number of layer_norms, or be left out", bottleneck)
    return _log(layer_norms)


def _all_equal(log_norms: Array) -> bool:
    return _check.is_concrete(log_norms) and bool(np.ptp(np.asarray(log_norms)) == 0)


def _log_integral(power: int, start: Array, end: Array) -> Array:
    """`log ∫ e^{−power s} ds` from `start` to `end`, from the end at which the integrand is largest; `−inf` if they meet."""
    apart = end > start
    span = jnp.where(apart, end - start, 1)
    if power == 0:
        return jnp.where(apart, jnp.log(span), -jnp.inf)
    largest = -power * (start if power > 0 else end)
    return jnp.where(apart, largest + jnp.log(-jnp.expm1(-abs(power) * span)) - np.log(abs(power)), -jnp.inf)


def _by_quadrature(log_start: Array, log_end: Array, log_ratios: Array) -> Array:
    """`log ∫ X_1² ds / Π_l √(X_1² + d_l)` over `s = log X_1`; `log_ratios` are `log ρ_l = log(X_l/X_1)` at the start.

    In `v = s − log X_1(0)` the factors are `√(e^{2v} + ρ_l² − 1)`, in logarithms throughout. By Gauss-Legendre quadrature
    until all layers are equal to rounding, 20 beyond the largest `log ρ_l`, from there in closed form.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    shares = ((np.arange(_PANELS)[:, None] + 0.5 + 0.5 * nodes) / _PANELS).ravel()
    panel_weights = jnp.asarray(np.tile(weights, _PANELS) / (2 * _PANELS))
    span = log_end - log_start
    unequal = jnp.minimum(span, jnp.max(log_ratios) + _EQUAL)
    v = unequal[..., None] * shares
    above = log_ratios > 0
    ratios = jnp.where(above, log_ratios, 1)
    log_excess = jnp.where(above, 2 * ratios + jnp.log(-jnp.expm1(-2 * ratios)), -jnp.inf)
    log_integrand = 2 * v - 0.5 * jnp.sum(jnp.logaddexp(2 * v[..., None], log_excess), axis=-1)
    first = jax.nn.logsumexp(log_integrand, axis=-1, b=panel_weights) + jnp.log(unequal)
    power = log_ratios.size - 2
    return jnp.logaddexp(first, _log_integral(power, unequal, span)) - power * log_start
