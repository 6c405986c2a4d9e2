"""The loop: steps in the plateau clock, until the end is reached."""

from typing import Any, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..networks import AbstractNetwork
from ..tasks.task import Task, zero_loss
from .clock import PlateauField, start
from .crossing import crossing
from .method import AbstractMethod
from .record import Row, Save, empty_rows, imbalance_residual, row
from .state import FlowState
from .status import Status
from .stepping import StepSize, first_step_size, influence, next_step_size
from .until import AbstractUntil

Kind = Literal["lax", "bounded"]

SMALLEST_STEP = 1e-9
NO_PLATEAU_GRADIENT = 1e-6
NO_PLATEAU_LOSS = 0.5
STILL_ON_PLATEAU = 1e-3
LOSS_ROUNDING = 100
UNDERFLOW_MARGIN = 1e4


class Progress(eqx.Module):
    """The carry of the loop."""

    s: Float[Array, ""]
    state: FlowState
    rate: FlowState
    step: StepSize
    condition: Float[Array, ""]
    has_risen: Bool[Array, ""]
    last_s: Float[Array, ""]
    last_condition: Float[Array, ""]
    memory: PyTree
    rows: Row
    next_row: Int[Array, ""]
    attempts: Int[Array, ""]
    gradients: Int[Array, ""]
    products: Int[Array, ""]
    accepted: Int[Array, ""]
    status: Status
    running: Bool[Array, ""]


class Integration(NamedTuple):
    """What the loop leaves."""

    status: Status
    log_time: Float[Array, ""]
    net: AbstractNetwork
    rows: Row
    row_count: Int[Array, ""]
    imbalance_residual: Float[Array, "rows hidden"]
    steps: Int[Array, ""]
    rejected_steps: Int[Array, ""]
    gradient_evaluations: Int[Array, ""]
    hessian_vector_products: Int[Array, ""]


@eqx.filter_custom_jvp
def integrate(
    net: AbstractNetwork,
    task: Task,
    until: AbstractUntil,
    save: Save,
    rtol: Float[Array, ""],
    min_step: Float[Array, ""],
    *,
    method: AbstractMethod,
    max_steps: int,
) -> Integration:
    """Follow the gradient flow to its end.

    Differentiable in both modes with an explicit method: a plain call runs a plain loop, a differentiated one a loop of
    bounded length. With the exponential method it is not differentiable.
    """
    return _integrate(net, task, until, save, rtol, min_step, method, max_steps, "lax")


@integrate.def_jvp
def _integrate_jvp(primals: tuple, tangents: tuple, *, method: AbstractMethod, max_steps: int) -> tuple:
    if not method.differentiable:
        raise NotImplementedError(
            "A flow with stiff=True cannot be differentiated. Leave stiff out: up to the first escape the explicit method "
            "is as fast, and derivatives go through it."
        )

    def bounded(*arguments: Any) -> Integration:
        return _integrate(*arguments, method=method, max_steps=max_steps, kind="bounded")

    return eqx.filter_jvp(bounded, primals, tangents)


