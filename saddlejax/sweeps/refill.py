"""A batch that never waits for its slowest lane: finished lanes are replaced by waiting ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

AT_ONCE = 8  # a refill waits for one slot in so many to be free


class Resumable(NamedTuple):
    """The computation of one lane, which can be interrupted and gone on with.

    - `plan(values)`: what to compute, from the lane's own values.
    - `begin(plan)`: the state before the first step.
    - `advance(plan, state)`: the state after a chunk of further steps.
    - `running(state)`: whether there is more to do.
    - `finish(plan, state)`: the result.

    A plan is made anew wherever it is needed, so that no slot has to hold what all lanes share.
    """

    plan: Callable[[Any], PyTree]
    begin: Callable[[Any], PyTree]
    advance: Callable[[Any, Any], PyTree]
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
    """What the slots hold.

    - `state`: of every slot; `lane`: which lane it works on, −1 before the first one and `count` after the last one.
    - `waiting`: the first lane that no slot has taken yet.
    """

    state: PyTree
    lane: Int[Array, " slots"]
    waiting: Int[Array, ""]
    results: PyTree
    chunks: Int[Array, ""]
    busy: Int[Array, ""]


def refilled_map(computation: Resumable, lanes: PyTree, count: Int[Array, ""], slots: int) -> Refilled:
    """The results of the first `count` lanes, computed in a batch of `slots`.

    All slots advance together by one chunk after another, as under `vmap`. As soon as an eighth of them have finished, their
    results are put aside and the next lanes start there. The results of lanes from `count` on are zeros.

    **Arguments:** `lanes`, the own values of the lanes with a leading axis.
    """
    total = len(jax.tree.leaves(lanes)[0])
    slots = min(slots, total)
    together = max(1, slots // AT_ONCE)
    begin = jax.vmap(lambda values: computation.begin(computation.plan(values)))
    advance = jax.vmap(lambda values, state: computation.advance(computation.plan(values), state))
    finish = jax.vmap(lambda values, state: computation.finish(computation.plan(values), state))
    running = jax.vmap(computation.running)

    def values_of(numbers: Int[Array, " some"]) -> PyTree:
        return jax.tree.map(lambda a: a[jnp.clip(numbers, 0, total - 1)], lanes)

    def working(batch: _Batch) -> Bool[Array, " slots"]:
        return (batch.lane >= 0) & (batch.lane < count) & running(batch.state)

    def worth_refilling(batch: _Batch) -> Bool[Array, ""]:
        busy = working(batch)
        free = jnp.sum((batch.lane < count) & ~busy)
        return (free >= together) | ((free > 0) & ~jnp.any(busy))

    def refill(batch: _Batch) -> _Batch:
        (places,) = jnp.nonzero((batch.lane < count) & ~working(batch), size=together, fill_value=slots)
        there, here = places < slots, jnp.minimum(places, slots - 1)
        ended = batch.lane[here]
        results = finish(values_of(ended), jax.tree.map(lambda a: a[here], batch.state))
        new = jnp.minimum(batch.waiting + jnp.cumsum(there) - 1, count)
        return batch._replace(
            state=_put(batch.state, places, begin(values_of(new))),
            lane=_put(batch.lane, places, new),
            waiting=jnp.minimum(batch.waiting + jnp.sum(there), count),
            results=_put(batch.results, jnp.where(there & (ended >= 0), ended, total), results),
        )

    def body(batch: _Batch) -> _Batch:
        batch = jax.lax.while_loop(worth_refilling, refill, batch)
        busy = working(batch)
        after = advance(values_of(batch.lane), batch.state)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(busy.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return batch._replace(
            state=jax.tree.map(choose, after, batch.state),
            chunks=batch.chunks + jnp.any(busy),
            busy=batch.busy + jnp.sum(busy),
        )

    states = jax.eval_shape(begin, lanes)
    zero = jnp.zeros((), int)
    batch = _Batch(
        state=_zeros(states, slots),
        lane=jnp.full(slots, -1),
        waiting=zero,
        results=_zeros(jax.eval_shape(finish, lanes, states), total),
        chunks=zero,
        busy=zero,
    )
    batch = jax.lax.while_loop(lambda batch: jnp.any(batch.lane < count), body, batch)
    return Refilled(batch.results, batch.chunks, batch.busy)


def _zeros(shapes: PyTree, rows: int) -> PyTree:
    return jax.tree.map(lambda a: jnp.zeros((rows, *a.shape[1:]), a.dtype), shapes)


def _put(rows: PyTree, places: Int[Array, " some"], new: PyTree) -> PyTree:
    """Trees of arrays with other rows in some places; places beyond the end are left out."""
    return jax.tree.map(lambda a, b: a.at[places].set(b.astype(a.dtype), mode="drop"), rows, new)
