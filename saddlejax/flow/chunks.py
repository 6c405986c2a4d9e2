"""A flow taken a few steps at a time, for batches whose finished lanes are replaced."""

from typing import NamedTuple

import diffrax as dfx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .. import _check
from .assemble import record
from .integrate import Integration, Place, controller_of, place_after, place_of, solve, summary
from .outcome import Begin, begin as start, clock_from, conclude
from .plan import FlowPlan, plan_flow as plan_flow
from .result import Flow


class FlowInChunks(NamedTuple):
    """A flow on its way.

    - `first`: its start.
    - `before`, `place`: where it stood before the last chunk of steps, and where it stands.
    - `accepted`, `attempts`: the steps until `before`; `more_accepted`, `more_attempts`: those of the last chunk.
    - `runs`: whether there is more to do.
    """

    first: Begin
    before: Place
    place: Place
    accepted: Int[Array, ""]
    attempts: Int[Array, ""]
    more_accepted: Int[Array, ""]
    more_attempts: Int[Array, ""]
    runs: Bool[Array, ""]


def begin(plan: FlowPlan) -> FlowInChunks:
    """The flow before its first step.

    **Raises:** `ValueError` where more rows than the first and the last are to be kept.
    """
    if plan.save.steps or plan.save.times is not None:
        raise _check.fail("save", "keep the first and the last row only in a batch", "one that keeps more")
    first = start(plan.problem, plan.until)
    clock, zero = clock_from(plan.problem, first), jnp.asarray(0)
    at, state = place_of(first.state)[:2]
    # What diffrax does before the first step, without compiling a solve for it.
    solver, controller = plan.steps.solver("lax"), controller_of(plan.steps, plan.until)
    order = solver.error_order(clock.term)
    after, step = controller.init(clock.term, at, jnp.inf, state, None, clock.args, solver.func, order)
    place = Place(at, state, solver.init(clock.term, at, after, state, clock.args), step)
    return FlowInChunks(first, place, place, zero, zero, zero, zero, jnp.asarray(True))


def advance(plan: FlowPlan, flow: FlowInChunks, attempts: int) -> FlowInChunks:
    """The flow after at most so many more attempts; it stops with the step in which its end lies."""
    solution = solve(
        clock_from(plan.problem, flow.first), flow.place, *plan[1:], "lax", attempts=attempts, locate=False
    )
    tried = flow.attempts + flow.more_attempts
    more = jnp.asarray(solution.stats["num_steps"])
    goes_on = (solution.result == dfx.RESULTS.max_steps_reached) & (tried + more < plan.steps.max_steps)
    return FlowInChunks(
        first=flow.first,
        before=flow.place,
        place=place_after(solution),
        accepted=flow.accepted + flow.more_accepted,
        attempts=tried,
        more_accepted=jnp.asarray(solution.stats["num_accepted_steps"]),
        more_attempts=more,
        runs=goes_on,
    )


def finish(plan: FlowPlan, flow: FlowInChunks, attempts: int) -> Flow:
    """The record of a flow that has ended: its last chunk is taken once more, to locate the end within its step."""
    first, clock = flow.first, clock_from(plan.problem, flow.first)
    solution = solve(clock, flow.before, *plan[1:], "lax", attempts=attempts)
    accepted, tried = flow.accepted + flow.more_accepted, flow.attempts + 2 * flow.more_attempts
    found = summary(clock, first.state, *plan[1:], solution, accepted, tried)
    found = found._replace(attempts=flow.attempts + flow.more_attempts)
    outcome = conclude(plan.problem, first, plan.until, found.state, found.ends, found.stuck)
    return record(plan, Integration(first, found, *outcome), [found])
