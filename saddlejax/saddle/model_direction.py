"""Escape directions of any model: stationary points of the leading order of its loss, every group at unit norm."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .. import _check
from .._numerics import safe_norm
from ..objective import Problem
from .lbfgs import lbfgs
from .optima import Optimum, distinct
from .order import SaddleOrder, in_widest, saddle_point, signal_terms

_TOLERANCE = 1e-9
_EVALUATIONS = 1000


class ModelDirection(eqx.Module):
    """The fastest direction found out of the saddle at which the small groups of a model are zero.

    - `groups`: the direction `ρ`: the small groups in the order of the model, each of unit norm.
    - `names`: what they are called. Those that have a minimum of their own, such as the bias of a last layer, stay there and
      are left out.
    - `speed`: `s = −𝓛_0(ρ)`: with `order` `r` and all groups of norm `y` along `ρ`, the loss falls like `s y^r`; zero where
      no start found a direction in which it falls.
    - `residual`: `‖∂(−𝓛_0)/∂ρ − λ ρ‖ / s`, how far `ρ` is from stationary on the product of the groups' unit spheres, with
      `λ_g = ⟨ρ_g, ∂_g(−𝓛_0)⟩` for each group. `𝓛_0` is the loss at a small scale, so that what is left may be the next
      order there: small powers of the scale. On kinks, as of ReLU, it need not vanish at a maximum.
    - `order`: `r`, as [`saddlejax.saddle_order`][] finds it.
    - `speeds`, `residuals`, `gradient_evaluations`: of every start, best first.
    - `model`: the model with `ρ` in place of the small groups.
    """

    groups: tuple[Array, ...]
    names: tuple[str, ...] = eqx.field(static=True)
    speed: Float[Array, ""]
    residual: Float[Array, ""]
    order: Float[Array, ""]
    speeds: Float[Array, " starts"]
    residuals: Float[Array, " starts"]
    gradient_evaluations: Int[Array, " starts"]
    model: PyTree

    @property
    def optima(self) -> tuple[Optimum, ...]:
        """The distinct local optima, best first, with the number of starts that ended there."""
        return distinct(self.speeds, self.residuals)

    def __str__(self) -> str:
        if not _check.is_concrete(self.speed):
            return "ModelDirection (being traced)"
        found = ", ".join(f"{one.speed:.6g} ({one.starts})" for one in self.optima[:4]) or "none became stationary"
        order = "unknown" if np.isnan(float(self.order)) else str(int(self.order))
        lines = [
            f"Escape direction of a {type(self.model).__name__}, order r = {order}",
            f"  speed             {float(self.speed):.9g}",
            f"  residual          {float(self.residual):.1e}",
            f"  groups            {', '.join(self.names)}",
            f"  optima (starts)   {found}",
        ]
        return "\n".join(lines)


def model_direction(problem: Problem, small: tuple[int, ...], starts: int, key: PRNGKeyArray) -> ModelDirection:
    """The best of many ascents of `log(−𝓛_0)`, in double precision where nothing is traced."""

    def search(problem: Problem) -> ModelDirection:
        order, base = saddle_point(problem, small)
        if _check.is_concrete(order.order) and bool(jnp.isnan(order.order)):
            raise _check.fail("model", "have a saddle of some order at small parameters", "one without", f"{order}")
        free = _free(order)
        found = _search(problem, order, base, free, starts, key)
        best = int(jnp.argmax(found[1])) if _check.is_concrete(found[1]) else jnp.argmax(found[1])
        groups = tuple(group[best] for group in found[0])
        placed = list(base)
        for index, group in zip(free, groups, strict=True):
            placed[index] = group
        ranks = jnp.argsort(-found[1])
        return ModelDirection(
            groups=groups,
            names=tuple(order.names[index] for index in free),
            speed=found[1][best],
            residual=found[2][best],
            order=order.order,
            speeds=found[1][ranks],
            residuals=found[2][ranks],
            gradient_evaluations=found[3][ranks],
            model=problem.parameters.with_arrays(placed),
        )

    return in_widest(search, problem)


def _free(order: SaddleOrder) -> tuple[int, ...]:
    """The small groups that are not at a minimum of their own; all of them while that is being traced."""
    if not _check.is_concrete(order.relaxed):
        return order.small
    return tuple(group for group in order.small if not bool(order.relaxed[group]))


@eqx.filter_jit
def _search(
    problem: Problem,
    order: SaddleOrder,
    base: tuple[Array, ...],
    free: tuple[int, ...],
    starts: int,
    key: PRNGKeyArray,
) -> tuple[tuple[Array, ...], Array, Array, Array]:
    dtype = base[0].dtype
    terms = signal_terms(problem, base)
    unit = lambda groups: tuple(g / safe_norm(g) for g in groups)  # noqa: E731

    def energy(groups: Sequence[Array]) -> Array:
        """`−𝓛_0`, from the slope along the ray, which loses no digits to the loss at the saddle."""

        def along(s: Array) -> Array:
            arrays = list(base)
            for index, group in zip(free, groups, strict=True):
                arrays[index] = s * group
            return jnp.sum(terms(tuple(arrays)))

        rate = jax.jvp(along, (order.scale,), (jnp.ones_like(order.scale),))[1]
        return -rate * jnp.exp((1 - order.order) * jnp.log(order.scale)) / order.order

    def one(key: PRNGKeyArray) -> tuple[tuple[Array, ...], Array, Array, Array]:
        keys = jax.random.split(key, len(free))
        drawn = [jax.random.normal(k, base[index].shape, dtype) for k, index in zip(keys, free, strict=True)]
        start = unit(drawn)
        # A start of negative energy turns the one group that makes it most positive.
        turned = [tuple(-g if i == turn else g for i, g in enumerate(start)) for turn in range(-1, len(start))]
        energies = jnp.stack([energy(groups) for groups in turned])
        choice = jnp.where(energies[0] > 0, 0, jnp.argmax(energies))
        first, restore = ravel_pytree(jax.tree.map(lambda *all: jnp.stack(all)[choice], *turned))

        def cost(point: Array) -> Array:
            value = energy(unit(restore(point)))
            return jnp.where(value > 0, -jnp.log(jnp.where(value > 0, value, 1)), jnp.inf)

        def residual(point: Array, slope: Array) -> Array:
            pairs = zip(restore(point), restore(slope), strict=True)
            return safe_norm(jnp.stack([safe_norm(g) * safe_norm(s) for g, s in pairs]))

        end = lbfgs(cost, first, residual, jnp.asarray(_TOLERANCE, dtype), jnp.asarray(_EVALUATIONS))
        groups = unit(restore(end.point))
        found = jnp.isfinite(end.value)
        speed = jnp.where(found, jnp.exp(-end.value), 0)
        return groups, speed, jnp.where(found, end.residual, jnp.inf), end.evaluations + len(turned)

    return jax.lax.map(one, jax.random.split(key, starts))
