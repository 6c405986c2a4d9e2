"""The slopes of units at their kinks over one step of a gradient flow.

Where the flow on both sides of a kink points to it, the flow slides along it (Filippov): its velocity is minus the element
of least norm of the Clarke subdifferential, in which the slope `a` of the unit is some number between the slopes of the two
sides. With the rows `J = ∂z/∂θ` of the units near their kinks, the signals `σ = Δσ' ∂𝓛/∂h` there (`Δσ'` the jump of the
slope) and shares `α` of the upper slope, the gradient is `G(α) = G_0 + Jᵀ(σα)`. Over a step of length `h` from
distances `d` of the kinks the shares solve the convex problem (`b = σα`)

    min ½ bᵀKb − cᵀb,   0 ≤ b ≤ σ,   K = J R Jᵀ,   c = d/h − J R G_0,

whose optimality conditions are those of reaching the kink at the end of the step (`0 < α < 1`) or of staying on one side of
it. `R` is how parameters respond to a constant force over the step, relative to `h`: one for explicit steps, `φ_1(hA)` for
exponential ones with the Jacobian `A`. Units that pass through their kink get the share of the step that they spend above it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._numerics import safe_norm
from .box_problem import solve_box
from .units import Frozen, KinkedUnits, dependent_units

REACH = 2.0
"""How many times as far as their mean rates take them units may come in a step."""
INTERIOR = 1e-9
"""From here on a share is between its bounds."""
PASSES, MOST_PASSES = 2, 8
"""How often the slopes are solved for where those of upper units change the signals at lower ones."""
SETTLED = 0.3
"""The slopes are known where solving for them once more changes the gradient by no more than this part of it."""
AT_KINK = 1e-2
"""Units are at their kinks within this times the root of the rounding, relative to the largest pre-activation."""

Response = Callable[[Float[Array, "*some parameters"]], Float[Array, "*some parameters"]]
"""What a constant force makes of the parameters over a step, relative to the length of the step."""


class Sides(NamedTuple):
    """What is known of the units at an accepted state.

    - `which`: those that slide; `held`: these, and units that depend on them; `shares`: between the slopes of their two sides.
    - `signals`: `∂𝓛/∂h` at the outputs of all units; `z`: their pre-activations.
    """

    which: Bool[Array, "samples units"]
    held: Bool[Array, "samples units"]
    shares: Float[Array, "samples units"]
    signals: Float[Array, "samples units"]
    z: Float[Array, "samples units"]

    @property
    def frozen(self) -> Frozen:
        """The slopes of those that are held."""
        return Frozen(self.held, self.shares, self.z)


class SlidingProblem(NamedTuple):
    """The box problem of a step, for the units near their kinks.

    - `units`: which ones, counted through all samples; `valid`: false for places not used.
    - `distance`: of the kinks at the start, and `rate`, how fast it changes there; `signal`: `σ`; `jacobian`: `J`; `free_rate`: `−J R G_0`, the rate at shares of
      zero; `matrix`: `K`.
    - `size`: the length `h` of the step in time.
    """

    units: Int[Array, " near"]
    valid: Bool[Array, " near"]
    distance: Float[Array, " near"]
    rate: Float[Array, " near"]
    signal: Float[Array, " near"]
    jacobian: Float[Array, "near parameters"]
    free_rate: Float[Array, " near"]
    matrix: Float[Array, "near near"]
    size: Float[Array, ""]

    @property
    def attracts(self) -> Bool[Array, " near"]:
        """Whether the kink of a unit attracts: the slope jumps so that both sides are pushed to it."""
        return self.valid & (self.signal > 0)

    def end(self, shares: Float[Array, " near"]) -> Float[Array, " near"]:
        """The distances at the end of the step, to first order."""
        return self.distance + self.size * (self.free_rate - self.matrix @ (self.signal * shares))

    def solve(
        self, start: Float[Array, " near"], beyond: Float[Array, " near"] | float = 0.0
    ) -> tuple[Float[Array, " near"], Float[Array, " near"]]:
        """The mean shares over the step, and those of units that slide at its end.

        `beyond` is added to the distances at the end, where a step has shown that they are not those of first order.
        """
        own = jnp.where(self.distance > 0, 1.0, 0.0).astype(start.dtype)
        others = self._passing(own, self.end(start) + beyond, self.valid & ~self.attracts)
        others = jnp.where(self.attracts, 0, others)
        linear = self.free_rate + (self.distance + beyond) / self.size - self.matrix @ (self.signal * others)
        top = jnp.where(self.attracts, self.signal, 0)
        least = solve_box(self.matrix, linear, top, start * top) / jnp.where(top > 0, top, 1)
        sliding = jnp.where(self.attracts, least, others)
        bound = ((sliding <= INTERIOR) & (self.distance > 0)) | ((sliding >= 1 - INTERIOR) & (self.distance < 0))
        return self._passing(sliding, self.end(sliding) + beyond, self.attracts & bound), sliding

    def _passing(self, shares: Array, end: Array, may: Array) -> Float[Array, " near"]:
        """The shares, for those units that pass through their kinks the part of the step that they are above it.

        They get there at the rate of the start or at the mean one of the step, whichever is faster.
        """
        passes = may & (self.distance * end < 0)
        part = self.distance / jnp.where(passes, self.distance - end, 1)
        comes = passes & (self.distance * self.rate < 0)
        part = jnp.where(comes, jnp.minimum(part, -self.distance / jnp.where(comes, self.size * self.rate, 1)), part)
        return jnp.where(passes, jnp.where(self.distance > 0, part, 1 - part), shares)

    def repelling(self, shares: Float[Array, " near"], slid: Bool[Array, " near"]) -> Bool[Array, " near"]:
        """Units that slid and whose kink now repels them to either side: from here the flow is not unique."""
        at = self.free_rate - self.matrix @ (self.signal * shares)
        own = jnp.diagonal(self.matrix) * self.signal
        below, above = at + own * shares, at + own * (shares - 1)
        return self.valid & slid & (self.signal < 0) & (below < 0) & (above > 0)


class Slopes(NamedTuple):
    """The slopes of a step.

    - `frozen`: those of units near their kinks; `problem`: which they solve, with `shares`.
    - `passes`: how often they were solved for; `settled`: whether the last time changed next to nothing.
    """

    frozen: Frozen
    problem: SlidingProblem
    shares: Float[Array, " near"]
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
    near = _within(distance, reach) | sides.which
    # Both together: where those that rise decided alone, some flows were caught at kinks of several layers.
    upwards = size * (jnp.maximum(mean_rates, 0) + jnp.maximum(sides.signals * jump, 0))
    depends, risen = dependent_units(units, theta, near, upwards, upwards)
    above = jnp.where(depends, risen, distance) > 0
    reach = reach + jnp.abs(risen - distance)
    counts = (near | _within(distance, reach)) & ~depends
    # Where there is no room for all, those count whose gradients jump most.
    jumps = jnp.where(counts, jnp.where(sides.which, jnp.inf, jnp.abs(sides.signals * jump)), -1)
    most = min(most, jumps.size)
    first, which = jax.lax.top_k(jumps.reshape(-1), most)
    valid = first >= 0
    held = jnp.where(sides.which & ~depends, sides.shares, above.astype(theta.dtype))
    dependent = Frozen(depends, held, None)
    frozen = Frozen(depends.reshape(-1).at[which].max(valid).reshape(near.shape), held, sides.z)
    at = lambda a: a.reshape(-1)[which]  # noqa: E731

    def posed(shares: Array, frozen: Frozen, gradient: Array, signals: Array) -> SlidingProblem:
        jacobian = jnp.where(valid[:, None], units.jacobian(theta, frozen, which), 0)
        signal = jnp.where(valid, at(signals) * at(jump), 0)
        rest = gradient - jnp.matmul(shares * signal, jacobian, precision="highest")
        responses = respond(jacobian)
        return SlidingProblem(
            units=which,
            valid=valid,
            distance=at(distance),
            rate=at(rates),
            signal=signal,
            jacobian=jacobian,
            free_rate=-jnp.matmul(responses, rest, precision="highest"),
            matrix=jnp.matmul(responses, jacobian.T, precision="highest"),
            size=size,
        )

    def once_more(found: Slopes) -> Slopes:
        _, gradient, signals, _ = units.gradient(theta, found.frozen)
        problem = posed(found.shares, found.frozen, gradient, signals)
        shares, _ = problem.solve(found.shares)
        change = jnp.matmul((shares - found.shares) * problem.signal, problem.jacobian, precision="highest")
        settled = safe_norm(change) <= SETTLED * safe_norm(gradient + change)
        return Slopes(_with_shares(found.frozen, which, valid, shares), problem, shares, found.passes + 1, settled)

    def goes_on(found: Slopes) -> Bool[Array, ""]:
        return (found.passes < least_passes) | (~found.settled & (found.passes < most_passes))

    alone = len(units.places()) < 2
    least_passes, most_passes = (1, 1) if alone else (PASSES, MOST_PASSES)
    shares = at(held)
    empty = jax.tree.map(jnp.zeros_like, eqx.filter_eval_shape(posed, shares, frozen, theta, sides.signals))
    found = jax.lax.while_loop(goes_on, once_more, Slopes(frozen, empty, shares, jnp.asarray(0), jnp.asarray(False)))
    return found, dependent, jnp.sum(counts)


def _within(distance: Array, reach: Array) -> Bool[Array, "samples units"]:
    """Which units may come to their kinks; one that never moves, as where all its inputs are zero, does not."""
    return (jnp.abs(distance) <= reach) & (reach > 0)


def _with_shares(frozen: Frozen, which: Array, valid: Array, shares: Array) -> Frozen:
    """Frozen slopes with other shares for some units."""
    flat = frozen.shares.reshape(-1)
    return frozen._replace(
        shares=flat.at[which].set(jnp.where(valid, shares, flat[which])).reshape(frozen.shares.shape)
    )


def sliding_after(
    problem: SlidingProblem, shares: Float[Array, " near"], depends: Frozen
) -> tuple[Bool[Array, "samples units"], Frozen]:
    """Which units slide after a step, and the slopes of these and of the units that depend on them."""
    shape = depends.which.shape
    inside = problem.attracts & (shares > INTERIOR) & (shares < 1 - INTERIOR)
    zeros = jnp.zeros(shape, shares.dtype).reshape(-1)
    which = zeros.at[problem.units].max(jnp.where(inside, 1, 0).astype(shares.dtype))
    found = zeros.at[problem.units].max(jnp.where(inside, shares, 0)).reshape(shape)
    sliding = which.reshape(shape) > 0
    return sliding, Frozen(sliding | depends.which, jnp.where(sliding, found, depends.shares), None)


def sides_at(
    units: KinkedUnits, theta: Float[Array, " parameters"], most: int
) -> tuple[Float[Array, ""], Float[Array, " parameters"], Sides]:
    """The loss, the element of least norm of its Clarke subdifferential at given parameters, and the units there.

    Units count as at their kinks where they are within rounding of the pre-activations.
    """
    z = units.preactivations(theta)
    distance, jump = units.distances(z), units.jumps(z)
    near = jnp.abs(distance) <= jnp.sqrt(jnp.finfo(z.dtype).eps) * AT_KINK * jnp.max(jnp.abs(z))
    half = Frozen(near, jnp.full_like(z, 0.5), None)
    # A unit all of whose inputs are zero is at its kink whatever its weights, and has no slope to find.
    anywhere = jax.random.normal(jax.random.key(0), theta.shape, theta.dtype)
    near = near & (units.rates(theta, half, anywhere) != 0)
    most = min(most, z.size)

    def once_more(_: Any, found: tuple[Frozen, Array, Array]) -> tuple[Frozen, Array, Array]:
        frozen, sliding, _ = found
        _, gradient, signals, _ = units.gradient(theta, frozen)
        rates = jnp.where(sliding, 0, -units.rates(theta, frozen, gradient))
        depends, risen = dependent_units(units, theta, near, jnp.maximum(rates, 0), jnp.maximum(signals * jump, 0))
        counts = near & ~depends
        first, which = jax.lax.top_k(jnp.where(counts, jnp.abs(signals * jump), -1).reshape(-1), most)
        valid = first >= 0
        at = lambda a: a.reshape(-1)[which]  # noqa: E731
        # Where a kink repels, the side is the one to which the unit goes.
        above = jnp.where(counts, jnp.where(rates != 0, rates, distance), jnp.where(depends, risen, distance)) > 0
        held = Frozen(
            depends.reshape(-1).at[which].max(valid).reshape(near.shape),
            jnp.where(sliding & counts, frozen.shares, above.astype(z.dtype)),
            None,
        )
        _, gradient, signals, _ = units.gradient(theta, held)
        jacobian = jnp.where(valid[:, None], units.jacobian(theta, held, which), 0)
        signal, shares = jnp.where(valid, at(signals) * at(jump), 0), at(held.shares)
        rest = gradient - jnp.matmul(shares * signal, jacobian, precision="highest")
        matrix = jnp.matmul(jacobian, jacobian.T, precision="highest")
        top = jnp.maximum(signal, 0)
        own = at(above).astype(z.dtype)
        repelled = jnp.where(signal < 0, own, 0)
        linear = -jnp.matmul(jacobian, rest, precision="highest") - matrix @ (signal * repelled)
        least = solve_box(matrix, linear, top, shares * top) / jnp.where(top > 0, top, 1)
        shares = jnp.where(top > 0, least, own)
        inside = valid & (top > 0) & (shares > INTERIOR) & (shares < 1 - INTERIOR)
        sliding = jnp.zeros(near.size, bool).at[which].max(inside).reshape(near.shape)
        return _with_shares(held, which, valid, shares), sliding, depends

    nothing = jnp.zeros_like(near)
    start = half, nothing, nothing
    frozen, sliding, depends = jax.lax.fori_loop(0, MOST_PASSES, once_more, start)
    loss, gradient, signals, z = units.gradient(theta, frozen)
    return loss, gradient, Sides(sliding, sliding | depends, frozen.shares, signals, z)
