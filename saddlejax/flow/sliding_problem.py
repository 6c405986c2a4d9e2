"""The box problem for the slopes of units at their kinks over one step of a gradient flow.

Where the flow on both sides of a kink points to it, the flow slides along it (Filippov): its velocity is minus the element
of least norm of the Clarke subdifferential, in which the slope `a` of the unit is some number between the slopes of the two
sides. With the rows `J = ∂z/∂θ` of the units near their kinks, the signals `σ = Δσ' ∂𝓛/∂h` there (`Δσ'` the jump of the
slope) and shares `α` of the upper slope, the gradient is `G(α) = G_0 + Jᵀ(σα)`. Over a step of length `h` from
distances `d` of the kinks the shares solve the convex problem (`b = σα`)

    min ½ bᵀKb − cᵀb,   0 ≤ b ≤ σ,   K = J R Jᵀ,   c = d/h − J R G_0,

whose optimality conditions are those of reaching the kink at the end of the step (`0 < α < 1`) or of staying on one side of
it. `R` is how parameters respond to a constant force over the step, relative to `h`: one for explicit steps, `φ_1(hA)` for
exponential ones with the Jacobian `A`. Units that pass through their kink get the share of the step that they spend above it,
and the problem is solved once more for the others, which make up for that.

Where all lower units of a sample are silent but for those at their kinks, the units above are at zero with them (see
`dependent_units`), and each excursion of a lower unit puts these on the sides to which it moves them. The sides differ
from one lower unit to another, so each has its own signal `σ`, while the smooth field of a step knows one side of every
unit. The difference is a force on the pre-activation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .box_problem import solve_box
from .units import Frozen, Heights, KinkedUnits

INTERIOR = 1e-9
"""From here on a share is between its bounds."""
FEW = 128
"""A box problem has this many places in any case."""
MOST_SOLVED = 3
"""How often a box problem is solved at most, as more units turn out to pass through their kinks."""

Response = Callable[[Float[Array, "*some parameters"]], Float[Array, "*some parameters"]]
"""What a constant force makes of the parameters over a step, relative to the length of the step."""


class SlidingProblem(NamedTuple):
    """The box problem of a step, for the units near their kinks.

    - `units`: which ones, counted through all samples; `valid`: false for places not used.
    - `distance`: of the kinks at the start, and `rate`, how fast it changes there; `size`: the length `h` of the step in time.
    - `signal`: `σ` on the excursions of the unit alone; `common`: with the units that depend on it as they are held.
    - `jacobian`: `J`; `free_rate`: `−J R G_0`, the rate at shares of zero; `matrix`: `K`.
    - `gradient`: with the slopes from which the problem was posed.
    """

    units: Int[Array, " near"]
    valid: Bool[Array, " near"]
    distance: Float[Array, " near"]
    rate: Float[Array, " near"]
    signal: Float[Array, " near"]
    common: Float[Array, " near"]
    jacobian: Float[Array, "near parameters"]
    free_rate: Float[Array, " near"]
    matrix: Float[Array, "near near"]
    gradient: Float[Array, " parameters"]
    size: Float[Array, ""]

    @property
    def attracts(self) -> Bool[Array, " near"]:
        """Whether the kink of a unit attracts: the slope jumps so that both sides are pushed to it."""
        return self.valid & (self.signal > 0)

    def slides(self, shares: Float[Array, " near"]) -> Bool[Array, " near"]:
        """Whether units slide, with such shares."""
        return self.attracts & (shares > INTERIOR) & (shares < 1 - INTERIOR)

    def forces(self, shares: Float[Array, " near"]) -> Float[Array, " near"]:
        """What has to be added where units that depend on these are held on the same side in all excursions."""
        return shares * (self.signal - self.common)

    def end(self, shares: Float[Array, " near"]) -> Float[Array, " near"]:
        """The distances at the end of the step, to first order."""
        return self.distance + self.size * (self.free_rate - self.matrix @ (self.signal * shares))

    def solve(
        self, start: Float[Array, " near"], beyond: Float[Array, " near"] | float = 0.0
    ) -> tuple[Float[Array, " near"], Float[Array, " near"]]:
        """The mean shares over the step, and those of units that slide at its end.

        Units that slide make up for those that pass through their kinks, so that they are found once more with these.
        `beyond` is added to the distances at the end, where a step has shown that they are not those of first order.
        """
        before = jnp.where(self.distance > 0, 1.0, 0.0).astype(start.dtype)
        own = self.size * jnp.diagonal(self.matrix) * self.signal
        end = self.end(start) + beyond
        others = self._passing(before, end, end, self.valid & ~self.attracts)

        def once_more(found: _Passing) -> _Passing:
            linear = self.free_rate + (self.distance + beyond) / self.size
            linear = linear - self.matrix @ (self.signal * jnp.where(found.passed, found.shares, 0))
            top = jnp.where(found.passed, 0, self.signal)
            shares = solve_box(self.matrix, linear, top) / jnp.where(top > 0, top, 1)
            shares = jnp.where(found.passed, found.shares, shares)
            bound = ((shares <= INTERIOR) & (self.distance > 0)) | ((shares >= 1 - INTERIOR) & (self.distance < 0))
            end = self.end(shares) + beyond
            mean = self._passing(shares, end, end + own * (shares - before), ~found.passed & bound)
            sliding = jnp.where(found.solved == 0, shares, found.sliding)
            return _Passing(found.passed | (mean != shares), mean, sliding, found.solved + 1, jnp.any(mean != shares))

        start_of_search = _Passing(~self.attracts, others, others, jnp.asarray(0), jnp.asarray(True))
        found = jax.lax.while_loop(lambda at: at.more & (at.solved < MOST_SOLVED), once_more, start_of_search)
        return found.shares, found.sliding

    def _passing(self, shares: Array, end: Array, alone: Array, may: Array) -> Float[Array, " near"]:
        """The shares, for those units that pass through their kinks the part of the step that they are above it.

        They get there at the rate of the start, or at the mean one of the step with their slope before the kink, with which
        they would end at `alone`, whichever is faster.
        """
        passes = may & (self.distance * end < 0)
        part = self.distance / jnp.where(passes, self.distance - alone, 1)
        comes = passes & (self.distance * self.rate < 0)
        part = jnp.where(comes, jnp.minimum(part, -self.distance / jnp.where(comes, self.size * self.rate, 1)), part)
        return jnp.where(passes, jnp.where(self.distance > 0, part, 1 - part), shares)

    def repelling(self, shares: Float[Array, " near"], slid: Bool[Array, " near"]) -> Bool[Array, " near"]:
        """Units that slid and whose kink now repels them to either side: from here the flow is not unique."""
        at = self.free_rate - self.matrix @ (self.signal * shares)
        own = jnp.diagonal(self.matrix) * self.signal
        below, above = at + own * shares, at + own * (shares - 1)
        return self.valid & slid & (self.signal < 0) & (below < 0) & (above > 0)


class _Passing(NamedTuple):
    """Units that pass through their kinks, and the shares of all.

    - `passed`: those whose shares are known, which at first are all whose kinks do not attract.
    - `shares`: the mean ones over the step; `sliding`: those at its end.
    - `solved`: how often the others have been solved for; `more`: whether one more has passed since.
    """

    passed: Bool[Array, " near"]
    shares: Float[Array, " near"]
    sliding: Float[Array, " near"]
    solved: Int[Array, ""]
    more: Bool[Array, ""]


class Candidates(NamedTuple):
    """The units that take part in a box problem, and what is known of all units.

    - `which`: their numbers, counted through all samples; `valid`: false for places not used.
    - `distance`, `rate`, `jump`: of all units, the distance of the kink, how fast it changes, and by how much the slope rises there.
    - `depends`: which units depend on others at their kinks.
    """

    which: Int[Array, " near"]
    valid: Bool[Array, " near"]
    distance: Float[Array, "samples units"]
    rate: Float[Array, "samples units"]
    jump: Float[Array, "samples units"]
    depends: Bool[Array, "samples units"]

    def at(self, values: Array) -> Array:
        """The values of those that take part."""
        return values.reshape(-1)[self.which]

    def held(self) -> Bool[Array, "samples units"]:
        """Those that take part, and those that depend on others."""
        return self.depends.reshape(-1).at[self.which].max(self.valid).reshape(self.depends.shape)


def pose(
    units: KinkedUnits,
    theta: Float[Array, " parameters"],
    candidates: Candidates,
    frozen: Frozen,
    heights: Heights,
    size: Float[Array, ""],
    respond: Response,
) -> SlidingProblem:
    """The box problem for the slopes of units, from those that are `frozen` now.

    **Arguments:** `heights`: how high above their kinks units are over most of the step.
    """
    at, valid = candidates.at, candidates.valid
    _, gradient, signals, _ = units.gradient(theta, frozen)
    jacobian = jnp.where(valid[:, None], units.jacobian(theta, frozen, candidates.which), 0)
    common = own = at(signals)
    if len(units.places()) > 1:
        own = units.own_signals(theta, frozen, candidates.depends, heights, candidates.which)
    common, own = (jnp.where(valid, signal * at(candidates.jump), 0) for signal in (common, own))
    pulls = at(frozen.shares) * common + at(frozen.forces)
    rest = gradient - jnp.matmul(pulls, jacobian, precision="highest")
    responses = respond(jacobian)
    return SlidingProblem(
        units=candidates.which,
        valid=valid,
        distance=at(candidates.distance),
        rate=at(candidates.rate),
        signal=own,
        common=common,
        jacobian=jacobian,
        free_rate=-jnp.matmul(responses, rest, precision="highest"),
        matrix=jnp.matmul(responses, jacobian.T, precision="highest"),
        gradient=gradient,
        size=size,
    )


def places(most: int, units: int) -> int:
    """How many places a box problem has, for as many units with kinks."""
    return min(most, units, max(FEW, units // 8))


def put(to: Float[Array, "samples units"], problem: SlidingProblem, values: Float[Array, " near"]) -> Array:
    """An array with other values for the units of a problem."""
    flat = to.reshape(-1)
    new = jnp.where(problem.valid, values, flat[problem.units])
    return flat.at[problem.units].set(new).reshape(to.shape)


def with_shares(frozen: Frozen, problem: SlidingProblem, shares: Float[Array, " near"]) -> Frozen:
    """Frozen slopes with other shares for the units of a problem."""
    forces = put(jnp.zeros_like(frozen.forces), problem, problem.forces(shares))
    return frozen._replace(shares=put(frozen.shares, problem, shares), forces=forces)
