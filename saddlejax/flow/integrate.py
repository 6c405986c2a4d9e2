"""From the start of a flow to its end by `diffrax.diffeqsolve`, and how it ended."""

import math
from typing import Any, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..objective import Problem
from .clock import PlateauClock
from .controller import PlateauController, StepSize
from .ending import EndingController, Ends
from .outcome import Begin, begin, clock_from, conclude
from .record import Row, Save, row, where_rows
from .rows_at_times import RowsAtTimes
from .sliding_solver import NEXT_TO_NOTHING, SlidingSolver, SlidingWork, least_motion
from .solvers import PlateauSolver
from .state import ClockState
from .status import Status
from .stiff_solver import StiffPlateauSolver
from .until import AbstractUntil

Kind = Literal["lax", "bounded"]
FIRST_KINKED_RTOL = 2e-4
"""The largest tolerance of flows along kinks until they leave the first plateau."""


class Steps(eqx.Module):
    """How the steps of a flow are taken.

    - `explicit`: the explicit solver; None for exponential steps.
    - `to_escape`: whether the flow is to end at its first escape.
    - `slides`: whether it slides along the kinks of activations.
    - `max_steps`: the most steps to attempt.
    - `patience`: the flow stops once the other kind would have paid in so many more steps than not.
    - `rtol`, `min_step`: of the controller.
    """

    explicit: dfx.AbstractERK | None
    rtol: Float[Array, ""]
    min_step: Float[Array, ""]
    patience: Float[Array, ""]
    to_escape: bool = eqx.field(static=True)
    slides: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def solver(self, kind: Kind) -> dfx.AbstractAdaptiveSolver:
        """The solver of the plateau clock; loops over stages are of the given kind."""
        if self.explicit is None:
            # At kinks modes are not learned one by one, and an error relative to singular values would be far too strict.
            solver: PlateauSolver | StiffPlateauSolver = StiffPlateauSolver(self.rtol, at_kinks=self.slides)
        else:
            inner = eqx.tree_at(lambda s: s.scan_kind, self.explicit, kind, is_leaf=lambda leaf: leaf is None)
            solver = PlateauSolver(inner)
        return SlidingSolver(solver) if self.slides else solver

    @property
    def controller(self) -> PlateauController:
        """The step size controller."""
        first = FIRST_KINKED_RTOL if self.slides else math.inf
        if self.explicit is None:
            return PlateauController(self.rtol, self.min_step, self.to_escape, 3.0, math.inf, first)
        return PlateauController(self.rtol, self.min_step, self.to_escape, first_rtol=first)


