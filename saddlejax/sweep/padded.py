"""Networks of several depths in one shape, so that one compilation serves them all."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..activations import Activation
from ..flow.clock import Motion, motion
from ..flow.coordinates import Coordinates
from ..flow.layer_shapes import LayerShapes
from ..gradient import Gradient, gradient
from ..networks import MLP, AbstractNetwork, Weights, predict
from ..tasks.task import Task


class PaddedMLP(AbstractNetwork):
    """An MLP with room for the layers of the deepest of several.

    `weights` are those of the deepest network. A shallower one has its layers first and its last layer last; the
    layers it lacks are zero in between, and so is their gradient. `depths` are the depths there may be, at least two
    each, and `which` is the position in that list. Loss and gradient branch on it, so that every network costs what
    its own layers cost; `vmap` keeps it so as long as `which` is not batched.
    """

    weights: Weights
    which: Int[Array, ""]
    depths: tuple[int, ...] = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def matrices(self) -> Weights:
        """The weights, zeros where a layer is missing."""
        return self.weights

    def branch(self, function: Callable[[int, MLP], Any]) -> Any:
        """`function(depth, net)` of the network without padding; its results have one shape for all depths."""

        def at(depth: int) -> Callable[[Weights], Any]:
            return lambda weights: function(depth, MLP.from_weights(remove(weights, depth), self.activation))

        return jax.lax.switch(self.which, [at(depth) for depth in self.depths], self.weights)


def remove(layers: Sequence[Any], depth: int) -> list[Any]:
    """The `depth` layers that are there out of all: the first ones and the last."""
    return [*layers[: depth - 1], layers[-1]]


def pad(layers: Sequence[Array], all_layers: Sequence[Any]) -> tuple[Array, ...]:
    """Room for all layers, given those that are there; the shapes are those of `all_layers`."""
    if not layers:
        return ()
    missing = all_layers[len(layers) - 1 : -1]
    return (*layers[:-1], *(jnp.zeros(like.shape, like.dtype) for like in missing), layers[-1])


@predict.register
def _predict(net: PaddedMLP, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    return net.branch(lambda depth, small: predict(small, x))


@gradient.register
def _gradient(net: PaddedMLP, task: Task) -> Gradient:
    neurons = [jax.ShapeDtypeStruct((size,), task.x.dtype) for size in net.sizes[1:-1]]

    def padded(depth: int, small: MLP) -> Gradient:
        found = gradient(small, task)
        return Gradient(found.loss, pad(found.weights, net.weights), pad(found.neuron_rates, neurons))

    return net.branch(padded)


@motion.register
def _motion(net: PaddedMLP, task: Task, coordinates: Coordinates) -> Motion:
    shapes, no_drift = coordinates.shapes, jnp.zeros(net.depth - 1, task.x.dtype)

    def at(depth: int) -> Callable[[Coordinates], Motion]:
        def small_motion(all_layers: Coordinates) -> Motion:
            there = LayerShapes(tuple(remove(shapes.shapes, depth)))
            directions, units = all_layers.directions, list(all_layers.log_units)
            small = Coordinates(there.join(remove(directions, depth)), jnp.stack(remove(units, depth)), there)
            found = motion(MLP.from_weights(small.weights(), net.activation), task, small)
            turning = pad(found.coordinates.directions, directions)
            growth = pad(list(found.coordinates.log_units), units)
            drift = pad(list(found.imbalance_drift), list(no_drift))
            return found._replace(
                coordinates=Coordinates(shapes.join(turning), jnp.stack(growth), shapes),
                imbalance_drift=jnp.stack(drift) if drift else no_drift,
            )

        return small_motion

    return jax.lax.switch(net.which, [at(depth) for depth in net.depths], coordinates)
