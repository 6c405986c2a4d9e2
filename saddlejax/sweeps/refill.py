"""A batch that never waits for its slowest lane: finished lanes are replaced by waiting ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

ATTEMPTS = 4
AT_ONCE = 8  # a refill waits for one slot in so many to be free


class Resumable(NamedTuple):
    """The computation of one lane, which can be interrupted and gone on with.

    - `plan(values)`: what to compute, from the lane's own values.
    - `begin(plan)`: the state before the first attempt.
    - `advance(plan, state, attempts)`: the state after at most so many more attempts.
    - `running(state)`: whether there is more to do.
    - `finish(plan, state)`: the result.

    A plan is made anew wherever it is needed, so that no slot has to hold what all lanes share.
    """

    plan: Callable[[Any], PyTree]
    begin: Callable[[Any], PyTree]
    advance: Callable[[Any, Any, int], PyTree]
    running: Callable[[Any], Array]
    finish: Callable[[Any, Any], PyTree]


class Refilled(NamedTuple):
    """What a refilled batch leaves.

    - `results`: of every lane.
    - `chunks`: how often all slots were advanced together.
    - `busy`: the sum over chunks of the slots that worked on a lane; `busy / (chunks · slots)` is the share of the
      machine that was used.
    """

    results: PyTree
    chunks: Int[Array, ""]
    busy: Int[Array, ""]


class _Batch(NamedTuple):
    """The states of the slots, the lane that each works on (from `count` on: none), the first lane that waits."""

    state: PyTree
    lane: Int[Array, " slots"]
    waiting: Int[Array, ""]
    results: PyTree
    chunks: Int[Array, ""]
    busy: Int[Array, ""]


def refilled_map(
    computation: Resumable, lanes: PyTree, count: Int[Array, ""], slots: int, attempts: int = ATTEMPTS
) -> Refilled:
    """The results of the first `count` lanes, computed in a batch of `slots`.

    All slots advance together by a chunk of `attempts`, as under `vmap`. As soon as an eighth of them have finished, their
    results are put aside and the next lanes start there. The results of lanes from `count` on are zeros.

    **Arguments:** `lanes`, the own values of the lanes with a leading axis.
    """
    total = len(jax.tree.leaves(lanes)[0])
    slots = min(slots, total)
    together = max(1, slots // AT_ONCE)
    begin = jax.vmap(lambda values: computation.begin(computation.plan(values)))
    advance = jax.vmap(lambda values, state: computation.advance(computation.plan(values), state, attempts))
    finish = jax.vmap(lambda values, state: computation.finish(computation.plan(values), state))
    running = jax.vmap(computation.running)

    def values_of(indices: Array) -> PyTree:
        return jax.tree.map(lambda a: a[jnp.minimum(indices, total - 1)], lanes)

    def working(batch: _Batch) -> Array:
        return running(batch.state) & (batch.lane < count)

    def refill(batch: _Batch) -> _Batch:
        done = ~running(batch.state) & (batch.lane < count)
        (places,) = jnp.nonzero(done, size=together, fill_value=slots)
        there = places < slots
        here = jnp.minimum(places, slots - 1)
        found = finish(values_of(batch.lane[here]), jax.tree.map(lambda a: a[here], batch.state))
        to = jnp.where(there, batch.lane[here], total)
        new = jnp.minimum(jnp.where(there, batch.waiting + jnp.cumsum(there) - 1, count), count)
        return batch._replace(
            state=_put(batch.state, places, begin(values_of(new))),
            lane=_put(batch.lane, places, new),
            waiting=jnp.minimum(batch.waiting + jnp.sum(there), count),
            results=_put(batch.results, to, found),
        )

    def body(batch: _Batch) -> _Batch:
        busy = working(batch)
        free = jnp.sum((batch.lane < count) & ~busy)
        batch = jax.lax.cond((free >= together) | ~jnp.any(busy), refill, lambda batch: batch, batch)
        busy = working(batch)
        after = advance(values_of(batch.lane), batch.state)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(busy.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return batch._replace(
            state=jax.tree.map(choose, after, batch.state),
            chunks=batch.chunks + jnp.any(busy),
            busy=batch.busy + jnp.sum(busy),
        )

    lane = jnp.minimum(jnp.arange(slots), count)
    state = begin(values_of(lane))
    shapes = jax.eval_shape(finish, values_of(lane), state)
    zero = jnp.zeros((), lane.dtype)
    batch = _Batch(
        state=state,
        lane=lane,
        waiting=jnp.minimum(slots, count).astype(lane.dtype),
        results=jax.tree.map(lambda a: jnp.zeros((total, *a.shape[1:]), a.dtype), shapes),
        chunks=zero,
        busy=zero,
    )
    batch = jax.lax.while_loop(lambda batch: jnp.any(batch.lane < count), body, batch)
    return Refilled(batch.results, batch.chunks, batch.busy)


def _put(all: PyTree, places: Int[Array, " some"], new: PyTree) -> PyTree:
    """Trees of arrays with other rows in some places; places beyond the end are left out."""
    return jax.tree.map(lambda a, b: a.at[places].set(b.astype(a.dtype), mode="drop"), all, new)
