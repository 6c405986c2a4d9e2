"""Universality: the escape times of all activations collapse after multiplication by a prefactor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._host.threads import side_by_side
from ..flow import Escape, Save, Status, gradient_flow
from ..manifold import chain
from ..networks.activation_class import classify_activation
from ..networks.activations import Activation, activation_name, resolve_activation

if TYPE_CHECKING:
    import xarray as xr

SMOOTH_NAMES = ("tanh", "erf", "sin", "arctan", "gelu", "gelu_tanh", "silu", "mish", "softsign", "elu", "celu")


@safe_to_interrupt
def collapse(
    activation: Sequence[str | Activation] = SMOOTH_NAMES,
    scale: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
    *,
    depth: int = 4,
    width: int = 50,
) -> "xr.Dataset":
    """Escape times on the symmetric submanifold, raw and multiplied by the prefactor of their activation.

    Near the origin a network with gain `α = σ'(0)` is the linear one times `α^{L−1}`, so that all escape times agree
    after multiplication by `K = |α|^{L−1}` as the init scale goes to zero (Rawal & DeWeese, arXiv:2605.01288). Measured
    for `depth` layers of norm `ε`, constant `width`, Gaussian inputs and a linear teacher of gain one; the escape is
    where the loss falls to half of its value at zero weights. Runs on the host: not under `jax.jit`, `jax.vmap` or
    `jax.grad`.

    **Returns:** a dataset with dimensions `activation`, `scale` and variables `log_escape_time`,
    `log_collapsed_time = log(K τ)`, `prefactor` `K`, `letter` (class) and `status`. `τ` is NaN where the flow did not
    escape.

    **Raises:** `ValueError` for an activation without one non-zero slope at zero, to which the law does not apply, and for
    traced scales.
    """
    _check.not_traced("collapse", scale=scale)
    _check.whole_number("depth", depth, least=2)
    _check.positive_number("scale", scale)
    functions = [resolve_activation(one) for one in activation]
    classes = [classify_activation(one) for one in functions]
    for function, found in zip(functions, classes, strict=True):
        if not found.gain or found.letter == "D":
            raise _check.fail(
                "activation", "be zero at zero with one non-zero slope there", activation_name(function), str(found)
            )
    shape = (len(functions), len(scale))
    log_times, status = np.full(shape, np.nan), np.full(shape, "", dtype=object)

    def measure(index: tuple[int, ...]) -> None:
        net, task = chain(jnp.full(depth, scale[index[1]]), lambda g: g, functions[index[0]], width)
        flow = gradient_flow(net, task, Escape(loss_fraction=0.5), save=Save(steps=False))
        log_times[index], status[index] = float(flow.log_escape_time), Status[flow.status]

    # Activations take turns, so that two of them compile side by side.
    side_by_side(measure, sorted(np.ndindex(shape), key=lambda index: index[::-1]))
    prefactor = np.abs([found.gain for found in classes], dtype=float) ** (depth - 1)
    names = [activation_name(function) for function in functions]
    import xarray as xr  # here, since it takes long

    return xr.Dataset(
        {
            "log_escape_time": (("activation", "scale"), log_times),
            "log_collapsed_time": (("activation", "scale"), log_times + np.log(prefactor)[:, None]),
            "prefactor": ("activation", prefactor),
            "letter": ("activation", [found.letter or "–" for found in classes]),
            "status": (("activation", "scale"), status.astype(str)),
        },
        coords={"activation": names, "scale": list(scale)},
        attrs={"depth": depth, "width": width, "teacher": "linear, gain 1", "jax": jax.__version__},
    )
