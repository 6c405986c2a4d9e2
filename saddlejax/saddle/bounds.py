"""Upper bounds on the escape speed at any depth and width."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._numerics import safe_norm
from ..tasks.task import Task
from .lbfgs import lbfgs
from .origin import Origin

_STARTS = 16
_EVALUATIONS = 100


class SpeedBound(NamedTuple):
    """`value`, the tight bound whose last maximum is found numerically, and `proven`, which needs no maximum."""

    value: Float[Array, ""]
    proven: Float[Array, ""]


@eqx.filter_jit
def speed_bound(task: Task, origin: Origin, first_layer: Float[Array, "width in"], depth: Array) -> SpeedBound:
    """Upper bounds on `−𝓛_0` over all networks with `L` layers of unit norm, whatever their width.

    Let row `i` of `R` be `−√p_i ∇c(0, y_i)`, of `X` be `√p_i x_i`, and `P = 1 − √p √pᵀ` the centring over samples where
    the gradients sum to zero, `P = 1` otherwise; then `−𝓛_0 = ⟨W_L, Rᵀ P H_{L−1}⟩` with hidden signals `H_l`. As
    `‖W_L‖_F = 1`, it is at most `‖R‖_op ‖P H_{L−1}‖_F`. An activation of Lipschitz constant `k` and `‖W_l‖_op ≤ 1`
    make no distance between two samples grow by more than `k`, so `‖P H_l‖_F ≤ k ‖P H_{l−1}‖_F`, down to
    `‖P H_1‖_F² = Σ_j ‖w_j‖² ‖P σ_0(X w_j/‖w_j‖)‖² ≤ max_{‖v‖=1} ‖P σ_0(X v)‖²`. Hence

        s* ≤ k^{L−2} ‖R‖_op max_{‖v‖=1} ‖P σ_0(X v)‖ ≤ k^{L−1} ‖R‖_op ‖P X‖_op .

    The inequalities are proven. The maximum over `v` in the middle is found by ascent from many directions, so `value`
    is a bound only if that found the largest; `proven` is the right-hand side, a singular value. As the
    search starts also from the neurons of `first_layer`, `value` is never below the speed of that network.
    """
    p = jnp.full(task.samples, 1 / task.samples, task.x.dtype) if task.sample_weights is None else task.sample_weights
    root = jnp.sqrt(p)
    pulls = origin.r / jnp.where(root > 0, root, 1)[:, None]
    rows = origin.x * root[:, None]
    total = safe_norm(jnp.sum(origin.r, axis=0))
    balanced = total <= 1e-6 * jnp.sum(jax.vmap(safe_norm)(origin.r))

    def centred(h: Array) -> Array:
        return h - jnp.where(balanced, 1, 0) * root.reshape((-1,) + (1,) * (h.ndim - 1)) * jnp.tensordot(root, h, 1)

    def cost(v: Array) -> Array:
        z = jnp.matmul(rows, v / safe_norm(v), precision="highest")
        spread = safe_norm(centred(origin.activation(z)))
        return jnp.where(spread > 0, -jnp.log(jnp.where(spread > 0, spread, 1)), jnp.inf)

    key = jax.random.key(0)
    random = jax.random.normal(key, (_STARTS, rows.shape[1]), rows.dtype)
    strongest = jax.lax.top_k(jnp.linalg.norm(first_layer, axis=1), min(8, len(first_layer)))[1]
    neurons = first_layer[strongest]
    # Neurons of zero weights give way to a random direction.
    neurons = jnp.where(jnp.linalg.norm(neurons, axis=1, keepdims=True) > 0, neurons, random[:1])
    tolerance, most = jnp.asarray(1e-6, rows.dtype), jnp.asarray(_EVALUATIONS)

    def residual(v: Array, slope: Array) -> Array:
        return safe_norm(v) * safe_norm(slope)

    costs = jax.lax.map(lambda v: lbfgs(cost, v, residual, tolerance, most).value, jnp.concatenate([random, neurons]))
    spread = jnp.exp(-jnp.min(costs))
    lipschitz = jnp.maximum(jnp.abs(origin.minus), jnp.abs(origin.plus))
    force = operator_norm(pulls)
    proven = lipschitz ** (depth - 1) * force * operator_norm(centred(rows))
    value = lipschitz ** (depth - 2) * force * spread
    return SpeedBound(jnp.minimum(value, proven), proven)


def operator_norm(matrix: Float[Array, "samples n"]) -> Float[Array, ""]:
    """The largest singular value of a tall matrix, through its small Gram matrix."""
    largest = jnp.max(jnp.abs(matrix))
    unit = matrix / jnp.where(largest > 0, largest, 1)  # so that the squares neither underflow nor overflow
    gram = jnp.matmul(unit.T, unit, precision="highest")
    return largest * jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[-1], 0))
