"""From the start of a flow to its end by `diffrax.diffeqsolve`, and how it ended."""

import math
from typing import Any, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..objective import Problem, TaskObjective
from .clock import PlateauClock, clock_of
from .controller import PlateauController, StepSize
from .field import PlateauField, Scales, field_of
from .record import Row, Save, row
from .rounding import dormant_gradient_lost, dormant_lost, signal_left
from .rows_at_times import RowsAtTimes
from .solvers import PlateauSolver
from .state import ClockState
from .status import Status
from .stiff_solver import StiffPlateauSolver
from .until import AbstractUntil

Kind = Literal["lax", "bounded"]

NO_PLATEAU_GRADIENT = 1e-6
NO_PLATEAU_LOSS = 0.5
STILL_ON_PLATEAU = 1e-3
UNDERFLOW_MARGIN = 1e4


class Steps(eqx.Module):
    """How the steps of a flow are taken.

    - `explicit`: the explicit solver; None for exponential steps.
    - `to_escape`: whether the flow is to end at its first escape.
    - `max_steps`: the most steps to attempt.
    - `patience`: for how many steps in a row the other kind of step may promise to pay before the flow stops for it.
    - `rtol`, `min_step`: of the controller.
    """

    explicit: dfx.AbstractERK | None
    rtol: Float[Array, ""]
    min_step: Float[Array, ""]
    patience: Float[Array, ""]
    to_escape: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def solver(self, kind: Kind) -> dfx.AbstractAdaptiveSolver:
        """The solver of the plateau clock; loops over stages are of the given kind."""
        if self.explicit is None:
            return StiffPlateauSolver(self.rtol)
        inner = eqx.tree_at(lambda s: s.scan_kind, self.explicit, kind, is_leaf=lambda leaf: leaf is None)
        return PlateauSolver(inner)

    @property
    def controller(self) -> PlateauController:
        """The step size controller."""
        if self.explicit is None:
            return PlateauController(self.rtol, self.min_step, self.to_escape, 3.0, math.inf)
        return PlateauController(self.rtol, self.min_step, self.to_escape)


class Ends(NamedTuple):
    """Why a stretch of a flow ended; the first one that holds counts."""

    until: Bool[Array, ""]
    at_rest: Bool[Array, ""]
    no_plateau: Bool[Array, ""]
    unsuited: Bool[Array, ""]


class EndingController(dfx.AbstractStepSizeController):
    """A step size controller that also ends a solve: at rest, without a plateau, or for another kind of step."""

    controller: PlateauController
    patience: Float[Array, ""]
    sees_plateau: bool = eqx.field(static=True)

    def wrap(self, direction: Any) -> "EndingController":
        """The clock runs forwards only."""
        del direction
        return self

    def init(self, *arguments: Any) -> Any:
        """The first step is that of the controller inside."""
        return self.controller.init(*arguments)

    def adapt_step_size(
        self, t0: Any, t1: Any, y0: ClockState, y1: ClockState, args: PlateauField, *others: Any
    ) -> tuple[Any, ...]:
        """The choice of the controller inside, and whether the flow ends."""
        keep, begin, end, made_jump, state, result = self.controller.adapt_step_size(t0, t1, y0, y1, args, *others)
        ends = self.ends(args, y1)
        over = keep & (ends.at_rest | ends.no_plateau | ends.unsuited) | (y0.memory.at_rest > 0)
        result = dfx.RESULTS.where(over, dfx.RESULTS.event_occurred, result)
        return keep & ~(y0.memory.at_rest > 0), begin, end, made_jump, state, result

    def ends(self, field: PlateauField, state: ClockState) -> Ends:
        """Which ends have come at a state whose rate is known."""
        memory = state.memory
        no_plateau = _no_plateau(field, state) if self.sees_plateau else jnp.asarray(False)
        return Ends(jnp.asarray(False), memory.at_rest > 0, no_plateau, memory.unsuited > self.patience)


class Stretch(NamedTuple):
    """A part of a flow that one call of diffrax computes.

    - `state`: at its end, with its rate.
    - `last`: the row there.
    - `rows`, `row_steps`: of the accepted steps, or at the times asked for; the steps until each; None where only ends count.
    - `ends`: why it ended; `stuck`: no step was found whose result is finite and does not raise the loss.
    - `accepted`, `attempts`, `gradients`, `products`: the work.
    - `step_size`: for the next step.
    """

    state: ClockState
    last: Row
    rows: Row | None
    row_steps: Int[Array, " rows"] | None
    ends: Ends
    stuck: Bool[Array, ""]
    accepted: Int[Array, ""]
    attempts: Int[Array, ""]
    gradients: Int[Array, ""]
    products: Int[Array, ""]
    step_size: Float[Array, ""]


