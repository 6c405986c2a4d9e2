"""The exponent of the escape-time law, by differentiating the escape."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .. import _check
from ..bottleneck import chosen_groups
from ..flow import Escape, Save, gradient_flow
from ..objective import Problem, as_problem
from ..parameters import Trainable
from ..tasks.task import Task


def critical_exponent(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    layers: Sequence[int] | int | None = None,
    until: Escape | None = None,
    *,
    where: Callable[[Any], Any] | None = None,
    trainable: Trainable | None = None,
    rtol: float | int | Array | None = None,
) -> Float[Array, ""]:
    """The local exponent `−d log τ/d log ε` of the escape time in the scale of the small layers, or of any groups.

    By forward-mode differentiation through the gradient flow and its end, at the scale the model has. As `ε → 0` it
    tends to `r − 2` for an order `r ≥ 3` of the saddle ([`saddlejax.saddle_order`][]: the number of small layers where the
    data have a signal), to `0` like `1/log(1/ε)` for `r = 2` (Rawal & DeWeese, arXiv:2605.01288).

    **Arguments:**

    - `model`, `task`, `trainable`: as for [`saddlejax.gradient_flow`][].
    - `layers`: the bottleneck of a perceptron, indices from 0; by default those that [`saddlejax.bottleneck_layers`][]
      returns for it: call it to see which. It raises where the init scales leave a doubt.
    - `where`: the small groups of any model, `lambda m: [m.conv1.weight, …]`; by default all of them.
    - `until`: [`saddlejax.Escape`][]; by default the steepest point of the first descent.
    - `rtol`: of the flow.

    **Returns:** a scalar; NaN where the flow did not escape. Derivatives go through explicit steps only, and where something
    decays fast all along the plateau, as a bias of the last layer does, these end at their limit: compare two flows then.

    **Raises:** `ValueError` as the flow does, for unknown layers, and where none are named and it is not clear which ones
    are small. Other layers, scales, seeds or data of the same shapes compile nothing anew.
    """
    problem = as_problem(model, task, trainable)
    until = Escape() if until is None else until
    if not isinstance(until, Escape):
        raise _check.fail("until", "be saddlejax.Escape(), with or without a loss_fraction", repr(until))
    if rtol is not None:
        _check.tolerance("rtol", rtol)
    small = chosen_groups(problem, layers, where)
    mask = jnp.asarray([group in small for group in range(len(problem.parameters.arrays))])
    return _exponent(problem, until, mask, trainable, None if rtol is None else jnp.asarray(rtol))


@eqx.filter_jit
def _exponent(
    problem: Problem,
    until: Escape,
    mask: Bool[Array, " groups"],
    trainable: Trainable | None,
    rtol: float | int | Array | None,
) -> Float[Array, ""]:
    def log_time(log_factor: Array) -> Array:
        arrays = problem.parameters.arrays
        scaled = [jnp.where(small, a * jnp.exp(log_factor), a) for a, small in zip(arrays, mask, strict=True)]
        model, save = problem.parameters.with_arrays(scaled), Save(steps=False, singular_values=False)
        return gradient_flow(model, problem.lowered, until, trainable=trainable, rtol=rtol, save=save).log_escape_time

    zero = jnp.zeros((), problem.parameters.arrays[0].dtype)
    time, slope = jax.jvp(log_time, (zero,), (jnp.ones_like(zero),))
    return jnp.where(jnp.isnan(time), jnp.nan, -slope)
