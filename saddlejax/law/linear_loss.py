"""The prediction for any model: followed itself, on a loss that is linear in its outputs, or on its own loss."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .. import _check
from .._numerics import safe_norm
from ..bottleneck import group_scales
from ..curvature.sharpness import sharpness
from ..flow import Escape, Save, Status, gradient_flow
from ..objective import Problem, outputs
from ..parameters import Parameters, Trainable
from ..saddle.order import SaddleOrder, saddle_point
from .follow import Followed, follow, share_of_optimum, steepest_energy
from .prediction import LINEAR_LOSS, WHOLE_LOSS, EscapePrediction


class Start(eqx.Module):
    """A model at the start of its plateau, with what has a minimum of its own there, and the linear loss that it sees."""

    arrays: tuple[Array, ...]
    base: Float[Array, "samples out"]
    pulls: Float[Array, "samples out"]
    offset: Float[Array, ""]
    plateau: Float[Array, ""]
    signal: Float[Array, ""]
    gradient_error: Float[Array, ""]
    growth_rate: Float[Array, ""]
    degree: Float[Array, ""]


def predict_from_linear_loss(
    problem: Problem, small: tuple[int, ...], trainable: Trainable | None, with_sharpness: bool
) -> EscapePrediction:
    """Follow `C(f_0) + E⟨∇c(f_0, y), f(x) − f_0(x)⟩`, with the outputs `f_0` where the small groups are zero.

    Where the outputs grow like `ε^d` with `2d ≤ r`, what is quadratic in them, `ε^{2d}`, matters as soon as that, and the loss itself
    is followed: outputs that do not follow the targets are held back all along the plateau.
    """
    task, parameters = problem.task, problem.parameters
    assert task is not None
    order, base = saddle_point(problem, small)
    start = _start(problem, order, base)
    known = _check.is_concrete(start.degree) and bool(jnp.isfinite(start.degree))
    if known and float(order.order) >= 2 * round(float(start.degree)) > 0:
        return predict_from_whole_loss(problem, small, trainable, with_sharpness)

    def steepest(model: PyTree) -> Array:
        return steepest_energy(task, start.base, outputs(model, task.x), order.order)

    model = parameters.with_arrays(start.arrays)
    if _check.is_concrete(order.order) and bool(jnp.isnan(order.order)):
        nan = jnp.full((), jnp.nan, task.x.dtype)
        done = Followed(nan, nan, model, Status.stationary, jnp.asarray(0))
    else:
        done = follow(model, task.x, start.pulls, start.offset, start.plateau, steepest, trainable)
    escaped = done.status == Status.escaped
    share = share_of_optimum(order.order)
    return EscapePrediction(
        log_time=jnp.where(escaped, done.log_time, jnp.nan),
        learning_rate=None,
        order=order.order,
        followed=LINEAR_LOSS,
        layers=small,
        names=_names(problem, small),
        scales=group_scales([parameters.arrays[group] for group in small]),
        speed=jnp.where(escaped, _speed(order, Parameters.of(done.model, trainable).arrays, done.energy), jnp.nan),
        drop=jnp.where(escaped, done.energy * (1 - share / 2) / start.plateau, jnp.nan),
        status=done.status,
        gradient_evaluations=done.gradient_evaluations,
        signal=start.signal,
        gradient_error=start.gradient_error,
        preactivations=jnp.zeros(0, task.x.dtype),
        bend=jnp.zeros(0, task.x.dtype),
        growth_rate=start.growth_rate,
        largest_learning_rate=2 / _sharpness(done.model, task, trainable) if with_sharpness else None,
    )


def predict_from_whole_loss(
    problem: Problem, small: tuple[int, ...], trainable: Trainable | None, with_sharpness: bool
) -> EscapePrediction:
    """Follow the loss itself to its escape: without outputs there is nothing that it could be linear in."""
    parameters, lowered = problem.parameters, problem.lowered
    order, _ = saddle_point(problem, small)
    save = Save(steps=False, singular_values=False)
    flow = gradient_flow(parameters.model, lowered, Escape(), trainable=trainable, save=save)
    rates = _growth_rate(jax.grad(problem.loss)(parameters.arrays), parameters.arrays, small)
    nan = jnp.full((), jnp.nan, rates.dtype)
    escaped = flow.status == Status.escaped
    sharpest = _sharpness(flow.net, lowered, trainable) if with_sharpness else None
    return EscapePrediction(
        log_time=flow.log_escape_time,
        learning_rate=None,
        order=order.order,
        followed=WHOLE_LOSS,
        layers=small,
        names=_names(problem, small),
        scales=group_scales([parameters.arrays[group] for group in small]),
        speed=nan,
        drop=jnp.where(escaped, 1 - flow.losses[-1] / flow.losses[0], jnp.nan),
        status=flow.status,
        gradient_evaluations=flow.stats["gradient_evaluations"],
        signal=nan,
        gradient_error=jnp.zeros_like(nan),
        preactivations=jnp.zeros(0, nan.dtype),
        bend=jnp.zeros(0, nan.dtype),
        growth_rate=rates,
        largest_learning_rate=None if sharpest is None else 2 / sharpest,
    )


_sharpness = eqx.filter_jit(sharpness)


def _names(problem: Problem, small: tuple[int, ...]) -> tuple[str, ...] | None:
    if problem.perceptron:
        return None
    return tuple(problem.parameters.names[group] for group in small)


@eqx.filter_jit
def _start(problem: Problem, order: SaddleOrder, base: tuple[Array, ...]) -> Start:
    parameters, task = problem.parameters, problem.task
    assert task is not None
    arrays = tuple(
        jnp.where(relaxed, at_base, array)
        for relaxed, at_base, array in zip(order.relaxed, base, parameters.arrays, strict=True)
    )
    at_base = outputs(parameters.with_arrays(base), task.x)
    pulls = -jax.grad(task.mean_loss)(at_base)

    def energy(arrays: tuple[Array, ...]) -> Array:
        return jnp.sum(pulls * outputs(parameters.with_arrays(arrays), task.x))

    halved = tuple(array / 2 if group in order.small else array for group, array in enumerate(arrays))
    halved = tuple(jnp.where(r, a, h) for r, a, h in zip(order.relaxed, arrays, halved, strict=True))
    moved, less = (outputs(parameters.with_arrays(groups), task.x) - at_base for groups in (arrays, halved))
    terms = pulls * moved
    size = jnp.sum(jnp.abs(terms))
    full, linear = jax.grad(problem.loss)(arrays), jax.grad(lambda a: -energy(a))(arrays)
    waiting = [jnp.where(order.relaxed[group], 0, 1) for group in order.small]

    def norm(groups: Sequence[Array]) -> Array:
        sizes = [factor * safe_norm(groups[group]) for factor, group in zip(waiting, order.small, strict=True)]
        return safe_norm(jnp.stack(sizes))

    missing = [a - b for a, b in zip(full, linear, strict=True)]
    return Start(
        arrays=arrays,
        base=at_base,
        pulls=pulls,
        offset=jnp.sum(pulls * at_base),
        plateau=task.mean_loss(at_base),
        signal=jnp.abs(jnp.sum(terms)) / jnp.where(size > 0, size, 1),
        gradient_error=norm(missing) / norm(linear),
        growth_rate=_growth_rate(linear, arrays, order.small),
        degree=jnp.log2(safe_norm(moved) / safe_norm(less)),
    )


def _growth_rate(slopes: tuple[Array, ...], arrays: tuple[Array, ...], small: tuple[int, ...]) -> Array:
    """The largest `‖∂_g‖/‖θ_g‖` of the small groups that are not zero."""
    norms = [(safe_norm(slopes[group]), safe_norm(arrays[group])) for group in small]
    return jnp.max(jnp.stack([jnp.where(size > 0, slope / jnp.where(size > 0, size, 1), 0) for slope, size in norms]))


def _speed(order: SaddleOrder, arrays: tuple[Array, ...], energy: Array) -> Array:
    """`K` of `dy/dt = K y^{r−1}`, from `d(½ Σ_g ‖θ_g‖²)/dt = r γ` and the mean square `y²` of the groups' norms."""
    waiting = jnp.stack([~order.relaxed[group] for group in order.small])
    norms = jnp.stack([safe_norm(arrays[group]) for group in order.small])
    count = jnp.sum(waiting)
    log_size = jnp.log(safe_norm(jnp.where(waiting, norms, 0))) - 0.5 * jnp.log(count)
    return order.order / count * energy * jnp.exp(-order.order * log_size)
