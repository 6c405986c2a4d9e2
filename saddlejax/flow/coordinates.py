"""A group of parameters as a unit times a direction, `θ_g = e^{u_g} V_g`: growth of a group is motion of one number."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._numerics import safe_norm
from ..parameters import GroupShapes


class Coordinates(eqx.Module):
    """`θ_g = e^{u_g} V_g`, where `‖V_g‖` stays near one; the `V_g` are kept in one vector.

    Different units and directions give the same parameters, so the rates `du_g/ds` may be chosen freely. On a plateau
    every group grows exponentially in the plateau clock: with the unit growing as its group does, the direction rests,
    and only its turning costs steps.
    """

    joined: Float[Array, " parameters"]
    log_units: Float[Array, " groups"]
    shapes: GroupShapes = eqx.field(static=True)

    @property
    def directions(self) -> tuple[Array, ...]:
        """The directions `V_g`."""
        return self.shapes.split(self.joined)

    def arrays(self) -> tuple[Array, ...]:
        """The parameters `θ_g`."""
        units = jnp.exp(self.log_units)
        return tuple(unit * v for unit, v in zip(units, self.directions, strict=True))

    def shift(self, change: Float[Array, " parameters"]) -> "Coordinates":
        """Those of parameters changed by so much, in the same units."""
        joined = self.shapes.map(lambda u, v, c: v + jnp.exp(-u) * c, self.log_units, self.joined, change)
        return Coordinates(joined, self.log_units, self.shapes)

    def norms(self) -> Float[Array, " groups"]:
        """The norms `‖θ_g‖`."""
        return jnp.exp(self.log_norms())

    def log_norms(self) -> Float[Array, " groups"]:
        """The logarithms of the norms, `−inf` for a group that is zero."""
        squares = self.shapes.inner(self.joined, self.joined)
        there = squares > 0
        return jnp.where(there, self.log_units + 0.5 * jnp.log(jnp.where(there, squares, 1)), -jnp.inf)

    def velocity(self, rates: "Coordinates") -> Float[Array, " parameters"]:
        """The velocities of the groups in their units, `e^{−u_g} dθ_g/ds`, given the rates of the coordinates."""
        return self.shapes.map(
            lambda growth, turning, v: turning + growth * v, rates.log_units, rates.joined, self.joined
        )

    def along(
        self,
        velocity: Float[Array, " parameters"],
        radial: Float[Array, " groups"],
        speeds: Float[Array, " groups"],
    ) -> "Coordinates":
        """The rates of the coordinates for such velocities: the units grow as their groups do.

        A group that starts from zero has no rate of growth yet; its unit grows less until the group has reached it. Where
        one group shrinks faster than all the others together its unit follows less: it may be about to pass through zero,
        where a unit that followed would make the clock stand still.

        **Arguments:** `velocity` in the units of the groups; `radial`, its inner products with the directions; `speeds`, its
        squared norms.
        """
        growth = radial / jnp.maximum(self.shapes.inner(self.joined, self.joined), 1)
        if growth.size > 1:
            together = jnp.minimum((jnp.sum(speeds) - speeds) / jnp.where(speeds > 0, speeds, 1), 1)
            growth = jnp.where(growth < 0, together * growth, growth)
        turning = self.shapes.map(lambda g, v, direction: v - g * direction, growth, velocity, self.joined)
        return Coordinates(turning, growth, self.shapes)


def to_coordinates(arrays: Sequence[Array]) -> Coordinates:
    """The coordinates of given parameters.

    A group that is exactly zero takes the unit of the smallest other group and the direction `V_g = 0`; it grows to its
    unit as the flow moves.
    """
    norms = jnp.stack([safe_norm(a) for a in arrays])
    smallest = jnp.min(jnp.where(norms > 0, norms, jnp.inf))
    smallest = jnp.where(jnp.isfinite(smallest), smallest, 1)
    units = jnp.where(norms > 0, norms, smallest)
    shapes = GroupShapes(tuple(a.shape for a in arrays))
    return Coordinates(shapes.join([a / unit for a, unit in zip(arrays, units, strict=True)]), jnp.log(units), shapes)
