"""The slopes of units at their kinks over one step of a gradient flow, and what slides after it."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._numerics import safe_norm
from .sides import Sides
from .sliding_problem import Candidates, Response, SlidingProblem, places, pose, put, with_shares
from .units import Frozen, Heights, KinkedUnits, dependent_units, little, seen

REACH = 2.0
"""How many times as far as their mean rates take them units may come in a step."""
PASSES, MOST_PASSES = 2, 8
"""How often the slopes are solved for where those of upper units change the signals at lower ones."""
SETTLED = 0.3
"""The slopes are known where solving for them once more changes the gradient by no more than this part of it."""


class Slopes(NamedTuple):
    """The slopes of a step.

    - `frozen`: those of units near their kinks; `problem`: which they solve, with `shares`.
    - `heights`: how far above their kinks units end.
    - `passes`: how often they were solved for; `settled`: whether the last time changed next to nothing.
    """

    frozen: Frozen
    problem: SlidingProblem
    shares: Float[Array, " near"]
    heights: Float[Array, "samples units"]
    passes: Int[Array, ""]
    settled: Bool[Array, ""]


def slopes_of_step(
    units: KinkedUnits,
    theta: Float[Array, " parameters"],
    sides: Sides,
    velocity: Float[Array, " parameters"],
    size: Float[Array, ""],
    respond: Response,
    most: int,
) -> tuple[Slopes, Frozen, Int[Array, ""]]:
    """The slopes to be frozen over a step, units that depend on others, and how many units would have taken part.

    **Arguments:** `sides`: at the start; `velocity`: there; `size`: of the step, in time; `most`: how many units take part,
    those whose gradients jump most.
    """
    distance, jump = units.distances(sides.z), units.jumps(sides.z)
    rates = units.rates(theta, sides.frozen, velocity)
    mean_rates = units.rates(theta, sides.frozen, respond(velocity))
    reach = REACH * size * jnp.abs(mean_rates)
    near = _within(distance, reach, little(sides.z)) | sides.which
    ends = jnp.where(sides.which | (distance <= little(sides.z)), 0, jnp.maximum(distance + size * mean_rates, 0))
    heights = Heights(near, ends)
    pushes = jnp.maximum(sides.signals * jump, 0)
    # Where nothing else moves units above, those do that come from below.
    quiet = ~jnp.any(near & ((pushes > 0) | (ends > 0)), axis=1, keepdims=True)
    pushes = jnp.where(quiet & near, jnp.maximum(distance + size * mean_rates, 0), pushes)
    depends, risen = dependent_units(units, theta, heights, ends > 0, pushes)
    above = jnp.where(depends, risen, distance > 0)
    # Units come nearer to their kinks with what lower ones put out.
    moved = Heights(near & ~depends, jnp.maximum(distance, 0) + size * jnp.maximum(mean_rates, 0))
    reach = reach + jnp.abs(units.distances(seen(units.model(theta), units.task.x, moved.outputs)[1]) - distance)
    counts = (near | _within(distance, reach, little(sides.z))) & ~depends
    # Where there is no room for all, those count whose gradients jump most.
    jumps = jnp.where(counts, jnp.where(sides.which, jnp.inf, jnp.abs(sides.signals * jump)), -1)
    first, which = jax.lax.top_k(jumps.reshape(-1), places(most, jumps.size))
    candidates = Candidates(which, first >= 0, distance, rates, jump, depends)
    shares = jnp.where(sides.which & ~depends, sides.shares, above.astype(theta.dtype))
    nothing = jnp.zeros_like(shares)
    dependent = Frozen(depends, shares, None, nothing)
    frozen = Frozen(candidates.held(), shares, sides.z, nothing)

    def posed(frozen: Frozen, high: Array) -> SlidingProblem:
        return pose(units, theta, candidates, frozen, heights._replace(above=high), size, respond)

    def once_more(found: Slopes) -> Slopes:
        problem = posed(found.frozen, found.heights)
        shares, _ = problem.solve(found.shares)
        new = with_shares(found.frozen, problem, shares)
        pulls = shares * problem.signal - found.shares * problem.common - candidates.at(found.frozen.forces)
        change = jnp.matmul(pulls, problem.jacobian, precision="highest")
        settled = safe_norm(change) <= SETTLED * safe_norm(problem.gradient + change)
        high = put(found.heights, problem, jnp.where(problem.slides(shares), 0, jnp.maximum(problem.end(shares), 0)))
        return Slopes(new, problem, shares, high, found.passes + 1, settled)

    def goes_on(found: Slopes) -> Bool[Array, ""]:
        return (found.passes < least_passes) | (~found.settled & (found.passes < most_passes))

    least_passes, most_passes = (1, 1) if len(units.places()) < 2 else (PASSES, MOST_PASSES)
    empty = jax.tree.map(jnp.zeros_like, eqx.filter_eval_shape(posed, frozen, ends))
    start = Slopes(frozen, empty, candidates.at(shares), ends, jnp.asarray(0), jnp.asarray(False))
    found = jax.lax.while_loop(goes_on, once_more, start)
    return found, dependent, jnp.sum(counts)


def _within(distance: Array, reach: Array, least: Array) -> Bool[Array, "samples units"]:
    """Which units may come to their kinks; one that never moves, as where all its inputs are zero, does not."""
    return (jnp.abs(distance) <= jnp.maximum(reach, least)) & ((reach > 0) | (distance != 0))


def sliding_after(
    problem: SlidingProblem, shares: Float[Array, " near"], depends: Frozen
) -> tuple[Bool[Array, "samples units"], Frozen]:
    """Which units slide after a step, and the slopes of these and of the units that depend on them."""
    shape = depends.which.shape
    inside = problem.slides(shares)
    zeros = jnp.zeros(shape, shares.dtype).reshape(-1)
    which = zeros.at[problem.units].max(jnp.where(inside, 1, 0).astype(shares.dtype))
    found = zeros.at[problem.units].max(jnp.where(inside, shares, 0)).reshape(shape)
    forces = zeros.at[problem.units].add(jnp.where(inside, problem.forces(shares), 0)).reshape(shape)
    sliding = which.reshape(shape) > 0
    return sliding, Frozen(sliding | depends.which, jnp.where(sliding, found, depends.shares), None, forces)