def _no_plateau(field: PlateauField, state: ClockState) -> Bool[Array, ""]:
    """Whether a gradient that never rose has fallen for good."""
    memory = state.memory
    rose = memory.log_highest > memory.log_first
    fallen = field.log_gradient_norm(state.vector, state.rate) < memory.log_first + math.log(NO_PLATEAU_GRADIENT)
    loss = field.layout.split(state.rate).loss
    if not field.perceptron:  # a bias that finds its minimum leaves the plateau as it is
        fallen = fallen & (loss < field.plateau - STILL_ON_PLATEAU * jnp.abs(field.plateau))
    return ~rose & (fallen | (loss < NO_PLATEAU_LOSS * field.plateau))


class Place(NamedTuple):
    """Where a solve stands between two calls of diffrax, which go on from here as if they were one.

    - `s`, `state`: the clock and the state.
    - `solver_state`, `step`: of the solver and of the controller; None at the start.
    """

    s: Float[Array, ""]
    state: ClockState
    solver_state: PyTree
    step: StepSize | None


def place_of(state: ClockState) -> Place:
    """The start of a solve."""
    return Place(jnp.zeros_like(state.error), state, None, None)


def solve(
    clock: PlateauClock,
    place: Place,
    until: AbstractUntil,
    save: Save,
    steps: Steps,
    kind: Kind,
    *,
    size: Array | None = None,
    attempts: int | None = None,
    locate: bool = True,
) -> dfx.Solution:
    """Take steps until the flow ends, or so many of them; `size` is the first, by default the controller's choice.

    Where the end is not located, the solve ends with the step in which it lies.
    """
    solver: dfx.AbstractAdaptiveSolver = steps.solver(kind)
    if save.times is not None:
        solver = RowsAtTimes(solver, save)
    saved = {"end": dfx.SubSaveAt(t1=True)}
    if save.times is None and save.steps:
        saved["rows"] = dfx.SubSaveAt(steps=True, fn=lambda t, y, args: row(save, args, y))
    event = clock.event(until, steps.rtol)
    return dfx.diffeqsolve(
        clock.term,
        solver,
        place.s,
        jnp.full_like(place.s, jnp.inf),
        size if place.step is None else place.step.size,
        place.state,
        args=clock.args,
        stepsize_controller=controller_of(steps, until),
        event=event if locate else dfx.Event(event.cond_fn, direction=True),
        saveat=dfx.SaveAt(subs=saved, solver_state=True, controller_state=True),
        adjoint=dfx.ForwardMode() if kind == "lax" else dfx.DirectAdjoint(),
        max_steps=steps.max_steps if attempts is None else attempts,
        throw=False,
        solver_state=place.solver_state,
        controller_state=place.step,
    )


def controller_of(steps: Steps, until: AbstractUntil) -> EndingController:
    return EndingController(steps.controller, steps.patience, until.uses_curvature)


def place_after(solution: dfx.Solution) -> Place:
    """Where a solve stands after some steps."""
    assert solution.ts is not None and solution.ys is not None and solution.controller_state is not None
    s, state = jax.tree.map(lambda a: a[-1], (solution.ts["end"], solution.ys["end"]))
    return Place(s, state, solution.solver_state, solution.controller_state)


def stretch(
    clock: PlateauClock,
    state: ClockState,
    until: AbstractUntil,
    save: Save,
    steps: Steps,
    size: Array | None,
    kind: Kind,
) -> Stretch:
    """Follow a flow from a state whose rate is known until it ends."""
    solution = solve(clock, place_of(state), until, save, steps, kind, size=size)
    accepted, attempts = (jnp.asarray(solution.stats[name]) for name in ("num_accepted_steps", "num_steps"))
    return summary(clock, state, until, save, steps, solution, accepted, attempts)


