"""Networks of several depths in one shape, so that one compilation serves them all."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from ..activations import Activation
from ..flow.clock import FlowState, Motion, PlateauField, motion
from ..flow.coordinates import Coordinates
from ..flow.explicit_step import ExplicitStep, explicit_step
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
    def at(depth: int) -> Callable[[Coordinates], Motion]:
        def small_motion(all_layers: Coordinates) -> Motion:
            small = _without_missing(all_layers, depth)
            found = motion(MLP.from_weights(small.weights(), net.activation), task, small)
            return found._replace(
                coordinates=_with_missing(found.coordinates, all_layers.shapes),
                imbalance_drift=_insert(found.imbalance_drift, depth - 1, net.depth - depth),
            )

        return small_motion

    return jax.lax.switch(net.which, [at(depth) for depth in net.depths], coordinates)


@explicit_step.register
def _explicit_step(
    net: PaddedMLP,
    field: PlateauField,
    solver: dfx.AbstractERK,
    state: FlowState,
    rate: FlowState,
    size: Float[Array, ""],
) -> ExplicitStep:
    # All stages of a step within one branch: their arithmetic, too, is that of the layers that are there.
    def at(depth: int) -> Callable[[PlateauField, FlowState, FlowState, Array], ExplicitStep]:
        def remove_missing(state: FlowState) -> FlowState:
            coordinates = _without_missing(state.coordinates, depth)
            return FlowState(coordinates, state.time, state.imbalance_drift[: depth - 1], state.loss_integral)

        def pad_state(small: FlowState) -> FlowState:
            coordinates = _with_missing(small.coordinates, state.coordinates.shapes)
            drift = _insert(small.imbalance_drift, depth - 1, net.depth - depth)
            return FlowState(coordinates, small.time, drift, small.loss_integral)

        def small_step(field: PlateauField, state: FlowState, rate: FlowState, size: Array) -> ExplicitStep:
            before = remove_missing(state)
            small = MLP.from_weights(before.coordinates.weights(), net.activation)
            field = PlateauField(small, field.task, field.log_time_unit)
            step = explicit_step(small, field, solver, before, remove_missing(rate), size)
            to_state = ravel_pytree(before)[1]
            moves = jax.vmap(lambda move: ravel_pytree(pad_state(to_state(move)))[0])(step.moves)
            return step._replace(after=pad_state(step.after), rate=pad_state(step.rate), moves=moves)

        return small_step

    return jax.lax.switch(net.which, [at(depth) for depth in net.depths], field, state, rate, size)


def _without_missing(coordinates: Coordinates, depth: int) -> Coordinates:
    """The coordinates of the layers that are there."""
    shapes = coordinates.shapes.shapes
    there = LayerShapes(tuple(remove(shapes, depth)))
    last = math.prod(shapes[-1])
    joined, units = coordinates.joined, coordinates.log_units
    return Coordinates(
        _cut(joined, _entries(there.shapes[:-1]), joined.size - last), _cut(units, depth - 1, units.size - 1), there
    )


def _with_missing(small: Coordinates, shapes: LayerShapes) -> Coordinates:
    """Room in between for the layers that are not there; the shapes are those of all layers."""
    first = small.shapes.shapes[:-1]
    missing = len(shapes.shapes) - len(first) - 1
    room = _entries(shapes.shapes) - small.joined.size
    joined = _insert(small.joined, _entries(first), room)
    return Coordinates(joined, _insert(small.log_units, len(first), missing), shapes)


def _entries(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _cut(vector: Array, begin: int, end: int) -> Array:
    """A vector without its entries from `begin` to `end`."""
    return vector if begin == end else jnp.concatenate([vector[:begin], vector[end:]])


def _insert(vector: Array, at: int, count: int) -> Array:
    """A vector with so many zeros before entry `at`."""
    return vector if count == 0 else jnp.concatenate([vector[:at], jnp.zeros(count, vector.dtype), vector[at:]])
