"""The public call: follow the gradient flow of a model."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._host.threads import one_blas_thread
from ..networks.activation_class import slope_jumps, value_at_zero
from ..networks.network import AbstractNetwork
from ..objective import Problem, as_problem
from ..parameters import Trainable
from ..tasks.task import Task
from .clock import checked_until
from .field import field_of
from .integrate import Begin, Integration, Steps, Stretch, clock_from, conclude, integrate, stretch
from .memory import smallest_share
from .record import Row, Save, imbalance_residual
from .result import Flow, trim
from .rounding import least_factor
from .solvers import PlateauSolver
from .state import ClockState, Memory
from .status import AS_ASKED, Status
from .task_reference import TaskReference
from .until import AbstractUntil

SMOOTH_RTOL = 1e-4
KINKED_RTOL = 2e-4
KINKED_MIN_STEP = 2e-3
STIFF_RTOL = 1e-2
LARGEST_STIFF_RTOL = 0.1
STIFF_STEPS = 15
"""After so many steps in a row that stability bounds, exponential ones are tried; after three that do not pay, left."""
UNPAID_STEPS = 3


@safe_to_interrupt
def gradient_flow(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    until: AbstractUntil | None = None,
    *,
    trainable: Trainable | None = None,
    rtol: float | int | Array | None = None,
    save: Save | None = None,
    solver: dfx.AbstractERK | None = None,
    max_steps: int = 4096,
    stiff: bool | None = None,
    throw: bool = False,
) -> Flow:
    """Follow the gradient flow `dθ/dt = −∇𝓛(θ)` of a model in the plateau clock.

    In this clock, `dθ/ds = −τ∇𝓛` and `dt/ds = τ` with `1/τ² = Σ_g ‖∂𝓛/∂θ_g‖²/‖θ_g‖²` over the arrays `θ_g` of the model, a
    plateau of any length takes a number of steps that grows like `log 1/ε` in the init scale `ε`. Integrated by
    `diffrax.diffeqsolve`; [`saddlejax.plateau_clock`][] has the parts.

    ```python
    flow = saddlejax.gradient_flow(eqx.nn.MLP(64, 10, 24, 2, jax.numpy.tanh, key=key), saddlejax.tasks.digits())
    print(flow)
    ```

    **Arguments:**

    - `model`: any Equinox module that maps one sample to an output, such as [`saddlejax.MLP`][] or `eqx.nn.MLP`. Its
      arrays may be traced or batched by `vmap`.
    - `task`: a [`saddlejax.Task`][] whose samples the model takes, or a function `loss(model) -> scalar`.
    - `until`: [`saddlejax.Escape`][] (the default, `Escape()`, is the steepest point of the first descent),
      [`saddlejax.Time`][] or [`saddlejax.Loss`][].
    - `trainable`: which arrays move, as a filter of `equinox.partition`: by default all floating-point arrays of a model,
      and the `weights` of a perceptron.
    - `rtol`: the error of a step relative to each array, by default 1e-4, or 2e-4 where the slope of the activation of a
      perceptron jumps. Where the escape time is asked for, errors in the arrays are multiplied by a weight between 1/20 and
      1 that falls as the plateau passes: late on it they hardly change the escape time, so that steps may be longer.
    - `save`: what to keep on the way, see [`saddlejax.Save`][].
    - `solver`: an explicit diffrax solver whose last stage is the first of the next step. By default `Tsit5`, and `Bosh3`
      for kinked perceptrons.
    - `max_steps`: the most steps to attempt.
    - `stiff`: whether to take exponential steps, those of [`saddlejax.ExponentialRosenbrock`][], which directions that decay
      fast do not bound, as they bound explicit ones on later plateaus or where a bias relaxes. By default the flow chooses,
      and changes from explicit to exponential steps and back by what it meets. The tolerance of exponential steps is
      relative to the singular values of an array that the error perturbs: 1e-2 by default, which gives crossing times to
      about 1e-3; `rtol` where `stiff=True`, a hundred times as much where the flow chooses. Exponential steps are not
      differentiable: under `jax.jit`, `jax.vmap`, `jax.grad` and `jax.jvp` the default takes explicit ones only. Where the
      slope of the activation of a perceptron jumps, all steps are explicit.
    - `throw`: whether to raise a `RuntimeError` where the flow does not end as it was asked to.

    **Returns:** a [`saddlejax.Flow`][]. Its `status` tells how the flow ended; the escape time is NaN unless it escaped.
    Works under `jax.jit`, `jax.vmap`, `jax.grad` and `jax.jvp`.

    **Raises:** `ValueError` for arguments that do not fit: a model whose output has another shape than the task needs, that
    has no array to move, that depends on a random key or a state; a loss that is no real scalar or not finite at the start;
    and where the target is already met at the start (under a transformation that is the outcome `met_at_start`).
    **Warns** where the activation of a perceptron is not zero at zero: the origin is then no saddle.
    """
    plan = plan_flow(
        model, task, until, trainable=trainable, rtol=rtol, save=save, solver=solver, max_steps=max_steps, stiff=stiff
    )
    problem, until, save, steps = plan
    chooses = stiff is None and _check.is_concrete(plan) and not kinked(model)
    if chooses:
        steps = dataclasses.replace(steps, patience=jnp.full_like(steps.patience, STIFF_STEPS))
    if steps.explicit is None and _check.is_concrete(plan):
        # Its small eigenproblems would have threads of the linear algebra wait for each other, for most of the time.
        with one_blas_thread():
            found = jax.block_until_ready(_run(problem, until, save, steps))
    else:
        found = _run(problem, until, save, steps)
    stretches = [found.stretch]
    if chooses and _check.is_concrete(found):
        stiff_rtol = jnp.minimum(STIFF_RTOL / SMOOTH_RTOL * steps.rtol, LARGEST_STIFF_RTOL)
        found, stretches = _changing(plan._replace(steps=steps), found, stiff_rtol)
    flow = record(plan, found, stretches)
    if _check.is_concrete(flow):
        flow = _finish(flow, problem, found, until)
    failed = ~jnp.any(jnp.stack([flow.status == outcome for outcome in AS_ASKED]), axis=0)
    if throw and _check.is_concrete(failed):
        if bool(failed):
            raise RuntimeError(f"The flow did not end as asked ({until.describe()}): {Status[flow.status]}.\n{flow}")
    elif throw:
        flow = eqx.error_if(flow, failed, "A flow did not end as it was asked to; see its status with throw=False.")
    return flow


class FlowPlan(NamedTuple):
    """A flow whose arguments are checked: what to lower, where to end, what to keep, and how to take steps."""

    problem: Problem
    until: AbstractUntil
    save: Save
    steps: Steps


def plan_flow(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    until: AbstractUntil | None = None,
    *,
    trainable: Trainable | None = None,
    rtol: float | Array | None = None,
    save: Save | None = None,
    solver: dfx.AbstractERK | None = None,
    max_steps: int = 4096,
    stiff: bool | None = None,
) -> FlowPlan:
    """The arguments of [`saddlejax.gradient_flow`][], checked and in one precision. Steps are explicit unless `stiff`."""
    problem = as_problem(model, task, trainable)
    until = checked_until(until)
    if not isinstance(save, Save | None):
        raise _check.fail("save", "be saddlejax.Save(...), such as Save(weights=True)", repr(save))
    _check.whole_number("max_steps", max_steps)
    if stiff not in (None, True, False):
        raise _check.fail("stiff", "be True, False or None", repr(stiff))
    if stiff and solver is not None:
        raise _check.fail("solver", "be left alone where stiff=True, which brings its own", repr(solver))
    jumps = kinked(model)
    explicit = PlateauSolver(solver or (dfx.Bosh3() if jumps else dfx.Tsit5())).solver
    exponential = bool(stiff) and not jumps
    if rtol is None:
        rtol = KINKED_RTOL if jumps else STIFF_RTOL if exponential else SMOOTH_RTOL
    _check.positive_number("rtol", rtol)
    if _check.is_concrete(rtol) and np.any(np.asarray(rtol) >= 1):
        raise _check.fail("rtol", "be below one", rtol)
    _warn_where_origin_is_no_saddle(model)
    dtype = jnp.result_type(*problem.parameters.arrays)
    until, save = jax.tree.map(lambda a: jnp.asarray(a, dtype), (until, save or Save()))
    steps = Steps(
        explicit=None if exponential else explicit,
        rtol=jnp.asarray(rtol, dtype),
        min_step=jnp.asarray(KINKED_MIN_STEP if jumps else 0.0, dtype),
        patience=jnp.asarray(jnp.inf, dtype),
        to_escape=until.asks_for_escape,
        max_steps=max_steps,
    )
    return FlowPlan(problem, until, save, steps)


def kinked(model: PyTree) -> bool:
    """Whether a model is a perceptron whose activation has jumps in its slope."""
    return isinstance(model, AbstractNetwork) and model.depth > 1 and slope_jumps(model.activation)


@eqx.filter_jit
def _run(problem: Problem, until: AbstractUntil, save: Save, steps: Steps) -> Integration:
    return integrate(problem, until, save, steps)


@eqx.filter_jit
def _go_on(
    problem: Problem,
    first: Begin,
    state: ClockState,
    until: AbstractUntil,
    save: Save,
    steps: Steps,
    size: Array | None,
) -> tuple[Stretch, Status, Array]:
    found = stretch(clock_from(problem, first), state, until, save, steps, size, "lax")
    return found, *conclude(problem, first, until, found)


def _changing(plan: FlowPlan, found: Integration, stiff_rtol: Array) -> tuple[Integration, list[Stretch]]:
    """Follow a flow on by the other kind of step, as long as it stops for that.

    Each time that explicit steps turn out to be bounded by stability again, both kinds are given twice the time.
    """
    problem, until, save, steps = plan
    stretches, first = [found.stretch], found.first
    exponential, patience = False, 1
    while bool(stretches[-1].ends.unsuited) and sum(int(one.attempts) for one in stretches) < steps.max_steps:
        last = stretches[-1]
        exponential = not exponential
        waits = (UNPAID_STEPS if exponential else STIFF_STEPS) * patience
        kind = dataclasses.replace(
            steps,
            explicit=None if exponential else steps.explicit,
            rtol=stiff_rtol if exponential else steps.rtol,
            patience=jnp.full_like(steps.patience, waits),
        )
        patience *= 1 if exponential else 2
        memory = _for_other_steps(last.state.memory)
        state = eqx.tree_at(lambda y: y.memory, last.state, memory)
        with one_blas_thread():
            new, status, log_time = jax.block_until_ready(
                _go_on(problem, first, state, until, save, kind, last.step_size)
            )
        stretches.append(new)
        found = Integration(first, new, status, log_time)
    return found, stretches


def _for_other_steps(memory: Memory) -> Memory:
    """The memory where another kind of step takes over, whose gradient norm is another one where errors dominate it."""
    zero = jnp.zeros_like(memory.unsuited)
    return memory._replace(unsuited=zero, rises=zero, log_lowest=zero + jnp.inf)


def record(plan: FlowPlan, found: Integration, stretches: list[Stretch]) -> Flow:
    """The record of a flow from its stretches."""
    problem, until, save, steps = plan
    first, last, status = found.first, found.stretch, found.status
    field, memory = field_of(problem, first.scales), last.state.memory
    rows, counts = _rows(found, stretches, until, save)
    norms = rows.group_norms
    squares = jnp.square(norms)
    imbalance = jnp.diff(squares) if problem.perceptron else None
    begin_squares = jnp.square(first.row.group_norms)
    total = lambda name: sum(getattr(one, name) for one in stretches)  # noqa: E731
    least = smallest_share(steps.rtol)
    lost = (memory.dormant_lost > 0) | (memory.least_share < least) | (status == Status.below_rounding)
    curvature = 1 if until.uses_curvature else 0
    return Flow(
        status=status,
        log_escape_time=jnp.where(status == Status.escaped, found.log_time, jnp.nan),
        steps=counts,
        log_times=rows.log_time,
        losses=rows.loss,
        gradient_norms=rows.gradient_norm,
        layer_norms=norms,
        singular_values=rows.singular_values,
        energy=rows.energy,
        imbalance=imbalance,
        imbalance_residual=None if imbalance is None else imbalance_residual(rows, jnp.diff(begin_squares)),
        weights=rows.arrays,
        net=field.model(last.state),
        stats={
            "steps": total("accepted"),
            "rejected_steps": total("attempts") - total("accepted"),
            "gradient_evaluations": 1 + total("gradients"),
            "hessian_vector_products": curvature + total("products"),
        },
        resolved=~lost,
        until=until,
        rtol=steps.rtol,
        method=_method(steps, stretches),
        names=problem.parameters.names,
    )


def _rows(found: Integration, stretches: list[Stretch], until: AbstractUntil, save: Save) -> tuple[Row, Array]:
    """All rows, and the steps taken until each of them, −1 where there is none."""
    first, last = found.first, found.stretch
    at_end = last.last
    if until.end_time() is not None:
        at_end = at_end._replace(log_time=jnp.where(found.status == until.reached, found.log_time, at_end.log_time))
    if save.times is not None:
        rows, counts = last.rows, last.row_steps
        before = jnp.asarray(0)
        for number, one in enumerate(stretches):
            assert one.rows is not None and one.row_steps is not None
            if number == 0:
                rows, counts = one.rows, one.row_steps
            else:
                here = one.row_steps >= 0
                rows = jax.tree.map(lambda new, old, h=here: jnp.where(_wide(h, new), new, old), one.rows, rows)
                counts = jnp.where(here, one.row_steps + before, counts)
            before = before + one.accepted
        # A flow that moves no more stays as it is until the time asked for.
        log_times = jnp.log(save.times).astype(found.log_time.dtype)
        rests = (found.status == until.reached) & last.ends.at_rest & ~last.ends.until
        coming = (counts < 0) & (log_times <= found.log_time) & rests
        rows = jax.tree.map(lambda a, b: jnp.where(_wide(coming, a), b, a), rows, at_end)
        rows = rows._replace(log_time=jnp.where(coming, log_times, rows.log_time))
        return rows, jnp.where(coming, before, counts)
    zero = jnp.zeros(1, int)
    steps = sum(one.accepted for one in stretches)
    if not save.steps:
        rows = jax.tree.map(lambda *both: jnp.stack(both), first.row, at_end)
        return rows, jnp.stack([jnp.asarray(0), jnp.asarray(steps)])
    parts, counts, before = [jax.tree.map(lambda a: a[None], first.row)], [zero], jnp.asarray(0)
    for one in stretches:
        assert one.rows is not None and one.row_steps is not None
        part, count = one.rows, one.row_steps
        if len(stretches) > 1:
            part, count = jax.tree.map(lambda a, n=int(one.accepted): a[:n], (part, count))
        parts.append(part)
        counts.append(jnp.where(count >= 0, count + before, -1))
        before = before + one.accepted
    rows = jax.tree.map(lambda *all_: jnp.concatenate(all_), *parts)
    joined = jnp.concatenate(counts)
    rows = rows._replace(log_time=jnp.where(joined == steps, at_end.log_time, rows.log_time))
    return rows, joined


def _wide(where: Array, like: Array) -> Array:
    return where.reshape(-1, *[1] * (like.ndim - 1))


def _method(steps: Steps, stretches: list[Stretch]) -> str:
    """How a flow was computed, in words."""
    exponential = "exponential Rosenbrock steps"
    if steps.explicit is None:
        return f"{exponential} in the plateau clock"
    name = type(steps.explicit).__name__
    return f"{name} in the plateau clock" if len(stretches) == 1 else f"{name} and {exponential} in the plateau clock"


def _finish(flow: Flow, problem: Problem, found: Integration, until: AbstractUntil) -> Flow:
    """What only a single call outside of transformations does: errors and warnings, and rows cut to those there are."""
    if bool(found.status == Status.met_at_start):
        raise _check.fail(
            "until",
            "not be met at the start",
            f"{until.describe()}, and the loss starts at {float(found.first.row.loss):.6g}",
            "Start from smaller weights (saddlejax.scale_layers) or set a target further on.",
        )
    loss = float(found.first.row.loss)
    if not np.isfinite(loss):
        raise _check.fail(
            "task",
            "have a finite loss at the start",
            f"one whose loss there is {loss}",
            "Look at the outputs of the model: its weights, or those outputs, are too large for the loss.",
        )
    flow = dataclasses.replace(
        trim(flow, int(np.sum(np.asarray(flow.steps) >= 0))), reference=TaskReference(problem.task)
    )
    _warn_where_rounding_matters(flow, problem, found)
    return flow


def _warn_where_rounding_matters(flow: Flow, problem: Problem, found: Integration) -> None:
    memory = found.stretch.state.memory
    dtype, shapes = flow.losses.dtype, problem.parameters.shapes.shapes
    finer = " Or use double precision." if dtype == jnp.float32 else ""
    norms = [np.asarray(row.group_norms) for row in (found.first.row, found.stretch.last)]
    factor = least_factor(*norms, shapes)
    remedy = f"Start from weights at least {factor:.2g} times as large.{finer}"
    if bool(memory.dormant_lost > 0):
        _check.warn(
            "After the first escape something has grown that had been smaller than the rounding of what was learned beside "
            f"it in {dtype}: the times of later plateaus are those of rounding errors. {remedy}"
        )
    if bool(flow.status == Status.below_rounding):
        _check.warn(
            f"The flow stopped where the gradient is nothing but rounding in {dtype}: what is still to be learned is too "
            f"small beside what has been learned. {remedy}"
        )
    smallest = float(smallest_share(flow.rtol))
    if float(memory.least_share) < smallest:
        _check.warn(
            "The flow passed close to a saddle on a path on which the layers cancel to less than "
            f"{smallest:.1g} of themselves, which {dtype} cannot resolve at this rtol: when it left is not known. "
            f"Start elsewhere, or from weights that do not nearly cancel.{finer}"
        )


def _warn_where_origin_is_no_saddle(model: PyTree) -> None:
    if not isinstance(model, AbstractNetwork) or not _check.is_concrete(model.activation):
        return
    at_zero = value_at_zero(model.activation)
    if model.depth > 1 and at_zero != 0:
        _check.warn(
            f"The activation is {at_zero:.3g} at zero, not 0: the origin is then no saddle, since the last layer has a "
            "gradient there. The flow is computed all the same, but the escape laws do not apply to it."
        )
