"""A batch that never waits for its slowest lane: finished lanes are replaced by waiting ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .split import Kept, Split

AT_ONCE = 8  # a refill waits for one slot in so many to be free


class Refilled(NamedTuple):
    """What a refilled batch leaves.

    - `results`: of every lane.
    - `turns`: turns of the loop, in each of which all slots are computed.
    - `busy`: the sum over turns of the slots that worked on a lane; `busy / (turns · slots)` is the share of the machine
      that was used.
    """

    results: PyTree
    turns: Int[Array, ""]
    busy: Int[Array, ""]


class _Machine(NamedTuple):
    kept: Kept
    lane: Int[Array, " slots"]
    next: Int[Array, ""]
    results: PyTree
    turns: Int[Array, ""]
    busy: Int[Array, ""]


def refilled_map(split: Split, shared: PyTree, lanes: PyTree, count: Int[Array, ""], slots: int) -> Refilled:
    """The function behind `split` for each of the first `count` lanes, in a batch of `slots`.

    All slots take a turn of their loops together, as under `vmap`. As soon as an eighth of them have finished, their
    results are put aside and the next lanes start there. The results of lanes from `count` on are zeros.

    **Arguments:** `shared`, what all lanes have in common; `lanes`, their own arguments with a leading axis.
    """
    total = len(jax.tree.leaves(lanes)[0])
    slots = min(slots, total)
    together = max(1, slots // AT_ONCE)
    prepared = split.prepare(shared)
    start, finish = jax.vmap(split.start, in_axes=(None, 0)), jax.vmap(split.finish, in_axes=(None, 0))
    turn, goes_on = jax.vmap(split.turn, in_axes=(None, 0)), jax.vmap(split.running, in_axes=(None, 0))

    def take(indices: Array) -> PyTree:
        return jax.tree.map(lambda a: a[jnp.minimum(indices, total - 1)], lanes)

    def working(machine: _Machine) -> Array:
        return goes_on(prepared, machine.kept) & (machine.lane < count)

    def refill(machine: _Machine) -> _Machine:
        done = ~goes_on(prepared, machine.kept) & (machine.lane < count)
        (places,) = jnp.nonzero(done, size=together, fill_value=slots)
        there = places < slots
        ended = jax.tree.map(lambda a: a[jnp.minimum(places, slots - 1)], machine.kept)
        found = finish(prepared, ended)
        to = jnp.where(there, machine.lane[jnp.minimum(places, slots - 1)], total)
        results = jax.tree.map(lambda all, new: all.at[to].set(new, mode="drop"), machine.results, found)
        following = jnp.where(there, machine.next + jnp.cumsum(there) - 1, count)
        following = jnp.minimum(following, count)
        kept = jax.tree.map(
            lambda all, new: all.at[places].set(new, mode="drop"), machine.kept, start(prepared, take(following))
        )
        return machine._replace(
            kept=kept,
            lane=machine.lane.at[places].set(following, mode="drop"),
            next=jnp.minimum(machine.next + jnp.sum(there), count),
            results=results,
        )

    def body(machine: _Machine) -> _Machine:
        busy = working(machine)
        free = jnp.sum((machine.lane < count) & ~busy)
        machine = jax.lax.cond((free >= together) | ~jnp.any(busy), refill, lambda m: m, machine)
        busy = working(machine)
        after = turn(prepared, machine.kept)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(busy.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        carry = jax.tree.map(choose, after, machine.kept.carry)
        any_busy = jnp.any(busy)
        return machine._replace(
            kept=machine.kept._replace(carry=carry),
            turns=machine.turns + any_busy,
            busy=machine.busy + jnp.sum(busy),
        )

    lane = jnp.minimum(jnp.arange(slots), count)
    kept = start(prepared, take(lane))
    shapes = jax.eval_shape(finish, prepared, kept)
    zero = jnp.zeros((), lane.dtype)
    machine = _Machine(
        kept=kept,
        lane=lane,
        next=jnp.minimum(jnp.asarray(slots, lane.dtype), count).astype(lane.dtype),
        results=jax.tree.map(lambda a: jnp.zeros((total, *a.shape[1:]), a.dtype), shapes),
        turns=zero,
        busy=zero,
    )
    machine = jax.lax.while_loop(lambda m: jnp.any(m.lane < count), body, machine)
    return Refilled(machine.results, machine.turns, machine.busy)
