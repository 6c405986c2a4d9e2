"""The compiled programs of a sweep: one lane, or a batch of lanes on an accelerator."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .lane import Common, Group, LaneValues, flow_lane
from .refill import Refilled, refilled_map
from .split import split_at_loop

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
def program(group: Group) -> Program:
    """The program of one lane of a group, made once a process."""
    return Program(functools.partial(flow_lane, group))


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
    filled = [*lanes, *[lanes[0]] * (room - len(lanes))]
    stacked = jax.tree.map(lambda *values: np.stack(values), *filled)
    found = jax.device_get(_batch_program(group, slots)(common, stacked, np.asarray(len(lanes))).results)
    return [{name: value[lane] for name, value in found.items()} for lane in range(len(lanes))]


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
