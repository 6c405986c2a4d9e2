"""The scale, or the number of small layers, at which a predicted plateau lasts as long as one is ready to wait."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import scipy
from jaxtyping import Array, PyTree

from .. import _check
from ..bottleneck import chosen_groups, scale_groups
from ..flow import Status
from ..objective import Problem, as_problem
from ..parameters import Trainable
from ..saddle.order import in_double
from ..tasks.task import Task
from .predict import predicted

MOST_STRIDES = 6
TOLERANCE = 1e-4


def scale_for_steps(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    steps: float | int,
    learning_rate: float | int,
    layers: Sequence[int] | int | None = None,
    *,
    where: Callable[[Any], Any] | None = None,
    trainable: Trainable | None = None,
) -> float:
    """The factor for the small layers, or other groups of a model, at which the predicted plateau lasts `steps` steps of gradient descent.

    Any larger factor makes it shorter. Found by following the predictions of [`saddlejax.predict_escape`][] in the
    factor; `saddlejax.scale_layers(model, factor, layers)` applies it. Arguments as for it. Runs on the host: it cannot be used under `jax.jit`,
    `jax.vmap` or `jax.grad`.

    **Raises:** `ValueError` where no factor between 1e-20 and 1e20 has such a plateau, where nothing can be predicted, and
    for traced arguments.
    """
    _check.not_traced("scale_for_steps", model=model, task=task, steps=steps, learning_rate=learning_rate)
    _check.positive_number("steps", steps)
    _check.positive_number("learning_rate", learning_rate)
    problem = as_problem(model, task, trainable)
    small = chosen_groups(problem, layers, where)
    target = np.log(steps) + np.log(learning_rate)
    # The time falls with the scale: go to where the plateau is too short, or too long, in growing strides.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        double = in_double(problem)

        def excess(log_factor: float) -> float:
            return _predicted_log_time(scale_groups(double, log_factor, small), small, trainable) - target

        here, other, stride = excess(0.0), 0.0, np.log(10.0)
        reached = here
        for _ in range(MOST_STRIDES):
            further = other + (stride if here > 0 else -stride)
            beyond = excess(further)
            if np.isnan(beyond):  # where the parameters are too small or too large to predict anything
                break
            other, reached, stride = further, beyond, 1.5 * stride
            if (reached > 0) != (here > 0):
                break
        if (reached > 0) == (here > 0):
            found = np.exp(min(target + reached, 700.0)) / learning_rate
            rule = (
                f"be a length that some factor gives the plateau; a factor of {np.exp(other):.0e} gives it {found:.3g}"
            )
            remedy = "With two bottleneck layers the plateau grows like log 1/ε only." if len(small) == 2 else ""
            raise _check.fail("steps", rule, steps, remedy)
        bounded = lambda log_factor: max(excess(log_factor), -50.0)  # noqa: E731
        ends = sorted((0.0, other))
        return float(np.exp(scipy.optimize.root_scalar(bounded, bracket=ends, xtol=TOLERANCE, method="brentq").root))


def bottleneck_for_steps(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    scale: float | int,
    steps: float | int,
    learning_rate: float | int,
    *,
    where: Callable[[Any], Any] | None = None,
    trainable: Trainable | None = None,
) -> int:
    """The largest number `r` of layers, counted from the input, that may be scaled by `scale` within `steps` steps.

    Of a model that is no perceptron, the largest number of groups in the order of its arrays. Runs on the host: it cannot be used
    under `jax.jit`, `jax.vmap` or `jax.grad`.

    **Arguments:** `model` at its full scale; `scale`, the `ε` of the bottleneck layers; `steps`, the longest plateau that
    is acceptable; `learning_rate`; `where`, the groups that may become small, by default all.

    **Returns:** between 0 and the number of layers; 0 where even one small layer takes longer.

    **Raises:** `ValueError` where nothing can be predicted, for numbers that are not positive, and for traced arguments.
    """
    _check.not_traced(
        "bottleneck_for_steps", model=model, task=task, scale=scale, steps=steps, learning_rate=learning_rate
    )
    for name, value in (("scale", scale), ("steps", steps), ("learning_rate", learning_rate)):
        _check.positive_number(name, value)
    problem = as_problem(model, task, trainable)
    count = len(problem.parameters.arrays)
    candidates = tuple(range(count)) if where is None else tuple(sorted(problem.parameters.indices(where)))
    allowed = 0
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        double = in_double(problem)
        for r in range(1, len(candidates) + 1):
            small = candidates[:r]
            log_time = _predicted_log_time(scale_groups(double, np.log(scale), small), small, trainable)
            if log_time - np.log(learning_rate) > np.log(steps):
                break
            allowed = r
    return allowed


def _predicted_log_time(problem: Problem, small: tuple[int, ...], trainable: Trainable | None) -> float:
    """The logarithm of the predicted time, `−inf` where there is no plateau; an error where nothing is predicted."""
    prediction = predicted(problem, small, trainable, with_sharpness=False)
    if bool(prediction.status == Status.met_at_start):
        return -np.inf
    if bool(prediction.status != Status.escaped):
        raise _check.fail("model", "have an escape that can be predicted", "one without", " ".join(prediction.concerns))
    return float(prediction.log_time)
