"""A layer as a unit times a direction, `W_l = e^{u_l} V_l`: growth of a layer is motion of one number."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..networks import Net, Weights, safe_norm


class Coordinates(eqx.Module):
    """`W_l = e^{u_l} V_l` with `‖V_l‖_F = 1`.

    On the plateau every layer grows exponentially in the plateau clock. In these coordinates that is a straight line
    in `u_l`, which any integrator follows exactly; only the turning of the directions `V_l` costs steps.
    """

    log_units: Float[Array, " layers"]
    directions: Weights

    def weights(self) -> list[Array]:
        """The weights `W_l`."""
        return [jnp.exp(u) * v for u, v in zip(self.log_units, self.directions, strict=True)]


def to_coordinates(weights: Weights) -> Coordinates:
    """The coordinates of given weights.

    A layer that is exactly zero takes the unit of the smallest other layer and the direction `V_l = 0`; it grows to
    its unit as the flow moves (see `unit_rate`).
    """
    norms = jnp.stack([safe_norm(w) for w in weights])
    smallest = jnp.min(jnp.where(norms > 0, norms, jnp.inf))
    smallest = jnp.where(jnp.isfinite(smallest), smallest, 1)
    units = jnp.where(norms > 0, norms, smallest)
    return Coordinates(jnp.log(units), tuple(w / unit for w, unit in zip(weights, units, strict=True)))


def to_net(coordinates: Coordinates, like: Net) -> Net:
    """The network at given coordinates."""
    return like.with_weights(coordinates.weights())


def unit_rate(direction: Float[Array, "out in"], velocity: Float[Array, "out in"]) -> Float[Array, ""]:
    """The rate `du/ds` at which a unit follows its layer, whose velocity in that unit is `velocity`.

    Any rate gives the same weights. This one keeps `‖V‖` where it is once it has reached one.
    """
    return jnp.sum(direction * velocity) / jnp.maximum(jnp.sum(jnp.square(direction)), 1)
