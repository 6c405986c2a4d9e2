"""The compiled programs of a sweep: lanes one after another, or a batch of them on an accelerator."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._host.stopping import check_stopped
from .lane import Common, Group, LaneValues, flow_lane
from .refill import Refilled, refilled_map
from .split import split_at_loop

IN_A_ROW = 8  # lanes in a call, so that calling costs little
SHARE_OF_MEMORY = 0.5
MOST_SLOTS = 2048


class Program:
    """A function to compile; threads that come while it is being compiled wait for it."""

    def __init__(self, function: Any):
        self.run = jax.jit(function)
        self._compiled: set[Any] = set()
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        kind = (jax.tree.structure(arguments), current_device())
        if kind not in self._compiled:
            with self._lock:
                results = self.run(*arguments)
                self._compiled.add(kind)
                return results
        return self.run(*arguments)


def current_device() -> Any:
    """The device that this thread computes on; None is JAX's own choice."""
    return jax.config.jax_default_device  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def one_lane(group: Group) -> Any:
    """The function of one lane of a group, `(common, lane) -> measurements`, traced once a process."""
    return jax.jit(functools.partial(flow_lane, group))


@functools.lru_cache(maxsize=64)
def _program(group: Group) -> Program:
    """The program of up to `IN_A_ROW` lanes of a group, made once a process."""
    measurements = one_lane(group)

    def run(common: Common, lanes: LaneValues, count: Array) -> dict[str, Array]:
        lane = lambda number: jax.tree.map(lambda a: a[number], lanes)  # noqa: E731

        def compute(number: Array, results: dict[str, Array]) -> dict[str, Array]:
            return jax.tree.map(lambda all, new: all.at[number].set(new), results, measurements(common, lane(number)))

        shapes = jax.eval_shape(measurements, common, lane(0))
        rooms = jax.tree.map(lambda a: jnp.zeros((IN_A_ROW, *a.shape), a.dtype), shapes)
        return jax.lax.fori_loop(0, count, compute, rooms)

    return Program(run)


def run_in_turn(group: Group, common: Common, lanes: Sequence[LaneValues]) -> list[dict[str, np.ndarray]]:
    """The measurements of lanes that share a depth, computed one after another, a few in every call of the program."""
    found: list[dict[str, np.ndarray]] = []
    for first in range(0, len(lanes), IN_A_ROW):
        check_stopped()
        few = lanes[first : first + IN_A_ROW]
        results = jax.device_get(_program(group)(common, _stacked(few, IN_A_ROW), np.asarray(len(few))))
        found += _apart(results, len(few))
    return found


@functools.lru_cache(maxsize=64)
def _batch_program(group: Group, slots: int) -> Program:
    def run(common: Common, lanes: LaneValues, count: Array) -> Refilled:
        first = jax.tree.map(lambda a: a[0], lanes)
        split = split_at_loop(functools.partial(flow_lane, group), common, first)
        return refilled_map(split, common, lanes, count, slots)

    return Program(run)


def run_batch(
    group: Group, common: Common, lanes: Sequence[LaneValues], room: int, slots: int
) -> list[dict[str, np.ndarray]]:
    """The measurements of lanes that share a depth, computed in a refilled batch.

    Blocks of fewer lanes than `room` run in the program of full ones.
    """
    run = _batch_program(group, slots)
    return _apart(jax.device_get(run(common, _stacked(lanes, room), np.asarray(len(lanes))).results), len(lanes))


def _stacked(lanes: Sequence[LaneValues], room: int) -> LaneValues:
    """The values of lanes with a leading axis, which the first one fills up."""
    filled = [*lanes, *[lanes[0]] * (room - len(lanes))]
    return jax.tree.map(lambda *values: np.stack(values), *filled)


def _apart(results: dict[str, np.ndarray], lanes: int) -> list[dict[str, np.ndarray]]:
    return [{name: value[lane] for name, value in results.items()} for lane in range(lanes)]


def slots_that_fit(group: Group, common: Common, lane: LaneValues) -> int:
    """How many lanes of a batch fit in half of the memory of the device.

    A lane holds the carry of its loop, four times over while a step is computed, and the signals of all layers with
    their derivatives for every sample.
    """
    device = current_device() or jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return 1
    split = split_at_loop(functools.partial(flow_lane, group), common, lane)
    kept = jax.eval_shape(lambda c, v: split.start(split.prepare(c), v), common, lane)
    carry = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    signals = 6 * common.task.samples * sum(group.sizes) * jnp.dtype(group.dtype).itemsize
    return int(np.clip(SHARE_OF_MEMORY * limit / (4 * carry + signals), 1, MOST_SLOTS))
