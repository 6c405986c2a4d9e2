"""The record of a flow from the stretches that it was computed in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .field import field_of
from .integrate import Integration, Steps, Stretch
from .memory import smallest_share
from .plan import FlowPlan
from .record import Row, Save, imbalance_residual, where_rows
from .result import Flow
from .status import Status
from .until import AbstractUntil


def record(plan: FlowPlan, found: Integration, stretches: list[Stretch]) -> Flow:
    """The record of a flow from its stretches."""
    problem, until, save, steps = plan
    first, last, status = found.first, found.stretch, found.status
    field, memory = field_of(problem, first.scales), last.state.memory
    rows, counts = _rows(found, stretches, until, save)
    norms = rows.group_norms
    squares = jnp.square(norms)
    imbalance = jnp.diff(squares) if problem.perceptron else None
    begin_squares = jnp.square(stretches[0].first.group_norms)
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
        sliding=jnp.where(jnp.isnan(rows.sliding), 0, rows.sliding).astype(int),
        weights=rows.arrays,
        net=field.model(last.state),
        stats={
            "steps": total("accepted"),
            "rejected_steps": total("attempts") - total("accepted"),
            "gradient_evaluations": 1 + total("gradients"),
            "hessian_vector_products": curvature + total("products"),
            **_work_on_kinks(stretches),
        },
        resolved=~lost,
        until=until,
        rtol=steps.rtol,
        method=_method(steps, stretches),
        names=problem.parameters.names,
    )


def _work_on_kinks(stretches: list[Stretch]) -> dict[str, Int[Array, ""]]:
    """What was spent on kinks, and what was met there; nothing for a flow that does not slide along them."""
    work = [one.kinks for one in stretches if one.kinks is not None]
    if not work:
        return {}
    return {
        "unit_jacobians": sum((one.rows for one in work), jnp.asarray(0)),
        "box_problems": sum((one.problems for one in work), jnp.asarray(0)),
        "repelling_kinks": sum((one.repelling for one in work), jnp.asarray(0)),
        "most_units_near_kinks": jnp.max(jnp.stack([one.most for one in work])),
    }


def _rows(
    found: Integration, stretches: list[Stretch], until: AbstractUntil, save: Save
) -> tuple[Row, Int[Array, " rows"]]:
    """All rows, and the steps taken until each of them, −1 where there is none."""
    at_end = found.stretch.last
    if until.end_time() is not None:
        at_end = at_end._replace(log_time=jnp.where(found.status == until.reached, found.log_time, at_end.log_time))
    if save.times is not None:
        return _rows_at_times(found, stretches, at_end, until, save)
    taken = sum(one.accepted for one in stretches)
    if not save.steps:
        return jax.tree.map(lambda *both: jnp.stack(both), stretches[0].first, at_end), jnp.stack([0 * taken, taken])
    rows = [jax.tree.map(lambda a: a[None], stretches[0].first)]
    counts, before = [jnp.zeros(1, int)], jnp.asarray(0)
    for one in stretches:
        assert one.rows is not None and one.row_steps is not None
        part, count = one.rows, one.row_steps
        if len(stretches) > 1:  # on the host: only those that there are
            part, count = jax.tree.map(lambda a, n=int(one.accepted): a[:n], (part, count))
        rows.append(part)
        counts.append(jnp.where(count >= 0, count + before, -1))
        before = before + one.accepted
    joined, steps = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows), jnp.concatenate(counts)
    return joined._replace(log_time=jnp.where(steps == taken, at_end.log_time, joined.log_time)), steps


def _rows_at_times(
    found: Integration, stretches: list[Stretch], at_end: Row, until: AbstractUntil, save: Save
) -> tuple[Row, Int[Array, " rows"]]:
    """The rows at the times asked for, each from the stretch that passed it."""
    rows, steps, before = stretches[0].rows, stretches[0].row_steps, stretches[0].accepted
    assert rows is not None and steps is not None and save.times is not None
    for one in stretches[1:]:
        assert one.rows is not None and one.row_steps is not None
        rows = where_rows(one.row_steps >= 0, one.rows, rows)
        steps = jnp.where(one.row_steps >= 0, one.row_steps + before, steps)
        before = before + one.accepted
    # A flow that moves no more stays as it is until the time asked for.
    log_times, ends = jnp.log(save.times).astype(found.log_time.dtype), found.stretch.ends
    rests = (found.status == until.reached) & ends.at_rest & ~ends.until
    coming = (steps < 0) & (log_times <= found.log_time) & rests
    rows = where_rows(coming, at_end, rows)
    return rows._replace(log_time=jnp.where(coming, log_times, rows.log_time)), jnp.where(coming, before, steps)


def _method(steps: Steps, stretches: list[Stretch]) -> str:
    """How a flow was computed, in words."""
    exponential = "exponential Rosenbrock steps"
    where = "in the plateau clock, sliding along kinks" if steps.slides else "in the plateau clock"
    if steps.explicit is None and len(stretches) == 1:
        return f"{exponential} {where}"
    name = type(steps.explicit).__name__
    if len(stretches) == 1:
        return f"{name} {where}"
    coarser = "" if steps.slides else " at a hundred times the tolerance"
    return f"{name}, and {exponential}{coarser}, {where}"
