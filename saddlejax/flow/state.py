"""The state of a flow, and its rate, in one vector."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .coordinates import Coordinates
from .layer_shapes import LayerShapes


class FlowState(eqx.Module):
    """What is integrated over `s`, or its rate: one vector, so that a step is a few passes over it.

    - `coordinates`: the weights.
    - `time`: `t/τ(θ_0)`, which stays near one on a plateau of any length.
    - `imbalance_drift`: `∫ (dΔ_l/dt) dt` by the exact identity, one number for each hidden layer.
    - `loss_integral`: `∫ 𝓛 ds`; its rate at the end of a step is the loss there, at no cost.
    """

    vector: Float[Array, " state"]
    shapes: LayerShapes = eqx.field(static=True)

    @staticmethod
    def size(shapes: LayerShapes) -> int:
        """The number of entries."""
        return shapes.size + 2 * len(shapes.shapes) + 1

    @classmethod
    def of(
        cls,
        coordinates: Coordinates,
        time: Float[Array, ""],
        imbalance_drift: Float[Array, " hidden"],
        loss_integral: Float[Array, ""],
    ) -> "FlowState":
        """The state with these parts."""
        parts = (coordinates.joined, coordinates.log_units, time[None], imbalance_drift, loss_integral[None])
        return cls(jnp.concatenate(parts), coordinates.shapes)

    @property
    def coordinates(self) -> Coordinates:
        weights, layers = self.shapes.size, len(self.shapes.shapes)
        return Coordinates(self.vector[:weights], self.vector[weights : weights + layers], self.shapes)

    @property
    def time(self) -> Float[Array, ""]:
        return self.vector[self.shapes.size + len(self.shapes.shapes)]

    @property
    def imbalance_drift(self) -> Float[Array, " hidden"]:
        return self.vector[self.shapes.size + len(self.shapes.shapes) + 1 : -1]

    @property
    def loss_integral(self) -> Float[Array, ""]:
        return self.vector[-1]
