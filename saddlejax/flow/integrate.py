"""The loop: steps in the plateau clock, until the end is reached."""

import math
from typing import Any, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..networks.mlp import AbstractNetwork, predict
from ..tasks.task import Task, zero_loss
from .clock import PlateauField, start
from .crossing import crossing
from .method import AbstractMethod
from .record import Row, Save, empty_rows, imbalance_residual, row
from .rounding import Dormant, log_gradient_rounding, log_sensitivity, signal_left
from .state import FlowState
from .status import Status
from .stepping import StepSize, cancellation, first_step_size, influence, next_step_size
from .until import AbstractUntil

Kind = Literal["lax", "bounded"]

SMALLEST_STEP = 1e-9
NO_PLATEAU_GRADIENT = 1e-6
NO_PLATEAU_LOSS = 0.5
STILL_ON_PLATEAU = 1e-3
LOSS_ROUNDING = 100
UNDERFLOW_MARGIN = 1e4
LEAST_ERROR, LARGEST_SHARE = 30, 0.1


def smallest_share(rtol: Float[Array, ""]) -> Float[Array, ""]:
    """The smallest part of the weights for which an error of `rtol` beside it stays above the rounding of the whole."""
    return jnp.minimum(LEAST_ERROR * jnp.finfo(rtol.dtype).eps / rtol, LARGEST_SHARE)


class Resolution(eqx.Module):
    """What is remembered to tell whether rounding can matter.

    - `share`: how small a part of the weights the error must be small beside, one unless they nearly cancel.
    - `log_ratio`: the largest logarithm so far of the gradient norm over what it is proportional to.
    - `log_highest`, `log_lowest`: the largest gradient norm so far, and the smallest since dormant parts were lost.
    - `dormant_lost`: whether something smaller than rounding has grown all the same.
    - `cancels`: whether the layers nearly cancelled, down to less than the tolerance can resolve.
    """

    share: Float[Array, ""]
    log_ratio: Float[Array, ""]
    log_highest: Float[Array, ""]
    log_lowest: Float[Array, ""]
    dormant_lost: Bool[Array, ""]
    cancels: Bool[Array, ""]


