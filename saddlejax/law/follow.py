"""Following a loss that is linear in the outputs to where a loss that is quadratic along them would be steepest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .. import _check
from ..flow import Escape, Flow, Save, Status, gradient_flow
from ..parameters import Trainable
from ..tasks.task import Task

FIRST_GUESS = 0.1


class Followed(NamedTuple):
    """Where the flow of a linear loss was followed to: `γ = −E⟨g, f⟩` there, the model, and the time."""

    log_time: Float[Array, ""]
    energy: Float[Array, ""]
    model: PyTree
    status: Status
    gradient_evaluations: Array


def follow(
    model: PyTree,
    x: Float[Array, "samples ..."],
    pulls: Float[Array, "samples out"],
    offset: Array,
    plateau: Array,
    steepest: Callable[[PyTree], Array],
    trainable: Trainable | None = None,
) -> Followed:
    """Follow the gradient flow of `−γ`, `γ = Σ_i ⟨r_i, f(x_i)⟩ − offset`, to where `γ` is what `steepest` says at the end.

    Any guess of the end will do to begin with, since the direction of the model hardly depends on how far it is followed: a
    first pass finds the direction, a second one the time.
    """
    reach = FIRST_GUESS * jnp.where(plateau > 0, plateau, jnp.sum(jnp.abs(pulls)))
    cost, status, end = jnp.asarray(0), Status.escaped, model
    for _ in range(2):
        # A loss of 1 − γ/(2 reach) falls to half of its value at outputs of zero where γ = reach, 2 reach times slower.
        size = 2 * (reach + offset)
        flow = _flow(model, Task(x, pulls * (len(x) / size), one_minus_overlap), trainable)
        log_time = flow.log_escape_time - jnp.log(size)
        cost = cost + flow.stats["gradient_evaluations"]
        status = Status.where(status == Status.escaped, flow.status, status)
        end, escaped = flow.net, status == Status.escaped
        last, reach = reach, jnp.where(escaped, steepest(end), reach)
        if _check.is_concrete(reach, escaped) and bool(escaped) and not np.isfinite(float(reach)):
            raise _check.fail(
                "task", "have a loss that curves upwards along the outputs", "one that is flat, or curves downwards"
            )
    return Followed(log_time, last, end, status, cost)


@eqx.filter_jit
def _flow(model: PyTree, task: Task, trainable: Trainable | None) -> Flow:
    save = Save(steps=False, singular_values=False)
    return gradient_flow(model, task, Escape(loss_fraction=0.5), trainable=trainable, save=save)


def one_minus_overlap(prediction: Float[Array, " out"], target: Float[Array, " out"]) -> Float[Array, ""]:
    """`1 − ⟨f, y⟩`: linear in the outputs, as every loss is to leading order, and unbounded below."""
    return 1 - jnp.dot(prediction, target, precision="highest")


def share_of_optimum(order: Any) -> Any:
    """`(r−1)/(2r−1)`: where `K y^r − ½ q y^{2r}` is steepest on a ray, as a share of its optimum; for `r = 1` as for 2."""
    r = jnp.maximum(order, 2)
    return (r - 1) / (2 * r - 1)


@eqx.filter_jit
def steepest_energy(
    task: Task, base: Float[Array, "samples out"] | float, outputs: Float[Array, "samples out"], order: Any
) -> Float[Array, ""]:
    """The energy `γ` at the escape, for a loss quadratic along the outputs' way from `base`; NaN where it curves downwards."""
    zero, one = jnp.zeros((), outputs.dtype), jnp.ones((), outputs.dtype)

    def slope(a: Array) -> Array:
        return jax.jvp(lambda b: task.mean_loss(base + b * (outputs - base)), (a,), (one,))[1]

    fall, curvature = jax.jvp(slope, (zero,), (one,))
    upwards = curvature > 0
    return jnp.where(upwards, share_of_optimum(order) * jnp.square(fall) / jnp.where(upwards, curvature, 1), jnp.nan)
