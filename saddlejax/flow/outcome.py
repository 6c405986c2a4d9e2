"""How a flow begins, with an outcome where it ends at once, and how it ended."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..objective import Problem, TaskObjective
from .clock import PlateauClock, clock_of
from .ending import Ends
from .field import PlateauField, Scales, field_of
from .rounding import dormant_gradient_lost, dormant_lost, signal_left
from .state import ClockState
from .status import Status
from .until import AbstractUntil

UNDERFLOW_MARGIN = 1e4


class Begin(NamedTuple):
    """The start of a flow: its scales, the state with its rate, and an outcome where there is one at once."""

    scales: Scales
    state: ClockState
    status: Status


def clock_from(problem: Problem, first: Begin) -> PlateauClock:
    """The clock of a flow whose start is known."""
    return PlateauClock(field_of(problem, first.scales), first.state, first.state.rate)


def begin(problem: Problem, until: AbstractUntil) -> Begin:
    """The start of a flow. Where it ends at once, its state is at rest, so that no step is taken."""
    clock = clock_of(problem)
    field = clock.args
    state = eqx.tree_at(lambda y: y.rate, clock.y0, clock.rate)
    moving = field.layout.split(state.rate)
    met = jnp.asarray(False) if until.uses_curvature else until.condition(field, state) >= 0
    status: Status = Status.step_limit
    for happened, outcome in (
        (met, Status.met_at_start),
        (until.asks_for_escape & ~problem.objective.has_signal(), Status.no_signal),
        (moving.time == 0, Status.stationary),
        (_has_underflown(field, state), Status.underflow),
        (~jnp.isfinite(moving.time * moving.loss), Status.non_finite),
    ):
        status = Status.where(happened, outcome, status)
    over = jnp.where(status == Status.step_limit, 0, 1).astype(state.vector.dtype)
    state = eqx.tree_at(lambda y: y.memory, state, state.memory._replace(at_rest=over))
    return Begin(field.scales, state, status)


def conclude(
    problem: Problem, first: Begin, until: AbstractUntil, state: ClockState, ends: Ends, stuck: Bool[Array, ""]
) -> tuple[Status, Float[Array, ""]]:
    """How a flow ended, and `log t` of its end, from its last state and why it stopped there.

    It is `stuck` where no step was found whose result is finite and does not raise the loss.
    """
    field = field_of(problem, first.scales)
    status = first.status
    runs = status == Status.step_limit
    lowered = field.has_left_plateau(field.layout.split(state.rate).loss)
    never_rose = lowered & (state.memory.rises == 0) if until.uses_curvature and not field.perceptron else False
    for happened, outcome in (
        (stuck, Status.non_finite),
        (ends.no_step, Status.stuck),
        (ends.no_plateau, Status.where(lowered, Status.no_plateau, Status.stationary)),
        (ends.at_rest, Status.where(never_rose, Status.no_plateau, Status.stationary)),
        (ends.until, until.reached),
    ):
        status = Status.where(runs & happened, outcome, status)
    status = _how_it_rests(status, until, field, state)
    log_time, end_time = field.log_time(state), until.end_time()
    if end_time is not None:  # to the last digit, and also where the flow came to rest before
        log_time = jnp.where(status == until.reached, jnp.log(end_time), log_time)
    return status, log_time


def _how_it_rests(status: Status, until: AbstractUntil, field: PlateauField, state: ClockState) -> Status:
    """The outcome where the gradient is nothing but rounding: rest for good, a time known beforehand, or lost parts."""
    rests = status == Status.stationary
    log_norms = field.layout.split(state.vector).coordinates.log_norms()
    if field.perceptron and isinstance(field.objective, TaskObjective):
        model = field.model(state)
        lost = dormant_gradient_lost(field.scales.log_sizes, log_norms) & signal_left(model, field.objective.task)
    else:
        lost = dormant_lost(field.scales.log_sizes, log_norms)
    if until.end_time() is not None:
        status = Status.where(rests, until.reached, status)
    return Status.where(rests & lost, Status.below_rounding, status)


def _has_underflown(field: PlateauField, state: ClockState) -> Bool[Array, ""]:
    """Whether the gradient is, or must be, so small that this floating-point type cannot hold it."""
    log_units = field.layout.split(state.vector).coordinates.log_units
    least = jnp.log(UNDERFLOW_MARGIN * jnp.finfo(log_units.dtype).tiny)
    log_gradient = field.log_gradient_norm(state.vector, state.rate)
    # Where the gradient of a perceptron is exactly zero, the product of all layers but the smallest bounds what it was.
    bound = jnp.sum(log_units) - jnp.min(log_units) if field.perceptron else jnp.zeros_like(least)
    return jnp.where(jnp.isneginf(log_gradient), bound < least, log_gradient < least)