class Stretch(NamedTuple):
    """A part of a flow that one call of diffrax computes.

    - `state`: at its end, with its rate.
    - `first`, `last`: the rows of its first state and of its last.
    - `rows`, `row_steps`: of the accepted steps, or at the times asked for; the steps until each; None where only ends count.
    - `ends`: why it ended; `stuck`: no step was found whose result is finite and does not raise the loss.
    - `accepted`, `attempts`, `gradients`, `products`: the work; `kinks`: that on kinks, where the flow slides along them.
    """

    state: ClockState
    first: Row
    last: Row
    rows: Row | None
    row_steps: Int[Array, " rows"] | None
    ends: Ends
    stuck: Bool[Array, ""]
    accepted: Int[Array, ""]
    attempts: Int[Array, ""]
    gradients: Int[Array, ""]
    products: Int[Array, ""]
    kinks: SlidingWork | None


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
    attempts: int | None = None,
    locate: bool = True,
) -> dfx.Solution:
    """Take steps until the flow ends, or so many of them.

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
        None if place.step is None else place.step.size,
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
    """What chooses the steps of a flow, and ends it before its time."""
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
    kind: Kind,
) -> Stretch:
    """Follow a flow from a state whose rate is known until it ends."""
    solution = solve(clock, place_of(state), until, save, steps, kind)
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
    inner = after.solver_state.inner if save.times is not None else after.solver_state
    if not steps.slides:
        moving = last_moving = field.motion(after.state.vector)
    else:
        # A flow that goes on finds out what slides; one that ends here knows it from its last step.
        slides = jnp.stack([jnp.zeros_like(inner.sides.which), inner.sides.which])
        moving, last_moving = jax.lax.map(lambda which: least_motion(field, after.state.vector, which), slides)
    goes_on, end = (eqx.tree_at(lambda y: y.rate, after.state, rate) for rate in (moving, last_moving))
    # A loop over the two, so that a row is compiled once.
    outer = jax.lax.map(lambda y: row(save, field, y), jax.tree.map(lambda *two: jnp.stack(two), state, end))
    first, last = (jax.tree.map(lambda a, n=n: a[n], outer) for n in (0, 1))
    max_steps = steps.max_steps
    rows, row_steps, for_rows = None, None, jnp.asarray(1)
    if save.times is not None:
        of_rows = after.solver_state
        later = of_rows.rows.log_time > field.log_time(end)
        rows, row_steps = _blank(of_rows.rows, later), jnp.where(later, -1, of_rows.steps)
        for_rows = of_rows.count
    elif save.steps:
        assert solution.ys is not None
        index = jnp.arange(max_steps)
        rows = where_rows(index == accepted - 1, last, jax.tree.map(lambda a: a[:max_steps], solution.ys["rows"]))
        rows, row_steps = _blank(rows, index >= accepted), jnp.where(index < accepted, index + 1, -1)
    ends = controller_of(steps, until).ends(field, end)._replace(until=jnp.asarray(solution.event_mask))
    stuck = solution.result == dfx.RESULTS.dt_min_reached
    if steps.slides:
        # Where no step lowers the loss that may be since it is stationary in Clarke's sense, up to rounding.
        gradient = field.log_gradient_norm(end.vector, end.rate)
        rests = stuck & (gradient < end.memory.log_highest + math.log(NEXT_TO_NOTHING))
        ends = ends._replace(at_rest=ends.at_rest | rests, no_step=stuck & ~rests)
        stuck = jnp.zeros_like(stuck)
    runs = state.memory.at_rest == 0  # where a flow ends at once the solver has tried a step in vain
    attempts = jnp.where(runs, attempts, 0)
    kinks = None
    if steps.slides:
        inner, kinks = inner.inner, inner.work
    if steps.explicit is None:
        gradients, products = inner.vector_fields, inner.products
    else:
        gradients, products = PlateauSolver(steps.explicit).gradients(attempts), jnp.asarray(0)
    if kinks is not None:
        # Every step begins with another field, so that its first stage is not the last one of the step before.
        again = attempts if steps.explicit is not None else 0
        gradients, products = gradients + again + kinks.gradients, products + kinks.products
    return Stretch(
        state=goes_on,
        first=first,
        last=last,
        rows=rows,
        row_steps=row_steps,
        ends=ends,
        stuck=stuck,
        accepted=accepted,
        attempts=attempts,
        gradients=gradients + for_rows,
        products=products + (attempts + 1 if until.uses_curvature else 0),
        kinks=kinks,
    )


def _blank(rows: Row, where: Bool[Array, " rows"]) -> Row:
    """The rows with NaN in some places."""
    return where_rows(where, jax.tree.map(lambda a: jnp.full_like(a[0], jnp.nan), rows), rows)


class Integration(NamedTuple):
    """A flow from its start to its end, in one stretch."""

    first: Begin
    stretch: Stretch
    status: Status
    log_time: Float[Array, ""]


@eqx.filter_custom_jvp
def integrate(problem: Problem, until: AbstractUntil, save: Save, steps: Steps) -> Integration:
    """Follow the gradient flow to its end in one stretch.

    Differentiable in both modes with explicit steps: a plain call runs a plain loop, a differentiated one a loop of
    bounded length.
    """
    return _integrate(problem, until, save, steps, "lax")


@integrate.def_jvp
def _integrate_jvp(primals: tuple, tangents: tuple) -> tuple:
    if primals[3].slides:
        raise NotImplementedError(
            "A flow past its first escape slides along the kinks of its activations, and cannot be differentiated there. End "
            "it at the escape, by until=saddlejax.Escape(), or use an activation without kinks."
        )
    if primals[3].explicit is None:
        raise NotImplementedError(
            "A flow with stiff=True cannot be differentiated. Leave stiff out: up to the first escape explicit steps are as "
            "fast, and derivatives go through them."
        )

    def bounded(*arguments: Any) -> Integration:
        return _integrate(*arguments, kind="bounded")

    return eqx.filter_jvp(bounded, primals, tangents)


def _integrate(problem: Problem, until: AbstractUntil, save: Save, steps: Steps, kind: Kind) -> Integration:
    first = begin(problem, until)
    found = stretch(clock_from(problem, first), first.state, until, save, steps, kind)
    return Integration(first, found, *conclude(problem, first, until, found.state, found.ends, found.stuck))
