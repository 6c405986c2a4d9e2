"""Training in discrete steps with any optax optimiser, recorded like a flow."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._numerics import safe_norm
from ..objective import Problem, TaskObjective, as_problem
from ..parameters import Trainable
from ..tasks.task import Task
from .descent_record import Minibatches, Peak, Row, flow_time, imbalance_rate, row_of
from .result import Flow
from .status import Status


@safe_to_interrupt
def gradient_descent(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    optimiser: optax.GradientTransformation,
    steps: int,
    *,
    trainable: Trainable | None = None,
    every: int | None = None,
    batch_size: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Flow:
    """Train a model in discrete steps, and record what a gradient flow records.

    **Arguments:**

    - `model`, `task` (or a function `loss(model) -> scalar`), `trainable`: as for [`saddlejax.gradient_flow`][].
    - `optimiser`: any optax optimiser, such as `optax.sgd(0.1)`, `optax.adam(1e-3)`. Its parameters are the model with
      None in the place of what does not move. Keep and pass the same object to avoid compiling again.
    - `steps`: how many.
    - `every`: steps between two rows of the record; by default such that there are about 500.
    - `batch_size`: samples a step, drawn without replacement, shuffled again after each pass through the data; a rest
      smaller than a batch is left out of that pass. By default all samples. Needs a task.
    - `key`: a JAX random key, needed for minibatches.

    **Returns:** a [`saddlejax.Flow`][] with a row every `every` steps, the start included.

    - Its times are the flow time the steps stand for, `t = Σ_k η_k`, `η_k = max(0, −⟨u_k, g_k⟩ / ‖g_k‖²)`, with the
      update `u_k` and the gradient `g_k` it was computed from. For plain SGD `η_k` is the learning rate, under any
      schedule; for momentum `β` it tends to `η/(1 − β)` where the gradient hardly changes; for Adam it is whatever
      length of flow the step covers. A step uphill advances the time by nothing.
    - `imbalance_residual`, of a perceptron, compares with `Σ_k η_k dΔ_l/dt`. For plain SGD every step adds
      `η² (‖∂𝓛/∂W_{l+1}‖² − ‖∂𝓛/∂W_l‖²)` to the difference: the error of discretisation alone. For other optimisers it
      is also their departure from the flow.
    - The escape is the first local maximum of `‖∇𝓛‖` on all samples, as of a flow, if there was a plateau before it that
      the optimiser had to wait on: the maximum comes after at least ten steps, and the first half of them covered less
      than three quarters of the flow time until then. Steps of gradient descent cover half of it. Steps whose size does
      not follow the gradient, as those of Adam and Muon, cover nearly all of it at once, where the gradient is small:
      the flow would have waited on a plateau, and they do not. A fall from the start is no maximum, nor are changes below one
      percent. Looked for at every step if all samples are used, else at every row. Training goes on after it.
      `status` is `escaped`; `no_plateau` where the maximum has no plateau before it; `steps_taken` where there was no
      maximum; `non_finite`.
    - `stats`: `steps`, `gradient_evaluations` (on minibatches too; a line search makes more, not counted), `escape_step`,
      −1 without an escape, and `peak_step`, that of the maximum with or without a plateau, −1 where there is none.

    **Raises:** `ValueError` for a model that does not fit the task, an optimiser that is not one, numbers out of
    range, minibatches without a key or a task, and minibatches of a task with sample weights.
    """
    problem = as_problem(model, task, trainable)
    _check_arguments(problem.task, optimiser, steps, every, batch_size, key)
    every = max(1, steps // 500) if every is None else min(every, steps)
    batches = None if batch_size is None or key is None else Minibatches(batch_size, key)
    return _descend(problem, optimiser, steps, every, batches)


class _State(NamedTuple):
    """Between two steps; `span` and `change` are the flow time and `∫ dΔ/dt` since the last row, `time` that row's."""

    moving: PyTree
    memory: Any
    order: Array
    peak: Peak
    time: Array
    span: Array
    change: Array


