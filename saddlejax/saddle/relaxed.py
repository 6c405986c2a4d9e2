"""Groups of parameters that do not wait on a plateau: they have terms of first or second order in the loss of their own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._numerics import safe_norm
from ..objective import Problem, TaskObjective, outputs

_SMALL, _SMALLER = 1e-4, 1e-5  # scales between which the power of a term is read off
_PROBES = 4
_STEPS, _PRODUCTS, _HALVINGS = 30, 200, 20
_ROUNDING = 1e-10


def own_terms(problem: Problem, units: dict[int, Array]) -> Float[Array, " groups"]:
    """One for each group that moves by itself while the small groups, directions `units`, are zero; zero for the others.

    A small group does if the outputs depend on it to first order with all others at zero (with a loss alone: if that is
    linear in it, or quadratic with positive curvature). Where all of them do, none is told apart. A group that is not
    small does if the loss has a gradient in it.
    """
    arrays = problem.parameters.arrays
    zero = tuple(jnp.zeros_like(a) if group in units else a for group, a in enumerate(arrays))
    test = _drives_outputs if isinstance(problem.objective, TaskObjective) else _drives_loss
    by_itself = {group: test(problem, zero, group, unit) for group, unit in units.items()}
    others_wait = ~jnp.all(jnp.stack(list(by_itself.values())))
    gradients = jax.grad(problem.loss)(zero)
    scale = jnp.max(jnp.stack([safe_norm(g) for g in gradients]))
    moves = []
    for group, gradient in enumerate(gradients):
        own = by_itself.get(group, safe_norm(gradient) > 1e-12 * scale)
        moves.append(own & others_wait)
    return jnp.stack(moves).astype(arrays[0].dtype)


def _drives_outputs(problem: Problem, zero: tuple[Array, ...], group: int, unit: Array) -> Array:
    assert isinstance(problem.objective, TaskObjective)
    x = problem.objective.task.x

    def change(s: float) -> Array:
        here = problem.parameters.with_arrays([*zero[:group], s * unit, *zero[group + 1 :]])
        return safe_norm(outputs(here, x) - outputs(problem.parameters.with_arrays(zero), x)) / s

    return change(_SMALLER) > 0.3 * change(_SMALL)


def _drives_loss(problem: Problem, zero: tuple[Array, ...], group: int, unit: Array) -> Array:
    def rate(s: float, direction: Array) -> Array:
        along = lambda s: problem.loss((*zero[:group], s * direction, *zero[group + 1 :]))  # noqa: E731
        return jax.jvp(along, (jnp.asarray(s, unit.dtype),), (jnp.ones((), unit.dtype),))[1]

    def kind(direction: Array) -> tuple[Array, Array]:
        near, nearer = rate(_SMALL, direction), rate(_SMALLER, direction)
        linear = jnp.abs(nearer) > 0.3 * jnp.abs(near)
        return linear, (nearer > 0.03 * near) & (near > 0)

    keys = jax.random.split(jax.random.key(group), _PROBES)
    noise = jax.vmap(lambda key: jax.random.normal(key, unit.shape, unit.dtype))(keys)
    linear, upwards = jax.lax.map(kind, jnp.concatenate([unit[None], noise / safe_norm(unit)]))
    return jnp.any(linear) | jnp.all(upwards)


def relaxed(
    problem: Problem, units: dict[int, Array], moving: Float[Array, " groups"]
) -> tuple[tuple[Array, ...], Float[Array, ""]]:
    """All groups with the small ones at zero and the moving ones at the minimum of the loss, and what is left there.

    **Returns:** the groups, and the norm of the gradient over that at the start.
    """
    arrays = problem.parameters.arrays
    start = tuple(jnp.zeros_like(a) if group in units else a for group, a in enumerate(arrays))
    first, restore = ravel_pytree(start)
    mask, _ = ravel_pytree(tuple(m * jnp.ones_like(a) for m, a in zip(moving, arrays, strict=True)))
    slope = jax.grad(lambda point: problem.loss(restore(point)))
    point = jax.lax.cond(
        jnp.any(moving > 0), lambda: _minimise(lambda v: problem.loss(restore(v)), first, mask), lambda: first
    )
    left, before = safe_norm(mask * slope(point)), safe_norm(mask * slope(first))
    # Groups that are at their minimum from the start have a gradient of rounding only.
    moved = before > _ROUNDING * jnp.sqrt(jnp.abs(problem.loss(start)))
    return restore(point), jnp.where(moved, left / jnp.where(moved, before, 1), 0)


def _minimise(cost: Callable[[Array], Array], first: Array, mask: Array) -> Array:
    """Newton steps by conjugate gradients in the entries that `mask` leaves free, halved until the cost falls."""
    slope = jax.grad(cost)

    def improve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        point, _, steps = carry
        gradient, product = jax.linearize(slope, point)
        gradient = mask * gradient
        step = _conjugate_gradients(lambda v: mask * product(mask * v), gradient)
        here = cost(point)

        def shorten(share: Array) -> Array:
            return share / 2

        def too_long(share: Array) -> Array:
            # At the minimum the cost is flat to rounding.
            allowed = here + 10 * jnp.finfo(here.dtype).eps * jnp.abs(here)
            return (cost(point - share * step) > allowed) & (share > 0.5**_HALVINGS)

        share = jax.lax.while_loop(too_long, shorten, jnp.ones_like(here))
        trial = point - share * step
        better = safe_norm(mask * slope(trial)) < safe_norm(gradient)
        falls = (cost(trial) < here) | better
        return jnp.where(falls, trial, point), ~falls, steps + 1

    def going(carry: tuple[Array, Array, Array]) -> Array:
        return ~carry[1] & (carry[2] < _STEPS)

    return jax.lax.while_loop(going, improve, (first, jnp.asarray(False), jnp.asarray(0)))[0]


def _conjugate_gradients(product: Callable[[Array], Array], right: Array) -> Array:
    """The solution of `H v = right`, as far as its curvature is positive: at first at least `right` itself."""
    eps = jnp.finfo(right.dtype).eps

    def going(carry: tuple) -> Array:
        _, rest, _, count, stop = carry
        return ~stop & (safe_norm(rest) > eps * safe_norm(right)) & (count < _PRODUCTS)

    def step(carry: tuple) -> tuple:
        solution, rest, direction, count, _ = carry
        image = product(direction)
        curvature, square = jnp.dot(direction, image), jnp.dot(rest, rest)
        stop = curvature <= eps * jnp.dot(direction, direction)
        length = jnp.where(stop, jnp.where(count == 0, 1, 0), square / jnp.where(stop, 1, curvature))
        left = rest - length * image
        conjugate = left + jnp.dot(left, left) / jnp.where(square > 0, square, 1) * direction
        return solution + length * direction, left, conjugate, count + 1, stop

    begin = (jnp.zeros_like(right), right, right, jnp.asarray(0), jnp.asarray(False))
    return jax.lax.while_loop(going, step, begin)[0]