def summary(
    clock: PlateauClock,
    state: ClockState,
    until: AbstractUntil,
    save: Save,
    steps: Steps,
    solution: dfx.Solution,
    accepted: Int[Array, ""],
    attempts: Int[Array, ""],
) -> Stretch:
    """The stretch that begins at a state and ends with a solve, after so many attempts."""
    field, after = clock.args, place_after(solution)
    end = eqx.tree_at(lambda y: y.rate, after.state, field.motion(after.state.vector))
    last, inner, max_steps = row(save, field, end), after.solver_state, steps.max_steps
    rows, row_steps, for_rows = None, None, jnp.asarray(1)
    if save.times is not None:
        later = inner.rows.log_time > field.log_time(end)
        rows, row_steps = _blank(inner.rows, later), jnp.where(later, -1, inner.steps)
        for_rows, inner = inner.count, inner.inner
    elif save.steps:
        assert solution.ys is not None
        index = jnp.arange(max_steps)
        rows = _blank(jax.tree.map(lambda a: a[:max_steps], solution.ys["rows"]), index >= accepted)
        rows = jax.tree.map(lambda all, one: all.at[jnp.maximum(accepted - 1, 0)].set(one), rows, last)
        rows, row_steps = _blank(rows, index >= accepted), jnp.where(index < accepted, index + 1, -1)
    runs = state.memory.at_rest == 0  # where a flow ends at once the solver has tried a step in vain
    attempts = jnp.where(runs, attempts, 0)
    if steps.explicit is None:
        gradients, products = inner.vector_fields, inner.products
    else:
        gradients, products = PlateauSolver(steps.explicit).gradients(attempts), jnp.asarray(0)
    assert after.step is not None
    return Stretch(
        state=end,
        last=last,
        rows=rows,
        row_steps=row_steps,
        ends=controller_of(steps, until).ends(field, end)._replace(until=jnp.asarray(solution.event_mask)),
        stuck=solution.result == dfx.RESULTS.dt_min_reached,
        accepted=accepted,
        attempts=attempts,
        gradients=gradients + for_rows,
        products=products + (attempts + 1 if until.uses_curvature else 0),
        step_size=after.step.size,
    )


def _blank(rows: Row, where: Bool[Array, " rows"]) -> Row:
    """The rows with NaN in some places."""
    return jax.tree.map(lambda a: jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), jnp.nan, a), rows)


class Begin(NamedTuple):
    """The start of a flow: its scales, the state with its rate, its row, and an outcome where there is one at once."""

    scales: Scales
    state: ClockState
    row: Row
    status: Status


def clock_from(problem: Problem, first: Begin) -> PlateauClock:
    """The clock of a flow whose start is known."""
    return PlateauClock(field_of(problem, first.scales), first.state, first.state.rate)


def begin(problem: Problem, until: AbstractUntil, save: Save) -> Begin:
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
    return Begin(field.scales, state, row(save, field, state), status)


def conclude(problem: Problem, first: Begin, until: AbstractUntil, last: Stretch) -> tuple[Status, Float[Array, ""]]:
    """How a flow ended, and `log t` of its end."""
    field, state, ends = field_of(problem, first.scales), last.state, last.ends
    status = first.status
    runs = status == Status.step_limit
    below = field.layout.split(state.rate).loss > field.plateau - STILL_ON_PLATEAU * jnp.abs(field.plateau)
    for happened, outcome in (
        (last.stuck, Status.non_finite),
        (ends.no_plateau, Status.where(below, Status.stationary, Status.no_plateau)),
        (ends.at_rest, Status.stationary),
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


class Integration(NamedTuple):
    """A flow from its start to its end, in one stretch."""

    first: Begin
    stretch: Stretch
    status: Status
    log_time: Float[Array, ""]


def integrate(problem: Problem, until: AbstractUntil, save: Save, steps: Steps) -> Integration:
    """Follow the gradient flow to its end in one stretch.

    Differentiable in both modes with explicit steps: a plain call runs a plain loop, a differentiated one a loop of
    bounded length.
    """
    found = _arrays(problem, until, save, steps)
    # A function with a derivative of its own returns arrays only; what else the beginning holds, such as an activation, is
    # put back, and what computing it once more would cost is left out by XLA.
    rest = eqx.filter(begin(problem, until, save), eqx.is_array, inverse=True)
    return found._replace(first=eqx.combine(found.first, rest))


@eqx.filter_custom_jvp
def _arrays(problem: Problem, until: AbstractUntil, save: Save, steps: Steps) -> Integration:
    return eqx.filter(_integrate(problem, until, save, steps, "lax"), eqx.is_array)


@_arrays.def_jvp
def _arrays_jvp(primals: tuple, tangents: tuple) -> tuple:
    if primals[3].explicit is None:
        raise NotImplementedError(
            "A flow with stiff=True cannot be differentiated. Leave stiff out: up to the first escape explicit steps are as "
            "fast, and derivatives go through them."
        )

    def bounded(*arguments: Any) -> Integration:
        return eqx.filter(_integrate(*arguments, kind="bounded"), eqx.is_array)

    return eqx.filter_jvp(bounded, primals, tangents)


def _integrate(problem: Problem, until: AbstractUntil, save: Save, steps: Steps, kind: Kind) -> Integration:
    first = begin(problem, until, save)
    found = stretch(clock_from(problem, first), first.state, until, save, steps, None, kind)
    return Integration(first, found, *conclude(problem, first, until, found))