class Progress(eqx.Module):
    """The carry of the loop."""

    state: FlowState
    rate: FlowState
    step: StepSize
    condition: Float[Array, ""]
    has_risen: Bool[Array, ""]
    resolution: Resolution
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
    dormant_lost: Bool[Array, ""]
    cancels: Bool[Array, ""]
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
    slopes = jax.grad(task.mean_loss)(jnp.zeros((task.samples, task.out_size), task.x.dtype))
    no_signal = jnp.all(slopes == 0)  # nothing then drives the network away from the origin
    dormant = Dormant.of(state.coordinates)
    least_share = smallest_share(rtol)
    longest_step = math.inf if until.asks_for_escape else method.longest_step

    def opposes_signal(state: FlowState) -> Array:
        return jnp.sum(slopes * predict(field.state_net(state), task.x)) > 0

    def resolve(before: Resolution, state: FlowState, rate: FlowState) -> tuple[Resolution, Array]:
        """What is remembered of one more state, and whether its gradient is rounding."""
        share = cancellation(state, rate)
        # Layers that shrink head for the saddle where the outputs are opposed to the signal; beyond a minimum they are not.
        on_plateau = rate.loss_integral > plateau - STILL_ON_PLATEAU * jnp.abs(plateau)
        opposed = jax.lax.cond((share < 1) & on_plateau, opposes_signal, lambda _: jnp.asarray(False), state)
        share = jnp.where(opposed, share, 1)
        log_gradient = field.log_gradient_norm(state, rate)
        sensitivity = log_sensitivity(state.coordinates.log_norms())
        highest = jnp.maximum(before.log_highest, log_gradient)
        # After the first escape something may grow that was too small to be there.
        fallen = (log_gradient < highest - 1) | jnp.isfinite(before.log_lowest)
        lowest = jnp.where(
            fallen & dormant.lost(state.coordinates), jnp.minimum(before.log_lowest, log_gradient), jnp.inf
        )
        ratio = jnp.maximum(before.log_ratio, log_gradient - sensitivity)
        dormant_lost, cancels = (
            before.dormant_lost | (log_gradient > lowest + 1),
            before.cancels | (share < least_share),
        )
        after = Resolution(jnp.maximum(share, least_share), ratio, highest, lowest, dormant_lost, cancels)
        return jax.lax.stop_gradient((after, log_gradient <= log_gradient_rounding(ratio, sensitivity)))

    def body(p: Progress) -> Progress:
        share = p.resolution.share
        attempt = method.attempt(field, p.state, p.rate, p.step.size, share, dense=save.times is not None)
        after, new_rate = attempt.after, attempt.rate
        loss, old_loss = new_rate.loss_integral, p.rate.loss_integral
        # Where little is left of the loss it is the outputs that are rounded, not the loss itself.
        size = jnp.maximum(jnp.abs(old_loss), jnp.sqrt(jnp.abs(old_loss * plateau)))
        rounding = LOSS_ROUNDING * jnp.finfo(loss.dtype).eps * size
        weight = influence(p.state, p.rate) if until.asks_for_escape else 1
        scaled = jax.lax.stop_gradient(jnp.maximum(attempt.error * weight, attempt.time_error) / rtol)
        failed = ~(jnp.isfinite(scaled) & jnp.isfinite(new_rate.time) & (loss <= old_loss + rounding))
        accepted = ((scaled <= 1) | (p.step.size <= min_step)) & ~failed
        step = next_step_size(p.step, scaled, accepted, failed, order, min_step, method.largest_growth, longest_step)

        condition = until.condition(field, after, new_rate)
        ended = accepted & (p.condition < 0) & (condition >= 0)
        resolution, is_rounding = resolve(p.resolution, after, new_rate)
        stalled = accepted & ((new_rate.time == 0) | attempt.settled | (is_rounding & (not method.knows_rest)))
        flat, kept_plateau = _no_plateau(field, after, new_rate, first_gradient, plateau)
        no_plateau = accepted & ~p.has_risen & (condition >= 0) & flat if until.uses_curvature else jnp.asarray(False)
        stuck = ~accepted & (step.size < SMALLEST_STEP * jnp.minimum(step.last_size, 1))
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
            within = method.interpolation(p.step.size, attempt.dense)
            rows, next_row = _rows_at_times(save, field, within, rows, next_row, limit, kind, p.accepted + 1)
        elif save.steps:
            write = accepted & ~ended
            rows = _write(rows, row(save, field, after, new_rate, p.accepted + 1), next_row, write)
            next_row = next_row + write

        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)  # noqa: E731
        return Progress(
            state=keep(after, p.state),
            rate=keep(new_rate, p.rate),
            step=step,
            condition=jnp.where(accepted, condition, p.condition),
            has_risen=p.has_risen | (accepted & (condition < 0)),
            resolution=keep(resolution, p.resolution),
            last_condition=jnp.where(accepted, p.condition, p.last_condition),
            # Wanted only where this step ends the flow, and so was accepted.
            memory=method.remember(attempt, p.state, p.rate),
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
        (until.asks_for_escape & no_signal, Status.no_signal),
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
    tried = eqx.filter_eval_shape(method.attempt, field, state, rate, zero, zero, False)
    no = jnp.asarray(False)
    unknown = Resolution(zero, zero - jnp.inf, zero - jnp.inf, zero + jnp.inf, no, no)
    resolution, _ = resolve(unknown, state, rate)
    memory = eqx.filter_eval_shape(method.remember, tried, state, rate)
    progress = Progress(
        state=state,
        rate=rate,
        step=first_step_size(rtol, order),
        condition=condition,
        has_risen=condition < 0,
        resolution=resolution,
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
    recalled = method.recall(field, p.step.last_size, p.memory)
    interpolation = recalled.interpolation
    s_end, evaluations = _locate(until, field, interpolation, p, ended, method.end_tolerance * rtol)
    inside = interpolation.evaluate(s_end)
    state = jax.tree.map(lambda a, b: jnp.where(ended, a, b), inside, p.state)
    status = _how_it_rests(p.status, until, dormant, field, state)
    log_time = field.log_time(state)
    end_time = until.end_time()
    if end_time is not None:  # to the last digit, and also where the flow came to rest before
        log_time = jnp.where(status == until.reached, jnp.log(end_time), log_time)
    rows, count = p.rows, p.next_row
    if save.times is not None:
        limit = jnp.where(ended, log_time, -jnp.inf)
        rows, count = _rows_at_times(save, field, interpolation, rows, count, limit, kind, p.accepted)
        if end_time is not None:
            limit = jnp.where((status == until.reached) & ~ended, log_time, -jnp.inf)
            rows, count = _rows_at_rest(
                save, row(save, field, state, field.rate(state), p.accepted), rows, count, limit
            )
    else:
        write = ended | (not save.steps)
        last = row(save, field, state, field.rate(state), p.accepted)
        rested = (status == until.reached) & ~ended
        if end_time is not None:
            last = last._replace(log_time=jnp.where(status == until.reached, log_time, last.log_time))
            write = write | rested
        rows = _write(rows, last, count, write)
        count = count + write
    # Rows at the end of a step come for free; the others take a gradient each.
    extra_rows = count if save.times is not None else jnp.asarray(write, int)
    curvature = jnp.asarray(int(until.uses_curvature))
    return Integration(
        status=status,
        log_time=log_time,
        dormant_lost=p.resolution.dormant_lost,
        cancels=p.resolution.cancels,
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
    tolerance = tolerance * jnp.minimum(passed, 1)
    if until.end_time() is not None:  # looking at the time costs next to nothing
        tolerance = 4 * jnp.finfo(tolerance.dtype).eps * p.step.last_size
    tolerance = jax.lax.stop_gradient(jnp.where(ended, tolerance, jnp.inf))
    bracket = jax.lax.stop_gradient((jnp.zeros_like(p.step.last_size), p.step.last_size))
    values = jax.lax.stop_gradient((p.last_condition, p.condition))
    return crossing((until, field, interpolation), bracket, values, tolerance, function=_condition_at)


def _how_it_rests(
    status: Status, until: AbstractUntil, dormant: Dormant, field: PlateauField, state: FlowState
) -> Status:
    """The outcome where the gradient is nothing but rounding: rest for good, a time known beforehand, or lost parts."""
    rests = status == Status.stationary
    lost = rests & dormant.gradient_lost(state.coordinates) & signal_left(field.state_net(state), field.task)
    if until.end_time() is not None:
        status = Status.where(rests, until.reached, status)
    return Status.where(lost, Status.below_rounding, status)


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


def _rows_at_rest(save: Save, last: Row, rows: Row, count: Array, limit: Array) -> tuple[Row, Array]:
    """The rows of the times still to come, up to the logarithmic time `limit`, of a flow that moves no more."""
    assert save.times is not None
    log_times = jnp.log(save.times).astype(last.log_time.dtype)
    coming = (jnp.arange(log_times.size) >= count) & (log_times <= limit)

    def fill(buffer: Array, value: Array) -> Array:
        return jnp.where(coming.reshape(-1, *[1] * value.ndim), value, buffer)

    filled = jax.tree.map(fill, rows, last)
    filled = filled._replace(log_time=jnp.where(coming, log_times, rows.log_time))
    return filled, count + jnp.sum(coming)


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


def _has_underflown(field: PlateauField, state: FlowState, rate: FlowState) -> Bool[Array, ""]:
    """Whether the gradient is, or must be, so small that this floating-point type cannot hold it."""
    log_units = state.coordinates.log_units
    least = jnp.log(UNDERFLOW_MARGIN * jnp.finfo(log_units.dtype).tiny)
    log_gradient = field.log_gradient_norm(state, rate)
    # Where the gradient is exactly zero, the product of all layers but the smallest bounds what it would have been.
    bound = jnp.sum(log_units) - jnp.min(log_units)
    return jnp.where(jnp.isneginf(log_gradient), bound < least, log_gradient < least)
