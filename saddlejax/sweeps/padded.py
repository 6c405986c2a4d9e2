"""Networks of several depths in one shape, so that one compilation serves them all."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..flow.clock import PlateauField
from ..flow.explicit_step import ExplicitStep, explicit_step
from ..flow.layer_shapes import LayerShapes
from ..flow.rounding import signal_left
from ..flow.state import FlowState
from ..gradient import Gradient, gradient
from ..networks.activations import Activation, ActivationParts
from ..networks.mlp import MLP, AbstractNetworkOfParts, Weights, predict
from ..tasks.task import Task


class PaddedMLP(AbstractNetworkOfParts):
    """An MLP with room for the layers of the deepest of several.

    `weights` are those of the deepest network. A shallower one has its layers first and its last layer last; the
    layers it lacks are zero in between, and so is their gradient. `depths` are the depths there may be, at least two
    each, and `which` is the position in that list. Loss and gradient branch on it, so that every network costs what
    its own layers cost; `vmap` keeps it so as long as `which` is not batched.
    """

    weights: Weights
    which: Int[Array, ""]
    depths: tuple[int, ...] = eqx.field(static=True)
    activation_parts: ActivationParts

    def __init__(self, weights: Weights, which: Int[Array, ""], depths: tuple[int, ...], activation: Activation):
        self.weights, self.which, self.depths = weights, which, depths
        self.activation_parts = ActivationParts(activation)

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


@signal_left.register
def _signal_left(net: PaddedMLP, task: Task) -> Array:
    return net.branch(lambda depth, small: signal_left(small, task))


@gradient.register
def _gradient(net: PaddedMLP, task: Task) -> Gradient:
    neurons = [jax.ShapeDtypeStruct((size,), task.x.dtype) for size in net.sizes[1:-1]]

    def padded(depth: int, small: MLP) -> Gradient:
        found = gradient(small, task)
        return Gradient(found.loss, pad(found.weights, net.weights), pad(found.neuron_rates, neurons))

    return net.branch(padded)


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
        layout = _Layout.of(state.shapes, depth)

        def small_step(field: PlateauField, state: FlowState, rate: FlowState, size: Array) -> ExplicitStep:
            before = layout.remove(state)
            small = MLP.from_weights(before.coordinates.weights(), net.activation)
            field = PlateauField(small, field.task, field.log_time_unit)
            step = explicit_step(small, field, solver, before, layout.remove(rate), size)
            return step._replace(
                after=layout.pad(step.after), rate=layout.pad(step.rate), moves=layout.pad_vector(step.moves)
            )

        return small_step

    return jax.lax.switch(net.which, [at(depth) for depth in net.depths], field, state, rate, size)


class _Layout(NamedTuple):
    """Where the state of a network without padding lies in that of the padded one.

    - `shapes`, `all_shapes`: the layers that are there, and all of them.
    - `pieces`: runs of entries that stay together, `(begin, end, begin in the padded state)`.
    """

    shapes: LayerShapes
    all_shapes: LayerShapes
    pieces: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, all_shapes: LayerShapes, depth: int) -> "_Layout":
        shapes = LayerShapes(tuple(remove(all_shapes.shapes, depth)))
        last = math.prod(shapes.shapes[-1])
        missing, layers = len(all_shapes.shapes) - depth, all_shapes.size - shapes.size
        # The first layers; the last one and the first units; the last unit, the time and the drifts; the loss.
        ends = [shapes.size - last, shapes.size + depth - 1, FlowState.size(shapes) - 1, FlowState.size(shapes)]
        shifts = [0, layers, layers + missing, layers + 2 * missing]
        begins = [0, *ends[:-1]]
        pieces = [(begin, end, begin + shift) for begin, end, shift in zip(begins, ends, shifts, strict=True)]
        return cls(shapes, all_shapes, tuple(pieces))

    def remove(self, state: FlowState) -> FlowState:
        """The state of the layers that are there."""
        parts = [state.vector[there : there + end - begin] for begin, end, there in self.pieces]
        return FlowState(jnp.concatenate(parts), self.shapes)

    def pad(self, state: FlowState) -> FlowState:
        """The state with zeros for the layers that are not there."""
        return FlowState(self.pad_vector(state.vector), self.all_shapes)

    def pad_vector(self, vector: Float[Array, "*any state"]) -> Float[Array, "*any padded"]:
        """The entries of one or more states, with zeros in between."""
        size = FlowState.size(self.all_shapes)
        if vector.shape[-1] == size:
            return vector
        # In place, piece by piece: two or three times faster than a concatenation.
        padded = jnp.zeros((*vector.shape[:-1], size), vector.dtype)
        for begin, end, there in self.pieces:
            padded = jax.lax.dynamic_update_slice_in_dim(padded, vector[..., begin:end], there, -1)
        return padded