def _integrate(
    net: AbstractNetwork,
    task: Task,
    until: AbstractUntil,
    save: Save,
    rtol: Float[Array, ""],
    min_step: Float[Array, ""],
    method: AbstractMethod,
    max_steps: int,
    kind: Kind,
) -> Integration:
    field, state, rate = start(net, task)
    order = method.order()
    plateau = zero_loss(task)
    first_gradient = field.log_gradient_norm(state, rate)

    def body(p: Progress) -> Progress:
        attempt = method.attempt(field, p.s, p.state, p.rate, p.step.size, dense=save.times is not None)
        after, new_rate = attempt.after, attempt.rate
        loss, old_loss = new_rate.loss_integral, p.rate.loss_integral
        # Where little is left of the loss it is the outputs that are rounded, not the loss itself.
        size = jnp.maximum(jnp.abs(old_loss), jnp.sqrt(jnp.abs(old_loss * plateau)))
        rounding = LOSS_ROUNDING * jnp.finfo(loss.dtype).eps * size
        weight = influence(p.state, p.rate) if until.asks_for_escape else 1
        scaled = jax.lax.stop_gradient(jnp.maximum(attempt.error * weight, attempt.time_error) / rtol)
        failed = ~(jnp.isfinite(scaled) & jnp.isfinite(new_rate.time) & (loss <= old_loss + rounding))
        accepted = ((scaled <= 1) | (p.step.size <= min_step)) & ~failed
        step = next_step_size(p.step, scaled, accepted, failed, order, min_step, method.largest_growth)

        condition = until.condition(field, after, new_rate)
        ended = accepted & (p.condition < 0) & (condition >= 0)
        stalled = accepted & ((new_rate.time == 0) | attempt.settled)
        flat, kept_plateau = _no_plateau(field, after, new_rate, first_gradient, plateau)
        no_plateau = accepted & ~p.has_risen & (condition >= 0) & flat if until.uses_curvature else jnp.asarray(False)
        stuck = ~accepted & (step.size < SMALLEST_STEP)
        status = p.status
        for happened, outcome in (
            (no_plateau, Status.where(kept_plateau, Status.stationary, Status.no_plateau)),
            (stuck, Status.non_finite),
            (stalled, Status.stationary),
            (ended, until.reached),
        ):
            status = Status.where(happened, outcome, status)

        rows, next_row = p.rows, p.next_row
        if save.times is not None:
            limit = jnp.where(accepted & ~ended, field.log_time(after), -jnp.inf)
            within = method.interpolation(p.s, p.s + p.step.size, attempt.dense)
            rows, next_row = _rows_at_times(save, field, within, rows, next_row, limit, kind, p.accepted + 1)
        elif save.steps:
            write = accepted & ~ended
            rows = _write(rows, row(save, field, after, new_rate, p.accepted + 1), next_row, write)
            next_row = next_row + write

        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)  # noqa: E731
        return Progress(
            s=jnp.where(accepted, p.s + p.step.size, p.s),
            state=keep(after, p.state),
            rate=keep(new_rate, p.rate),
            step=step,
            condition=jnp.where(accepted, condition, p.condition),
            has_risen=p.has_risen | (accepted & (condition < 0)),
            last_s=jnp.where(accepted, p.s, p.last_s),
            last_condition=jnp.where(accepted, p.condition, p.last_condition),
            # Wanted only where this step ends the flow, and so was accepted.
            memory=method.remember(attempt, p.state, p.rate, p.step.size),
            rows=rows,
            next_row=next_row,
            attempts=p.attempts + 1,
            gradients=p.gradients + attempt.gradients,
            products=p.products + attempt.products,
            accepted=p.accepted + accepted,
            status=status,
            running=~(no_plateau | stuck | stalled | ended),
        )

    condition = until.condition(field, state, rate)
    met = (condition >= 0) & (not until.uses_curvature)
    status: Status = Status.step_limit
    for happened, outcome in (
        (met, Status.met_at_start),
        (until.asks_for_escape & _has_no_signal(task), Status.no_signal),
        (rate.time == 0, Status.stationary),
        (_has_underflown(field, state, rate), Status.underflow),
        (~jnp.isfinite(rate.time * rate.loss_integral), Status.non_finite),
    ):
        status = Status.where(happened, outcome, status)
    zero = jnp.zeros_like(rtol)
    first = row(save, field, state, rate, jnp.asarray(0))
    rows = empty_rows(first, save.rows(max_steps))
    if save.times is None:
        rows = _write(rows, first, jnp.asarray(0), jnp.asarray(True))
    tried = eqx.filter_eval_shape(method.attempt, field, zero, state, rate, zero, False)
    memory = eqx.filter_eval_shape(method.remember, tried, state, rate, zero)
    progress = Progress(
        s=zero,
        state=state,
        rate=rate,
        step=first_step_size(rtol, order),
        condition=condition,
        has_risen=condition < 0,
        last_s=zero,
        last_condition=condition,
        memory=jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), memory),
        rows=rows,
        next_row=jnp.asarray(0 if save.times is not None else 1),
        attempts=jnp.asarray(0),
        gradients=jnp.asarray(0),
        products=jnp.asarray(0),
        accepted=jnp.asarray(0),
        status=status,
        running=status == Status.step_limit,
    )
    p = eqxi.while_loop(lambda p: p.running, body, progress, max_steps=max_steps, buffers=lambda p: p.rows, kind=kind)

    ended = p.status == until.reached
    last_end = jnp.where(p.accepted > 0, p.s, 1)
    recalled = method.recall(field, p.last_s, last_end, p.memory)
    interpolation = recalled.interpolation
    s_end, evaluations = _locate(until, field, interpolation, p, ended, method.end_tolerance * rtol)
    inside = interpolation.evaluate(s_end)
    state = jax.tree.map(lambda a, b: jnp.where(ended, a, b), inside, p.state)
    log_time = field.log_time(state)
    rows, count = p.rows, p.next_row
    if save.times is not None:
        limit = jnp.where(ended, log_time, -jnp.inf)
        rows, count = _rows_at_times(save, field, interpolation, rows, count, limit, kind, p.accepted)
    else:
        write = ended | (not save.steps)
        rows = _write(rows, row(save, field, state, field.rate(state), p.accepted), count, write)
        count = count + write
    # Rows at the end of a step come for free; the others take a gradient each.
    extra_rows = count if save.times is not None else jnp.asarray(write, int)
    curvature = jnp.asarray(int(until.uses_curvature))
    return Integration(
        status=p.status,
        log_time=log_time,
        net=field.state_net(state),
        rows=rows,
        row_count=count,
        imbalance_residual=imbalance_residual(rows, first.imbalance),
        steps=p.accepted,
        rejected_steps=p.attempts - p.accepted,
        gradient_evaluations=1 + p.gradients + ended * recalled.gradients + curvature * evaluations + extra_rows,
        hessian_vector_products=p.products + ended * recalled.products + curvature * (1 + p.attempts + evaluations),
    )


