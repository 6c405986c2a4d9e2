"""One lane: the flow of one network, in the program that all lanes of a group share."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from ..flow import Save, gradient_flow
from ..flow.until import AbstractUntil
from ..networks.activations import Activation
from ..networks.mlp import he_normal
from ..tasks.task import Task
from .measures import Variable
from .padded import PaddedMLP
from .unpad import measure_flow


class LaneValues(NamedTuple):
    """What differs between lanes of a program.

    - `key`: the data of the random key of the network.
    - `scale`: init scale `ε`.
    - `small`: which layers it multiplies, in the layout of the padded network.
    - `rtol`: tolerance of the integration.
    """

    key: UInt[Array, "*lanes words"]
    scale: Float[Array, "*lanes"]
    small: Bool[Array, "*lanes layers"]
    rtol: Float[Array, "*lanes"]


class Common(NamedTuple):
    """Arrays that all lanes of a chunk share: the task, the end, the rows to keep, the position of the depth."""

    task: Task
    until: AbstractUntil
    save: Save
    which: Int[Array, ""]


class Group(NamedTuple):
    """What lanes of one program have in common for good; hashable.

    - `sizes`: of the deepest network; `depths`: of all of them.
    - `own_rtol`: whether the tolerance is that of the lane rather than the default of the activation.
    - `options`: further arguments of `gradient_flow`.
    - `variables`: what to measure.
    """

    sizes: tuple[int, ...]
    depths: tuple[int, ...]
    activation: Activation
    dtype: str
    own_rtol: bool
    options: tuple[tuple[str, Any], ...]
    variables: tuple[tuple[str, Variable], ...]


def flow_lane(group: Group, common: Common, lane: LaneValues) -> dict[str, Array]:
    """The measurements of one flow, and its `status` as a number."""
    task = common.task.astype(group.dtype)
    net = initial_network(group, common.which, lane)
    flow = gradient_flow(
        net,
        task,
        common.until,
        rtol=lane.rtol if group.own_rtol else None,
        save=common.save,
        **dict(group.options),
    )
    measured = measure_flow(flow, [(name, variable.function) for name, variable in group.variables])
    return {"status": jnp.asarray(flow.status._value), **measured}


def initial_network(group: Group, which: Array, lane: LaneValues) -> PaddedMLP:
    """The network that `scale_layers(MLP(sizes, activation, key=key), scale, layers)` is, padded."""
    key, dtype = jax.random.wrap_key_data(lane.key), jnp.dtype(group.dtype)
    shapes = list(zip(group.sizes[1:], group.sizes[:-1], strict=True))

    def own_keys(depth: int) -> Array:
        own = jax.random.key_data(jax.random.split(key, depth))
        return jnp.concatenate([own[:-1], jnp.zeros((len(shapes) - depth, *own.shape[1:]), own.dtype), own[-1:]])

    # Only the choice of the keys depends on the depth. The code that draws weights from them is compiled once for all layers
    # of one shape, whatever the depth.
    keys = jax.lax.switch(which, [functools.partial(own_keys, depth) for depth in group.depths])
    position, depth = jnp.arange(len(shapes)), jnp.asarray(group.depths)[which]
    there = (position < depth - 1) | (position == len(shapes) - 1)
    weights: list[Array] = []
    for shape, run in itertools.groupby(range(len(shapes)), lambda layer: shapes[layer]):
        layers = jnp.asarray(list(run))
        weights += list(jax.lax.map(functools.partial(_draw, shape, dtype), (keys[layers], there[layers])))
    scaled = tuple(
        w * jnp.where(small, lane.scale, 1).astype(dtype) for w, small in zip(weights, lane.small, strict=True)
    )
    return PaddedMLP(weights=scaled, which=which, depths=group.depths, activation=group.activation)


def _draw(shape: tuple[int, int], dtype: jnp.dtype, layer: tuple[Array, Array]) -> Float[Array, "fan_out fan_in"]:
    """The initial weights of a layer from its key; zeros where it is not there."""
    key, there = layer
    draw = lambda key: he_normal(jax.random.wrap_key_data(key), shape, dtype)  # noqa: E731
    return jax.lax.cond(there, draw, lambda _: jnp.zeros(shape, dtype), key)


def small_layers(layers: tuple[int, ...] | None, depth: int, deepest: int) -> np.ndarray:
    """Which layers of the padded network are scaled, given those of the network (None: all)."""
    chosen = np.isin(np.arange(depth), np.arange(depth) if layers is None else layers)
    return np.concatenate([chosen[:-1], np.zeros(deepest - depth, bool), chosen[-1:]])
