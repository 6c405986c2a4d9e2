"""A layer as a unit times a direction, `W_l = e^{u_l} V_l`: growth of a layer is motion of one number."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..networks import Net, Weights, safe_norm
from .layer_shapes import LayerShapes


class Coordinates(eqx.Module):
    """`W_l = e^{u_l} V_l` with `‖V_l‖_F = 1`; the `V_l` are kept in one vector.

    On the plateau every layer grows exponentially in the plateau clock. In these coordinates that is a straight line
    in `u_l`, which any integrator follows exactly; only the turning of the directions `V_l` costs steps.
    """

    joined: Float[Array, " weights"]
    log_units: Float[Array, " layers"]
    shapes: LayerShapes = eqx.field(static=True)

    @property
    def directions(self) -> Weights:
        """The directions `V_l`."""
        return self.shapes.split(self.joined)

    def weights(self) -> list[Array]:
        """The weights `W_l`."""
        units = jnp.exp(self.log_units)
        return [unit * v for unit, v in zip(units, self.directions, strict=True)]


def to_coordinates(weights: Weights) -> Coordinates:
    """The coordinates of given weights.

    A layer that is exactly zero takes the unit of the smallest other layer and the direction `V_l = 0`; it grows to
    its unit as the flow moves (see `unit_rates`).
    """
    norms = jnp.stack([safe_norm(w) for w in weights])
    smallest = jnp.min(jnp.where(norms > 0, norms, jnp.inf))
    smallest = jnp.where(jnp.isfinite(smallest), smallest, 1)
    units = jnp.where(norms > 0, norms, smallest)
    shapes = LayerShapes(tuple(w.shape for w in weights))
    return Coordinates(shapes.join([w / unit for w, unit in zip(weights, units, strict=True)]), jnp.log(units), shapes)


def to_net(coordinates: Coordinates, like: Net) -> Net:
    """The network at given coordinates."""
    return like.with_weights(coordinates.weights())


def unit_rates(coordinates: Coordinates, velocity: Float[Array, " weights"]) -> Float[Array, " layers"]:
    """The rates `du_l/ds` at which units follow their layers, whose velocities in those units are `velocity`.

    Any rate gives the same weights. This one keeps `‖V_l‖` where it is once it has reached one.
    """
    shapes, joined = coordinates.shapes, coordinates.joined
    return shapes.inner(joined, velocity) / jnp.maximum(shapes.inner(joined, joined), 1)