@eqx.filter_jit
def _descend(
    problem: Problem,
    optimiser: optax.GradientTransformation,
    steps: int,
    every: int,
    batches: Minibatches | None,
) -> Flow:
    optimiser = optax.with_extra_args_support(optimiser)
    parameters, task = problem.parameters, problem.task
    first_moving = jax.tree.unflatten(parameters.structure, parameters.arrays)
    dtype = jnp.result_type(*parameters.arrays)
    rows = -(-steps // every)
    hidden = len(parameters.arrays) - 1 if problem.perceptron else 0
    zero, zeros = jnp.zeros((), dtype), jnp.zeros((hidden,), dtype)

    def step(state: _State, taken: Array) -> _State:
        order, objective = state.order, problem.objective
        if batches is not None and task is not None:
            order, batch = batches.draw(task, order, taken)
            objective = TaskObjective(batch)

        def loss(moving: PyTree) -> Array:
            return objective.loss(eqx.combine(moving, parameters.rest))

        moving = state.moving
        value, slope = jax.value_and_grad(loss)(moving)
        updates, memory = optimiser.update(slope, state.memory, moving, value=value, grad=slope, value_fn=loss)
        arrays, slopes = jax.tree.leaves(moving), jax.tree.leaves(slope)
        joined = parameters.shapes.join(slopes)
        span = flow_time(parameters.shapes.join(jax.tree.leaves(updates)), joined)
        peak, change = state.peak, state.change
        if batches is None:
            peak = peak.updated(safe_norm(joined), taken, state.time + state.span)
        if problem.perceptron:
            change = change + span * imbalance_rate(arrays, slopes)
        moving = optax.apply_updates(moving, updates)
        return _State(moving, memory, order, peak, state.time, state.span + span, change)

    def interval(state: _State, number: Array) -> tuple[_State, tuple[Array, Array, Array, Row]]:
        def one(state: _State, taken: Array) -> tuple[_State, None]:
            # The last interval may be shorter than the others.
            return jax.lax.cond(taken < steps, step, lambda state, taken: state, state, taken), None

        state, _ = jax.lax.scan(one, state, number * every + jnp.arange(every))
        taken, span, change = jnp.minimum((number + 1) * every, steps), state.span, state.change
        row = row_of(problem, jax.tree.leaves(state.moving))
        # Summed interval by interval: in single precision a running sum over all steps would stall.
        state = state._replace(time=state.time + span, span=zero, change=zeros)
        if batches is not None:
            state = state._replace(peak=state.peak.updated(row.gradient_norm, taken, state.time))
        return state, (taken, state.time, change, row)

    first = row_of(problem, parameters.arrays)
    order = jnp.arange(0 if task is None else task.samples)
    peak = Peak.start(first.gradient_norm)
    start = _State(first_moving, optimiser.init(first_moving), order, peak, zero, zero, zeros)
    end, later = jax.lax.scan(interval, start, jnp.arange(rows))

    taken, times, changes, record = jax.tree.map(
        lambda one, more: jnp.concatenate([one[None], more]), (jnp.zeros_like(later[0][0]), zero, zeros, first), later
    )
    imbalance = residual = None
    if problem.perceptron:
        squares = jnp.square(record.group_norms)
        imbalance = jnp.diff(squares)
        size = squares[:, 1:] + squares[:, :-1]
        residual = (imbalance - imbalance[0] - jnp.cumsum(changes, axis=0)) / jnp.where(size == 0, 1, size)
    peak = end.peak
    finite = jnp.all(jnp.isfinite(record.loss)) & jnp.all(jnp.isfinite(record.group_norms))
    escaped = peak.passed & peak.after_plateau & finite
    status = Status.where(
        peak.passed, Status.where(peak.after_plateau, Status.escaped, Status.no_plateau), Status.steps_taken
    )
    departure = ": the imbalance error is their departure from gradient flow" if problem.perceptron else ""
    return Flow(
        status=Status.where(finite, status, Status.non_finite),
        log_escape_time=jnp.where(escaped, jnp.log(peak.time), jnp.nan),
        steps=taken,
        log_times=jnp.log(times),
        losses=record.loss,
        gradient_norms=record.gradient_norm,
        layer_norms=record.group_norms,
        singular_values=record.singular_values,
        energy=None,
        imbalance=imbalance,
        imbalance_residual=residual,
        sliding=None,
        weights=None,
        net=eqx.combine(end.moving, parameters.rest),
        stats={
            "steps": jnp.asarray(steps),
            "gradient_evaluations": jnp.asarray(steps + rows + 1),
            "escape_step": jnp.where(escaped, peak.step, -1),
            "peak_step": jnp.where(peak.passed & finite, peak.step, -1),
        },
        resolved=jnp.asarray(True),
        until=None,
        rtol=None,
        method="discrete steps of an optax optimiser" + departure,
        names=parameters.names,
    )


def _check_arguments(
    task: Task | None, optimiser: Any, steps: int, every: int | None, batch_size: int | None, key: PRNGKeyArray | None
) -> None:
    if not (callable(getattr(optimiser, "init", None)) and callable(getattr(optimiser, "update", None))):
        raise _check.fail("optimiser", "be an optax optimiser", repr(optimiser), "For instance optax.sgd(0.1).")
    _check.whole_number("steps", steps)
    if every is not None:
        _check.whole_number("every", every)
    if batch_size is None:
        return
    _check.whole_number("batch_size", batch_size)
    if task is None:
        raise _check.fail(
            "batch_size",
            "be left out where the loss is a function of the model",
            batch_size,
            "Minibatches need the samples of a saddlejax.Task.",
        )
    if batch_size > task.samples:
        raise _check.fail("batch_size", f"be at most the {task.samples} samples of the task", batch_size)
    if key is None:
        raise _check.fail("key", "be a JAX random key where batch_size is given", None, "Pass key=jax.random.key(0).")
    if task.sample_weights is not None:
        raise _check.fail(
            "batch_size",
            "be left out for a task with sample weights",
            batch_size,
            "Its samples are a quadrature rule that a minibatch would break.",
        )
