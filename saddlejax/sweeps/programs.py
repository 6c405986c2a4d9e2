"""The compiled programs of a sweep: lanes one after another, or a batch of them on an accelerator."""

import contextlib
import functools
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._host.stopping import check_stopped
from ..networks.network import Weights
from .lane import Common, LaneValues, Structure, flow_in_chunks, flow_lane, initial_weights
from .refill import Refilled, refilled_map

IN_A_ROW = 8  # lanes in a call, so that calling costs little
SHARE_OF_MEMORY = 0.5
MOST_SLOTS = 2048
MOST_PROGRAMS = 256  # kept for further blocks and sweeps

_devices_in_use: defaultdict[Any, threading.Lock] = defaultdict(threading.Lock)


class Program:
    """A function compiled once for each device.

    Threads that come while it is being compiled wait for it; those of other programs compile side by side. An
    accelerator runs one program at a time, since each may take as much of its memory as it can get.
    """

    def __init__(self, function: Any):
        self._run = jax.jit(function)
        self._compiled: set[Any] = set()
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """The results, computed."""
        kind = (jax.tree.structure(arguments), *map(np.shape, jax.tree.leaves(arguments)), current_device())
        with self._lock:
            if kind not in self._compiled:
                self._run.lower(*arguments).compile()
                self._compiled.add(kind)
        with contextlib.nullcontext() if jax.default_backend() == "cpu" else _devices_in_use[current_device()]:
            check_stopped()
            return jax.block_until_ready(self._run(*arguments))


def current_device() -> Any:
    """The device that this thread computes on; None is JAX's own choice."""
    return jax.config.jax_default_device  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def one_lane(structure: Structure) -> Any:
    """The function of one lane of a structure, `(common, weights, rtol) -> measurements`, traced once a process."""
    return jax.jit(functools.partial(flow_lane, structure))


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def _program(structure: Structure) -> Program:
    """The program of up to `IN_A_ROW` lanes of a structure, made once a process."""
    measurements = one_lane(structure)

    def run(
        common: Common,
        weights: tuple[Float[Array, "lanes _ _"], ...],
        rtol: Float[Array, " lanes"],
        count: Int[Array, ""],
    ) -> dict[str, PyTree]:
        def lane(number: Array | int) -> tuple[Common, Weights, Array]:
            return common, *jax.tree.map(lambda a: a[number], (weights, rtol))

        def compute(number: Array, results: dict[str, PyTree]) -> dict[str, PyTree]:
            return jax.tree.map(lambda all, new: all.at[number].set(new), results, measurements(*lane(number)))

        shapes = jax.eval_shape(measurements, *lane(0))
        places = jax.tree.map(lambda a: jnp.zeros((IN_A_ROW, *a.shape), a.dtype), shapes)
        return jax.lax.fori_loop(0, count, compute, places)

    return Program(run)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def _weights_program(sizes: tuple[int, ...], dtype: str) -> Program:
    """The program that draws the initial weights of some lanes: apart, since it is the same for all activations."""
    return Program(jax.vmap(functools.partial(initial_weights, sizes, dtype)))


def run_one_by_one(structure: Structure, common: Common, lanes: Sequence[LaneValues]) -> list[dict[str, PyTree]]:
    """The measurements of lanes computed one after another, a few in every call of the program."""
    found: list[dict[str, PyTree]] = []
    for first in range(0, len(lanes), IN_A_ROW):
        few = lanes[first : first + IN_A_ROW]
        values = _stacked(few, IN_A_ROW)
        weights = _weights_program(structure.sizes, structure.dtype)(values)
        results = _program(structure)(common, weights, values.rtol, np.asarray(len(few)))
        found += _apart(results, len(few))
    return found


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def batch_program(structure: Structure, slots: int) -> Program:
    """The program of a refilled batch, `(common, lanes, count) -> Refilled`, made once a process."""

    def run(common: Common, lanes: LaneValues, count: Array) -> Refilled:
        return refilled_map(flow_in_chunks(structure, common), lanes, count, slots)

    return Program(run)


def run_batch(
    structure: Structure, common: Common, lanes: Sequence[LaneValues], room: int, slots: int
) -> list[dict[str, PyTree]]:
    """The measurements of lanes computed in a refilled batch.

    Blocks of fewer lanes than `room` run in the program of full ones.
    """
    done = batch_program(structure, slots)(common, _stacked(lanes, room), np.asarray(len(lanes)))
    return _apart(done.results, len(lanes))


def _stacked(lanes: Sequence[LaneValues], room: int) -> LaneValues:
    """The values of lanes with a leading axis, which the first one fills up."""
    filled = [*lanes, *[lanes[0]] * (room - len(lanes))]
    return jax.tree.map(lambda *values: np.stack(values), *filled)


def _apart(results: dict[str, PyTree], lanes: int) -> list[dict[str, PyTree]]:
    """The results of each lane, on the host."""
    results = jax.device_get(results)
    return [jax.tree.map(lambda a, lane=lane: a[lane, ...], results) for lane in range(lanes)]


def slots_that_fit(structure: Structure, common: Common, lane: LaneValues) -> int:
    """How many lanes of a batch fit in half of the memory of the device.

    A lane holds its state, four times over while a step is computed, and the signals of all layers with their
    derivatives for every sample.
    """
    device = current_device() or jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return 1
    flow = flow_in_chunks(structure, common)
    state = jax.eval_shape(lambda values: flow.begin(flow.plan(values)), lane)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    signals = 6 * common.task.samples * sum(structure.sizes) * jnp.dtype(structure.dtype).itemsize
    return int(np.clip(SHARE_OF_MEMORY * limit / (4 * size + signals), 1, MOST_SLOTS))
