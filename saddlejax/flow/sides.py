"""On which side of its kink each unit of a model is, and which slide along it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .box_problem import solve_box
from .sliding_problem import INTERIOR, Candidates, places, pose, with_shares
from .units import Frozen, Heights, KinkedUnits, dependent_units, little

PASSES = 8
"""How often the slopes are solved for where those of upper units change the signals at lower ones."""


class Sides(NamedTuple):
    """What is known of the units at an accepted state.

    - `which`: those that slide; `held`: these, and units that depend on them; `shares`: between the slopes of their two sides.
    - `forces`: on their pre-activations, for units that put those above them on other sides than these are held on.
    - `signals`: `∂𝓛/∂h` at the outputs of all units; `z`: their pre-activations.
    """

    which: Bool[Array, "samples units"]
    held: Bool[Array, "samples units"]
    shares: Float[Array, "samples units"]
    forces: Float[Array, "samples units"]
    signals: Float[Array, "samples units"]
    z: Float[Array, "samples units"]

    @property
    def frozen(self) -> Frozen:
        """The slopes of those that are held."""
        return Frozen(self.held, self.shares, self.z, self.forces)


def sides_at(
    units: KinkedUnits,
    theta: Float[Array, " parameters"],
    most: int,
    slides: Bool[Array, "samples units"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, " parameters"], Sides]:
    """The loss, the element of least norm of its Clarke subdifferential at given parameters, and the units there.

    Units count as at their kinks where they are within rounding of the pre-activations, or where a step has found that they
    slide along them (`slides`).
    """
    z = units.preactivations(theta)
    distance, jump = units.distances(z), units.jumps(z)
    near = jnp.abs(distance) <= little(z)
    near = near if slides is None else near | slides
    nothing, none = jnp.zeros_like(z), jnp.zeros_like(near)
    half = Frozen(near, jnp.full_like(z, 0.5), None, nothing)
    # A unit all of whose inputs are zero is at its kink whatever its weights, and has no slope to find.
    anywhere = jax.random.normal(jax.random.key(0), theta.shape, theta.dtype)
    near = near & (units.rates(theta, half, anywhere) != 0)

    def once_more(_: Any, found: tuple[Frozen, Array, Array]) -> tuple[Frozen, Array, Array]:
        frozen, sliding, _ = found
        _, gradient, signals, _ = units.gradient(theta, frozen)
        rates = jnp.where(sliding, 0, -units.rates(theta, frozen, gradient))
        heights = Heights(near, jnp.where(frozen.shares >= 1 - INTERIOR, jnp.maximum(rates, 0), 0))
        depends, risen = dependent_units(units, theta, heights, none, jnp.maximum(signals * jump, 0))
        counts = near & ~depends
        order = jnp.where(counts, jnp.abs(signals * jump), -1).reshape(-1)
        first, which = jax.lax.top_k(order, places(most, z.size))
        # Where a kink repels, the side is the one to which the unit goes.
        above = jnp.where(depends, risen, jnp.where(counts & (rates != 0), rates, distance) > 0)
        candidates = Candidates(which, first >= 0, nothing, nothing, jump, depends)
        shares = jnp.where(sliding & counts, frozen.shares, above.astype(z.dtype))
        held = Frozen(candidates.held(), shares, None, nothing)
        problem = pose(units, theta, candidates, held, heights, jnp.ones((), z.dtype), lambda force: force)
        top, up = jnp.maximum(problem.signal, 0), candidates.at(above).astype(z.dtype)
        repelled = jnp.where(problem.signal < 0, up, 0)
        linear = problem.free_rate - problem.matrix @ (problem.signal * repelled)
        least = solve_box(problem.matrix, linear, top) / jnp.where(top > 0, top, 1)
        new = jnp.where(top > 0, least, up)
        sliding = none.reshape(-1).at[which].max(problem.slides(new)).reshape(near.shape)
        return with_shares(held, problem, new), sliding, depends

    frozen, sliding, depends = jax.lax.fori_loop(0, PASSES, once_more, (half, none, none))
    loss, gradient, signals, z = units.gradient(theta, frozen)
    return loss, gradient, Sides(sliding, sliding | depends, frozen.shares, frozen.forces, signals, z)
