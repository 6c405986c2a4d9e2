"""A layer as a unit times a direction, `W_l = e^{u_l} V_l`: growth of a layer is motion of one number."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..networks.mlp import Net, Weights, safe_norm
from .layer_shapes import LayerShapes


class Coordinates(eqx.Module):
    """`W_l = e^{u_l} V_l`, where `‖V_l‖_F` stays near one; the `V_l` are kept in one vector.

    Different units and directions give the same weights, so the rates `du_l/ds` may be chosen freely. On the plateau
    every layer grows exponentially in the plateau clock: with the unit growing as its layer does, the direction rests,
    and only its turning costs steps.
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

    def norms(self) -> Float[Array, " layers"]:
        """The norms `‖W_l‖_F`."""
        squares = self.shapes.inner(self.joined, self.joined)
        moved = squares > 0
        return jnp.where(moved, jnp.exp(self.log_units) * jnp.sqrt(jnp.where(moved, squares, 1)), 0)

    def log_norms(self) -> Float[Array, " layers"]:
        """The logarithms of the norms, `−inf` for a layer that is zero."""
        squares = self.shapes.inner(self.joined, self.joined)
        there = squares > 0
        return jnp.where(there, self.log_units + 0.5 * jnp.log(jnp.where(there, squares, 1)), -jnp.inf)

    def velocity(self, rates: "Coordinates") -> Float[Array, " weights"]:
        """The velocities of the layers in their units, `e^{−u_l} dW_l/ds`, given the rates of the coordinates."""
        return self.shapes.map(
            lambda growth, turning, v: turning + growth * v, rates.log_units, rates.joined, self.joined
        )

    def along(self, velocity: Float[Array, " weights"], growth: Float[Array, " layers"] | None = None) -> "Coordinates":
        """The rates of the coordinates for such velocities, with units that grow at given rates.

        By default those are `⟨V_l, v_l⟩/‖V_l‖²`, at which the layers themselves grow. A layer that starts from zero
        has no such rate yet; its unit grows less until the layer has reached it.
        """
        shapes, here = self.shapes, self.joined
        if growth is None:
            growth = shapes.inner(here, velocity) / jnp.maximum(shapes.inner(here, here), 1)
        return Coordinates(
            shapes.map(lambda g, v, direction: v - g * direction, growth, velocity, here), growth, shapes
        )


def to_coordinates(weights: Weights) -> Coordinates:
    """The coordinates of given weights.

    A layer that is exactly zero takes the unit of the smallest other layer and the direction `V_l = 0`; it grows to
    its unit as the flow moves.
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