def _condition_at(params: tuple, s: Array) -> Array:
    until, field, interpolation = params
    return until.condition_at(field, interpolation.evaluate(s))


def _locate(
    until: AbstractUntil,
    field: PlateauField,
    interpolation: dfx.AbstractLocalInterpolation,
    p: Progress,
    ended: Bool[Array, ""],
    tolerance: Float[Array, ""],
) -> tuple[Array, Array]:
    # Where τ is long beside the time passed, the time of the end asks for more; no evaluations where there is no end.
    passed = jnp.where(p.rate.time > 0, p.state.time / jnp.where(p.rate.time > 0, p.rate.time, 1), 1)
    tolerance = jax.lax.stop_gradient(jnp.where(ended, tolerance * jnp.minimum(passed, 1), jnp.inf))
    bracket = jax.lax.stop_gradient((p.last_s, p.s))
    values = jax.lax.stop_gradient((p.last_condition, p.condition))
    return crossing((until, field, interpolation), bracket, values, tolerance, function=_condition_at)


def _time_at(params: tuple, s: Array) -> Array:
    interpolation, time = params
    return interpolation.evaluate(s).time - time


def _rows_at_times(
    save: Save,
    field: PlateauField,
    interpolation: dfx.AbstractLocalInterpolation,
    rows: Row,
    next_row: Array,
    limit: Array,
    kind: Kind,
    steps: Array,
) -> tuple[Row, Array]:
    """Write the rows of the times asked for, up to the logarithmic time `limit`, that lie within a step."""
    assert save.times is not None
    s, end = jnp.asarray(interpolation.t0), jnp.asarray(interpolation.t1)
    log_times = jnp.log(save.times).astype(s.dtype)

    def waiting(carry: tuple[Row, Array]) -> Array:
        index = carry[1]
        return (index < log_times.size) & (log_times[jnp.minimum(index, log_times.size - 1)] <= limit)

    def write(carry: tuple[Row, Array]) -> tuple[Row, Array]:
        rows, index = carry
        # In units of τ(θ_0), as the state holds it: nearly linear in s from the first step on.
        log_time = log_times[jnp.minimum(index, log_times.size - 1)]
        params = (interpolation, jnp.exp(log_time - field.log_time_unit))
        bracket = jax.lax.stop_gradient((s, end))
        ends = jax.lax.stop_gradient(tuple(_time_at(params, end) for end in bracket))
        at, _ = crossing(params, bracket, ends, 4 * jnp.finfo(s.dtype).eps * (end - s), function=_time_at)
        state = interpolation.evaluate(at)
        return _write(rows, row(save, field, state, field.rate(state), steps), index, jnp.asarray(True)), index + 1

    return eqxi.while_loop(
        waiting, write, (rows, next_row), max_steps=log_times.size, buffers=lambda carry: carry[0], kind=kind
    )


def _write(rows: Row, values: Row, index: Array, wanted: Array) -> Row:
    def put(buffer: Array, value: Array) -> Array:
        if isinstance(buffer, jax.Array):
            return jnp.where(wanted, buffer.at[index].set(value), buffer)
        return buffer.at[index].set(value, pred=wanted)  # a buffer inside a loop

    return jax.tree.map(put, rows, values, is_leaf=lambda leaf: hasattr(leaf, "at"))


def _no_plateau(
    field: PlateauField, state: FlowState, rate: FlowState, first_gradient: Array, plateau: Array
) -> tuple[Array, Array]:
    """Whether a gradient that never rose has fallen for good, and whether the loss is still that of the plateau."""
    fallen = field.log_gradient_norm(state, rate) < first_gradient + jnp.log(NO_PLATEAU_GRADIENT)
    below = rate.loss_integral < NO_PLATEAU_LOSS * plateau
    return fallen | below, rate.loss_integral > (1 - STILL_ON_PLATEAU) * plateau


def _has_no_signal(task: Task) -> Bool[Array, ""]:
    """Whether `∂c/∂f` vanishes at zero output for every sample: nothing then drives the network away from the origin."""
    pull = jax.grad(task.mean_loss)(jnp.zeros((task.samples, task.out_size), task.x.dtype))
    return jnp.all(pull == 0)


def _has_underflown(field: PlateauField, state: FlowState, rate: FlowState) -> Bool[Array, ""]:
    """Whether the gradient is, or must be, so small that this floating-point type cannot hold it."""
    log_units = state.coordinates.log_units
    least = jnp.log(UNDERFLOW_MARGIN * jnp.finfo(log_units.dtype).tiny)
    log_gradient = field.log_gradient_norm(state, rate)
    # Where the gradient is exactly zero, the product of all layers but the smallest bounds what it would have been.
    bound = jnp.sum(log_units) - jnp.min(log_units)
    return jnp.where(jnp.isneginf(log_gradient), bound < least, log_gradient < least)
