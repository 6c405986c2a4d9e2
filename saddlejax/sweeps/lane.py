"""One lane: the flow of one network, in the program that all lanes of a structure share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, UInt

from ..flow import Flow, Save, gradient_flow
from ..flow.chunks import advance, begin, finish, plan_flow
from ..flow.plan import FlowPlan
from ..flow.until import AbstractUntil
from ..networks.activations import Activation
from ..networks.mlp import MLP
from ..networks.network import Weights
from ..tasks.task import Task
from .measures import Variable, measured
from .refill import Resumable

ATTEMPTS = 4
"""By how many attempted steps the flows of a batch advance together. More of them wait longer for the end of a chunk."""


class LaneValues(NamedTuple):
    """What differs between the lanes of a program.

    - `key`: the data of the random key of the network.
    - `scale`: init scale `ε`.
    - `small`: which layers it multiplies.
    - `rtol`: tolerance of the integration.
    """

    key: UInt[Array | np.ndarray, "*lanes words"]
    scale: Float[Array | np.ndarray, "*lanes"]
    small: Bool[Array | np.ndarray, "*lanes layers"]
    rtol: Float[Array | np.ndarray, "*lanes"]


class Common(NamedTuple):
    """What all lanes of a block share: the task, where the flow ends, the rows to keep."""

    task: Task
    until: AbstractUntil
    save: Save


class Structure(NamedTuple):
    """What a program is compiled for; hashable.

    - `sizes`, `activation`, `dtype`: of the networks.
    - `own_rtol`: whether the tolerance is that of the lane rather than the default.
    - `options`: further arguments of `gradient_flow`.
    - `variables`: what to measure.
    """

    sizes: tuple[int, ...]
    activation: Activation
    dtype: str
    own_rtol: bool
    options: tuple[tuple[str, Any], ...]
    variables: tuple[tuple[str, Variable], ...]


def flow_lane(structure: Structure, common: Common, weights: Weights, rtol: Float[Array, ""]) -> dict[str, PyTree]:
    """The measurements of the flow from some weights, and its `status`."""
    net, task = MLP.from_weights(weights, structure.activation), common.task.astype(structure.dtype)
    return measure_flow(structure, gradient_flow(net, task, common.until, **_options(structure, common, rtol)))


def measure_flow(structure: Structure, flow: Flow) -> dict[str, PyTree]:
    """The measurements of a flow, and its `status`."""
    return {"status": flow.status, **{name: measured(name, one.function, flow) for name, one in structure.variables}}


def initial_weights(sizes: tuple[int, ...], dtype: str, lane: LaneValues) -> Weights:
    """The weights of `scale_layers(MLP(sizes, activation, key=key, dtype=dtype), scale, layers)`."""
    weights = MLP(sizes, "identity", key=jax.random.wrap_key_data(lane.key), dtype=jnp.dtype(dtype)).weights
    factors = jnp.where(lane.small, lane.scale, 1).astype(dtype)
    return tuple(w * factor for w, factor in zip(weights, factors, strict=True))


def flow_in_chunks(structure: Structure, common: Common) -> Resumable:
    """The same as `flow_lane` from the initial weights, a few attempts at a time."""
    task = common.task.astype(structure.dtype)

    def plan(lane: LaneValues) -> FlowPlan:
        net = MLP.from_weights(initial_weights(structure.sizes, structure.dtype, lane), structure.activation)
        return plan_flow(net, task, common.until, **_options(structure, common, lane.rtol))

    return Resumable(
        plan=plan,
        begin=begin,
        advance=lambda plan, flow: advance(plan, flow, ATTEMPTS),
        running=lambda flow: flow.runs,
        finish=lambda plan, flow: measure_flow(structure, finish(plan, flow, ATTEMPTS)),
    )


def _options(structure: Structure, common: Common, rtol: Float[Array, ""]) -> dict[str, Any]:
    return {"rtol": rtol if structure.own_rtol else None, "save": common.save, **dict(structure.options)}
