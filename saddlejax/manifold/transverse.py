"""What happens to perturbations across a submanifold: it is preserved by gradient flow, but need not attract."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from .. import _check
from .._numerics import safe_norm
from ..curvature.lanczos import ritz_values
from ..flow import Flow, Save, gradient_flow
from ..flow.result import trim
from ..flow.until import AbstractUntil
from ..networks.fits import check_perceptron_fits, match_precision
from ..networks.mlp import MLP
from ..networks.network import AbstractNetwork, Weights
from ..objective import task_loss
from ..tasks.task import Task
from .blocks import Blocks
from .reduction import project

KRYLOV_SIZE = 48

Projection = Callable[[Weights], Weights]


def growth_rates(net: AbstractNetwork, task: Task, projection: Projection, count: int = 1) -> Float[Array, " count"]:
    """The fastest growth rates, in `1/t`, of perturbations in the range of an orthogonal projection `Q`.

    The linearised gradient flow is `dδ/dt = −Hδ` with the Hessian `H` of the loss at the network: these are the largest
    eigenvalues of `−QHQ`, by Lanczos on Hessian-vector products in a Krylov space of 48 vectors. Positive ones grow.

    **Arguments:** `net`, `task`; `projection`, a linear function of the weights, symmetric and its own square; `count`,
    how many rates to return. To compare with the pace of the flow itself, multiply by the time in question.

    **Returns:** `(count,)`, the largest first; NaN where there are fewer.
    """
    check_perceptron_fits(net, task)
    _check.whole_number("count", count)
    net, task = match_precision(net, task)
    flat, unravel = ravel_pytree(net.weights)

    def within(vector: Array) -> Array:
        return ravel_pytree(projection(unravel(vector)))[0]

    slope = jax.grad(lambda w: task_loss(net.with_weights(unravel(w)), task))
    _, product = jax.linearize(slope, flat)
    start = within(jax.random.normal(jax.random.key(0), flat.shape, flat.dtype))
    size = max(KRYLOV_SIZE, 2 * count)
    # Nothing left but rounding: the projection is zero and there is nothing to perturb.
    empty = jnp.linalg.norm(start) <= 1e3 * jnp.finfo(flat.dtype).eps * jnp.sqrt(flat.size)
    rates = -ritz_values(lambda v: within(product(within(v))), start, size)[:count]
    return jnp.where(empty, jnp.nan, jnp.pad(rates, (0, count - rates.size), constant_values=jnp.nan))


def transverse_growth(net: MLP, task: Task, blocks: Blocks = 1, count: int = 1) -> Float[Array, " count"]:
    """The fastest growth rates, in `1/t`, of perturbations that break the symmetry of a block-symmetric network.

    At a network on the block-symmetric submanifold the Hessian does not couple it to its orthogonal complement; these
    are the largest eigenvalues of minus the Hessian on the complement. Each belongs to as many perturbations as there
    are ways to break that symmetry, and may be listed more than once. Off the submanifold, the same of its nearest point.

    **Arguments:** `net`, `task`; `blocks` as for [`saddlejax.manifold.reduce`][]; `count`. Along a flow that kept its
    weights: `jax.vmap(lambda w: transverse_growth(net.with_weights(w), task))(flow.weights)`.

    **Returns:** `(count,)`, the largest first; NaN where every neuron is a block of its own.
    """
    return growth_rates(project(net, blocks), task, lambda weights: _across(net, weights, blocks), count)


def transverse_amplification(
    net: MLP,
    task: Task,
    blocks: Blocks = 1,
    until: AbstractUntil | None = None,
    *,
    key: PRNGKeyArray,
    rtol: float | int | Array | None = None,
) -> tuple[Float[Array, " rows"], Flow]:
    """How much a small random perturbation across the submanifold has grown along the flow from a symmetric network.

    The linearised flow itself, by differentiating the gradient flow in the direction of the perturbation: no Hessian is
    formed, and no small number subtracted from a large one.

    **Arguments:** `net`, projected on the submanifold first; `task`, `blocks`; `until` and `rtol` as for
    [`saddlejax.gradient_flow`][]; `key` draws the perturbation.

    **Returns:** `‖Qδ(t)‖/‖Qδ(0)‖` at every row of the flow, and the flow (under a transformation with rows left empty). Compare with `flow.layer_norms`: a ratio that
    grows less than the layers means that the network comes closer to the submanifold relative to its size.
    """
    start = project(net, blocks)
    leaves = zip(jax.random.split(key, start.depth), start.weights, strict=True)
    across = _across(start, tuple(jax.random.normal(k, w.shape, w.dtype) for k, w in leaves), blocks)
    length = safe_norm(jnp.stack([safe_norm(w) for w in across]))
    save = Save(weights=True, singular_values=False)

    def follow(amount: Array) -> tuple[tuple[Array, ...], Flow]:
        moved = start.with_weights([w + amount * d for w, d in zip(start.weights, across, strict=True)])
        flow = gradient_flow(moved, task, until, rtol=rtol, save=save)
        assert flow.weights is not None
        return flow.weights, flow

    zero = jnp.zeros((), length.dtype)
    _, change, flow = jax.jvp(follow, (zero,), (jnp.ones_like(zero),), has_aux=True)
    grown = jax.vmap(lambda rows: safe_norm(jnp.stack([safe_norm(w) for w in _across(start, rows, blocks)])))(change)
    grown = grown / length
    if not _check.is_concrete(grown, flow):
        return grown, flow
    rows = int(np.sum(np.isfinite(flow.losses)))
    return grown[:rows], trim(flow, rows)


def _across(net: MLP, weights: Weights, blocks: Blocks) -> Weights:
    """The part of weights that is orthogonal to the submanifold."""
    along = project(net.with_weights(weights), blocks).weights
    return tuple(w - p for w, p in zip(weights, along, strict=True))


def off_block_growth(net: AbstractNetwork, task: Task, count: int = 1) -> Float[Array, " count"]:
    """The fastest growth rates, in `1/t`, of couplings between the blocks of a network with one block a mode.

    With unit `p` of every layer, input `p` and output `p` belonging to mode `p`, a block-aligned network has diagonal
    weights. Gradient flow need not preserve that (Rawal & DeWeese, arXiv:2605.01288): these rates, the largest
    eigenvalues of minus the Hessian on the off-diagonal weights, tell where a learned block takes up other modes.

    For a linear network with inputs of unit covariance and a teacher of singular values `S`, at the saddle where some
    modes have been learned, the largest is that of `S_p^{(L−2)/L} (S_j − S_p)` over learned `p` and unlearned `j` and,
    between unlearned modes, zero. Couplings decay, then, at the saddles that are visited in order, and grow where a
    stronger mode has been left behind. Nonlinear networks do let them grow: for tanh, three layers of two blocks of ten
    neurons, Gaussian inputs and a teacher of strengths 2 and 1, the rate is positive all along the flow, 0.013 on the
    plateau after the first mode, which takes couplings from rounding to 1e-6. For GELU they are not even zero to begin
    with: the gradient at an aligned network is not aligned.

    **Arguments:** `net`, with one unit for each mode (such as one made by [`saddlejax.manifold.reduce`][]); `task`;
    `count`.

    **Returns:** `(count,)`, the largest first.
    """

    def off_diagonal(weights: Weights) -> Weights:
        return tuple(w - jnp.eye(w.shape[0], w.shape[1], dtype=w.dtype) * w for w in weights)

    return growth_rates(net, task, off_diagonal, count)
