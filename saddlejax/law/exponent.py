"""The exponent of the escape-time law, by differentiating the escape."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _check
from ..flow import Escape, Save, gradient_flow
from ..networks.mlp import AbstractNetwork
from ..tasks.task import Task, check_fits
from .bottleneck import chosen_layers


def critical_exponent(
    net: AbstractNetwork,
    task: Task,
    layers: Sequence[int] | int | None = None,
    until: Escape | None = None,
    *,
    rtol: float | Array | None = None,
) -> Float[Array, ""]:
    """The local exponent `−d log τ/d log ε` of the escape time in the scale of the bottleneck layers.

    By forward-mode differentiation through the gradient flow and its end, at the scale the network has. As `ε → 0` it
    tends to `r − 2` for `r ≥ 3` bottleneck layers, to `0` like `1/log(1/ε)` for `r = 2` (Rawal & DeWeese,
    arXiv:2605.01288).

    **Arguments:**

    - `net`, `task`: as for [`saddlejax.gradient_flow`][].
    - `layers`: the bottleneck, indices from 0; by default those that [`saddlejax.bottleneck_layers`][] returns for `net`:
      call it to see which. It raises where the init scales leave a doubt.
    - `until`: [`saddlejax.Escape`][]; by default the steepest point of the first descent.
    - `rtol`: of the flow.

    **Returns:** a scalar; NaN where the flow did not escape.

    **Raises:** `ValueError` as the flow does, for unknown layers, and where none are named and it is not clear which ones
    are small. Other layers, scales, seeds or data of the same shapes compile nothing anew.
    """
    check_fits(net, task)
    until = Escape() if until is None else until
    if not isinstance(until, Escape):
        raise _check.fail("until", "be saddlejax.Escape(), with or without a loss_fraction", repr(until))
    if rtol is not None:
        _check.positive_number("rtol", rtol)
    chosen = chosen_layers(net, layers)
    mask = jnp.asarray([layer in chosen for layer in range(net.depth)], net.weights[0].dtype)
    return _exponent(net, task, until, mask, None if rtol is None else jnp.asarray(rtol))


@eqx.filter_jit
def _exponent(
    net: AbstractNetwork, task: Task, until: Escape, mask: Float[Array, " layers"], rtol: float | Array | None
) -> Float[Array, ""]:
    def log_time(log_factor: Array) -> Array:
        scaled = net.with_weights([w * jnp.exp(log_factor * m) for w, m in zip(net.weights, mask, strict=True)])
        save = Save(steps=False, singular_values=False)
        return gradient_flow(scaled, task, until, rtol=rtol, save=save).log_escape_time

    zero = jnp.zeros((), mask.dtype)
    time, slope = jax.jvp(log_time, (zero,), (jnp.ones_like(zero),))
    return jnp.where(jnp.isnan(time), jnp.nan, -slope)
