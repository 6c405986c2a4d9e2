"""A flow that changes from explicit steps to exponential ones and back, by what it meets."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._host.threads import one_blas_thread
from .integrate import Integration, Stretch, stretch
from .outcome import Begin, begin, clock_from, conclude
from .plan import SMOOTH_RTOL, STIFF_RTOL, FlowPlan
from .state import ClockState
from .status import Status

STIFF_STEPS = 15
"""After so many more steps bounded by stability than not, exponential ones are tried."""
UNPAID_STEPS = 3
"""After so many more exponential steps that explicit ones would have been cheaper than, the flow goes back."""
LARGEST_STIFF_RTOL = 0.1


@eqx.filter_jit
def _go_on(plan: FlowPlan, first: Begin, state: ClockState) -> tuple[Stretch, Status, Float[Array, ""]]:
    found = stretch(clock_from(plan.problem, first), state, plan.until, plan.save, plan.steps, "lax")
    return found, *conclude(plan.problem, first, plan.until, found.state, found.ends, found.stuck)


_begin = eqx.filter_jit(begin)


def follow(plan: FlowPlan) -> tuple[Integration, list[Stretch]]:
    """Follow a flow from its start, by whichever kind of step it asks for."""
    first = _begin(plan.problem, plan.until)
    with one_blas_thread():
        found, status, log_time = jax.block_until_ready(_go_on(plan, first, first.state))
    return follow_on(plan, Integration(first, found, status, log_time))


def follow_on(plan: FlowPlan, found: Integration) -> tuple[Integration, list[Stretch]]:
    """Follow a flow on by the other kind of step, as long as it stops for that.

    The first step of the other kind is that of a new flow, since the last one was bounded by something else. Each time that
    explicit steps turn out to be bounded by stability again, they are given twice the time.
    """
    steps = plan.steps
    coarser = 1 if steps.slides else STIFF_RTOL / SMOOTH_RTOL
    stiff_rtol = jnp.minimum(coarser * steps.rtol, LARGEST_STIFF_RTOL)
    stretches, first = [found.stretch], found.first
    exponential, patience = False, 1
    while stopped_for_other_steps(stretches[-1]) and sum(int(one.attempts) for one in stretches) < steps.max_steps:
        last = stretches[-1]
        exponential = not exponential
        waits = UNPAID_STEPS if exponential else STIFF_STEPS * patience
        kind = dataclasses.replace(
            steps,
            explicit=None if exponential else steps.explicit,
            rtol=stiff_rtol if exponential else steps.rtol,
            patience=jnp.full_like(steps.patience, waits),
        )
        patience *= 1 if exponential or steps.slides else 2
        memory = last.state.memory._replace(unsuited=jnp.zeros_like(steps.patience))
        state = eqx.tree_at(lambda y: y.memory, last.state, memory)
        with one_blas_thread():
            new, status, log_time = jax.block_until_ready(_go_on(plan._replace(steps=kind), first, state))
        stretches.append(new)
        found = Integration(first, new, status, log_time)
    return found, stretches


def stopped_for_other_steps(last: Stretch) -> bool:
    """Whether a stretch ended for want of another kind of step, and for nothing else."""
    ends = last.ends
    return bool(ends.unsuited & ~(ends.until | ends.at_rest | ends.no_plateau | last.stuck))
