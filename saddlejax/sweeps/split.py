"""A function cut at its main loop: what comes before, one turn of the loop, what comes after."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import PyTree

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}

# Equinox's loops ask whether any lane of a batch goes on, and assert that all have made as many turns. Here every lane
# has a loop of its own.
_OVER_BATCH: dict[str, Callable[[Any], jax.Array]] = {
    "nonbatchable": jnp.asarray,
    "unvmap_any": jnp.any,
    "unvmap_all": jnp.all,
    "unvmap_max": jnp.max,
}


class Kept(NamedTuple):
    """Of one lane: the carry of the loop, and what the turns and the end need besides."""

    carry: list[jax.Array]
    rest: list[jax.Array]


class Split(NamedTuple):
    """`function(shared, own)` as parts that can be batched over `own` while `shared` stays as it is.

    - `prepare(shared)`: what depends on `shared` only, a list of arrays.
    - `start(prepared, own)`: before the loop.
    - `running(prepared, kept)`: whether the loop goes on.
    - `turn(prepared, kept)`: the carry after one turn.
    - `finish(prepared, kept)`: the result of the function after the loop.
    """

    prepare: Callable[[PyTree], list[jax.Array]]
    start: Callable[[list[jax.Array], PyTree], Kept]
    running: Callable[[list[jax.Array], Kept], jax.Array]
    turn: Callable[[list[jax.Array], Kept], list[jax.Array]]
    finish: Callable[[list[jax.Array], Kept], PyTree]


def split_at_loop(function: Callable[[PyTree, PyTree], PyTree], shared: PyTree, own: PyTree) -> Split:
    """Cut a function of two arguments at its `while` loop with the largest body.

    Shapes and types are those of the example arguments; their values do not matter. Without the cut a batch of loops
    runs until the last of them has ended.

    **Raises:** `ValueError` where the function has no such loop.
    """
    closed, result = jax.make_jaxpr(function, return_shape=True)(shared, own)
    flat_arguments = jax.tree.leaves((shared, own))
    flat = jax.make_jaxpr(lambda *values: _inline(closed.jaxpr, closed.consts, values))(*flat_arguments)
    jaxpr, treedef = flat.jaxpr, jax.tree.structure(result)
    loops = [number for number, eqn in enumerate(jaxpr.eqns) if eqn.primitive.name == "while"]
    if not loops:
        raise ValueError("function must contain a while loop, but it has none.")
    at = max(loops, key=lambda number: _length(jaxpr.eqns[number].params["body_jaxpr"].jaxpr))
    before, loop, after = jaxpr.eqns[:at], jaxpr.eqns[at], jaxpr.eqns[at + 1 :]

    shared_count = len(jax.tree.leaves(shared))
    inputs, own_inputs = jaxpr.invars[:shared_count], jaxpr.invars[shared_count:]
    lane_vars = set(own_inputs)
    for eqn in before:
        if any(_is_var(v) and v in lane_vars for v in eqn.invars):
            lane_vars.update(eqn.outvars)
    common = [eqn for eqn in before if not any(v in lane_vars for v in eqn.outvars)]
    of_lane = [eqn for eqn in before if any(v in lane_vars for v in eqn.outvars)]

    condition, body = loop.params["cond_jaxpr"], loop.params["body_jaxpr"]
    conditions, bodies = loop.params["cond_nconsts"], loop.params["body_nconsts"]
    condition_consts, body_consts = loop.invars[:conditions], loop.invars[conditions : conditions + bodies]
    first_carry = loop.invars[conditions + bodies :]
    made_after = {v for eqn in after for v in eqn.outvars} | set(loop.outvars)
    used = [v for eqn in after for v in eqn.invars] + list(jaxpr.outvars)
    needed = [v for v in [*condition_consts, *body_consts, *used] if _is_var(v) and v not in made_after]
    rest_vars = list(dict.fromkeys(v for v in needed if v in lane_vars))
    lane_needs = [v for eqn in of_lane for v in eqn.invars if _is_var(v)] + [v for v in first_carry if _is_var(v)]
    constants = dict(zip(jaxpr.constvars, flat.consts, strict=True))
    shared_vars = list(dict.fromkeys(v for v in [*needed, *lane_needs] if v not in lane_vars and v not in constants))
    own_made = {v for eqn in of_lane for v in eqn.outvars} | set(own_inputs)
    shared_vars = [v for v in shared_vars if v not in own_made]

    def prepare(shared: PyTree) -> list[jax.Array]:
        env = {**constants, **dict(zip(inputs, jax.tree.leaves(shared), strict=True))}
        _evaluate(common, env)
        return [env[v] for v in shared_vars]

    def known(prepared: list[jax.Array]) -> dict[Any, Any]:
        return {**constants, **dict(zip(shared_vars, prepared, strict=True))}

    def with_rest(prepared: list[jax.Array], kept: Kept) -> dict[Any, Any]:
        return {**known(prepared), **dict(zip(rest_vars, kept.rest, strict=True))}

    def start(prepared: list[jax.Array], own: PyTree) -> Kept:
        env = {**known(prepared), **dict(zip(own_inputs, jax.tree.leaves(own), strict=True))}
        _evaluate(of_lane, env)
        carry = [jnp.asarray(_read(env, v)) for v in first_carry]
        return Kept(carry, [env[v] for v in rest_vars])

    def running(prepared: list[jax.Array], kept: Kept) -> jax.Array:
        env = with_rest(prepared, kept)
        consts = [_read(env, v) for v in condition_consts]
        return _inline(condition.jaxpr, condition.consts, (*consts, *kept.carry))[0]

    def turn(prepared: list[jax.Array], kept: Kept) -> list[jax.Array]:
        env = with_rest(prepared, kept)
        consts = [_read(env, v) for v in body_consts]
        return _inline(body.jaxpr, body.consts, (*consts, *kept.carry))

    def finish(prepared: list[jax.Array], kept: Kept) -> PyTree:
        env = {**with_rest(prepared, kept), **dict(zip(loop.outvars, kept.carry, strict=True))}
        _evaluate(after, env)
        return jax.tree.unflatten(treedef, [_read(env, v) for v in jaxpr.outvars])

    return Split(prepare, start, running, turn, finish)


def _inline(jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Evaluate, with the bodies of calls in place of the calls."""
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, values, strict=True))
    for eqn in jaxpr.eqns:
        arguments = [_read(env, v) for v in eqn.invars]
        body = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        over_batch = _OVER_BATCH.get(eqn.primitive.name)
        if over_batch is not None:
            results = [over_batch(*arguments)]
        elif body is None:
            results = _bind(eqn, arguments)
        elif isinstance(body, core.ClosedJaxpr):
            results = _inline(body.jaxpr, body.consts, arguments)
        else:
            results = _inline(body, (), arguments)
        env.update(zip(eqn.outvars, results, strict=True))
    return [_read(env, v) for v in jaxpr.outvars]


def _evaluate(eqns: Sequence[Any], env: dict[Any, Any]) -> None:
    for eqn in eqns:
        env.update(zip(eqn.outvars, _bind(eqn, [_read(env, v) for v in eqn.invars]), strict=True))


def _bind(eqn: Any, arguments: list[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair in older versions of JAX
    results = eqn.primitive.bind(*functions, *arguments, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _read(env: dict[Any, Any], v: Any) -> Any:
    return env[v] if _is_var(v) else v.val


def _is_var(v: Any) -> bool:
    return not isinstance(v, core.Literal)


def _length(jaxpr: Any) -> int:
    """The number of operations, those of loops and branches inside included."""
    total = 0
    for eqn in jaxpr.eqns:
        total += 1
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                total += _length(getattr(value, "jaxpr", value))
    return total
