"""The escape-time law with its prefactor, in closed form (Rawal & DeWeese, arXiv:2605.01288)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _check

_PANELS, _NODES = 64, 8


def escape_time(
    scale: float | Array,
    bottleneck: int | None = None,
    speed: float | Array = 1.0,
    *,
    end: float | Array = 1.0,
    layer_norms: Sequence[float] | Float[Array, " bottleneck"] | None = None,
) -> Float[Array, "..."]:
    """The time `τ` that `r` bottleneck layers of norm `ε` take to grow to `end` in a direction of speed `K`.

    For equal norms `dy/dt = K y^{r−1}`, so `τ = (ε^{2−r} − y_1^{2−r}) / ((r−2) K)` for `r ≥ 3`, `log(y_1/ε)/K` for `r = 2`
    and `(y_1 − ε)/K` for `r = 1`. For unequal norms `X_l` the differences `d_l = X_l² − X_1²` are conserved to leading
    order, so `τ = ∫ du / (2K Π_l √(u + d_l))` over `u = X_1²`, `X_1` the smallest (Rawal & DeWeese, arXiv:2605.01288).

    **Arguments:**

    - `scale`: `ε`; any shape.
    - `bottleneck`: `r`; may be left out where `layer_norms` are given.
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
    scale: float | Array,
    bottleneck: int | None = None,
    speed: float | Array = 1.0,
    *,
    end: float | Array = 1.0,
    layer_norms: Sequence[float] | Float[Array, " bottleneck"] | None = None,
) -> Float[Array, "..."]:
    """The logarithm of [`saddlejax.escape_time`][], which stays finite where the time overflows."""
    for name, value in (("scale", scale), ("speed", speed), ("end", end)):
        _check.positive_number(name, value)
    norms = None if layer_norms is None else _checked_norms(layer_norms, bottleneck)
    if norms is None:
        if bottleneck is None:
            raise _check.fail("bottleneck", "be given where layer_norms are not", None)
        _check.whole_number("bottleneck", bottleneck)
    log_start, log_end, log_speed = (jnp.log(jnp.asarray(value, float)) for value in (scale, end, speed))
    if norms is not None:
        log_start = log_start + jnp.log(jnp.min(norms))
    if _check.is_concrete(log_start, log_end) and np.any(np.asarray(log_start) >= np.asarray(log_end)):
        raise _check.fail(
            "scale",
            "start every bottleneck layer below end",
            scale,
            "At such scales there is no plateau to escape from.",
        )
    if norms is not None and not _all_equal(norms):
        return _by_quadrature(log_start, log_end, norms / jnp.min(norms)) - log_speed
    r = norms.size if norms is not None else bottleneck
    assert r is not None
    if r == 2:
        return jnp.log(log_end - log_start) - log_speed
    # ∫ y^{1−r} dy from the end at which the integrand is largest.
    power = r - 2
    span = jnp.log(-jnp.expm1(-abs(power) * (log_end - log_start)))
    largest = -power * (log_start if power > 0 else log_end)
    return largest + span - jnp.log(abs(power)) - log_speed


def _checked_norms(layer_norms: Sequence[float] | Array, bottleneck: int | None) -> Array:
    _check.positive_number("layer_norms", layer_norms)
    norms = jnp.asarray(layer_norms, float)
    if norms.ndim != 1 or norms.size == 0:
        raise _check.fail("layer_norms", "be a list of at least one norm", f"of shape {norms.shape}")
    if bottleneck is not None and bottleneck != norms.size:
        raise _check.fail("bottleneck", f"be {norms.size}, the number of layer_norms, or be left out", bottleneck)
    return norms


def _all_equal(norms: Array) -> bool:
    return _check.is_concrete(norms) and bool(np.ptp(np.asarray(norms)) == 0)


def _by_quadrature(log_start: Array, log_end: Array, ratios: Array) -> Array:
    """`log ∫ X_1² ds / Π_l √(X_1² + d_l)` over `s = log X_1`, Gauss-Legendre on 64 panels."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    shares = ((np.arange(_PANELS)[:, None] + 0.5 + 0.5 * nodes) / _PANELS).ravel()
    panel_weights = np.tile(weights, _PANELS) / (2 * _PANELS)
    span = log_end - log_start
    s = log_start[..., None] + span[..., None] * shares
    # log √(X_1² + d_l) with d_l = x_1² (ρ_l² − 1): relative to the start x_1, grown by a factor e^{s − log x_1}.
    grown = 2 * (s - log_start[..., None])
    excess = jnp.square(ratios) - 1
    logs = 0.5 * jnp.log(jnp.exp(grown)[..., None] + excess) + log_start[..., None, None]
    log_integrand = 2 * s - jnp.sum(logs, axis=-1)
    return jax.nn.logsumexp(log_integrand, axis=-1, b=jnp.asarray(panel_weights)) + jnp.log(span)
