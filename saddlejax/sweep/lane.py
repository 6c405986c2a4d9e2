"""One lane: the flow of one network, in the program that all lanes of a group share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from ..activations import Activation
from ..flow import Save, gradient_flow
from ..flow.until import AbstractUntil
from ..networks import MLP, Weights
from ..tasks.task import Task
from .measures import Variable
from .padded import PaddedMLP, pad
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
    key = jax.random.wrap_key_data(lane.key)
    width, ends = group.sizes[1:-1], (group.sizes[0], group.sizes[-1])
    shapes = tuple(
        jax.ShapeDtypeStruct((rows, columns), jnp.dtype(group.dtype))
        for rows, columns in zip(group.sizes[1:], group.sizes[:-1], strict=True)
    )

    def of_depth(depth: int) -> Weights:
        net = MLP((ends[0], *width[: depth - 1], ends[1]), group.activation, key=key, dtype=jnp.dtype(group.dtype))
        return pad(net.weights, shapes)

    weights = jax.lax.switch(which, [lambda depth=depth: of_depth(depth) for depth in group.depths])
    scaled = tuple(
        w * jnp.where(small, lane.scale, 1).astype(w.dtype) for w, small in zip(weights, lane.small, strict=True)
    )
    return PaddedMLP(weights=scaled, which=which, depths=group.depths, activation=group.activation)


def small_layers(layers: tuple[int, ...] | None, depth: int, deepest: int) -> np.ndarray:
    """Which layers of the padded network are scaled, given those of the network (None: all)."""
    chosen = np.isin(np.arange(depth), np.arange(depth) if layers is None else layers)
    return np.concatenate([chosen[:-1], np.zeros(deepest - depth, bool), chosen[-1:]])
