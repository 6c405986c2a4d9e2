"""How close layers are to rank one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _check
from .._numerics import safe_norm
from ..networks.checks import check_network, check_weights
from ..networks.network import AbstractNetwork, Weights


def matrices_of(weights_or_net: AbstractNetwork | Sequence[Array]) -> Weights:
    """The matrices of a network, or of a sequence of them."""
    if isinstance(weights_or_net, AbstractNetwork):
        check_network(weights_or_net, "weights_or_net")
        return weights_or_net.matrices()
    if isinstance(weights_or_net, jax.Array | str) or not isinstance(weights_or_net, Sequence):
        raise _check.fail(
            "weights_or_net",
            "be a network of saddlejax or a sequence of matrices",
            f"of type {type(weights_or_net).__name__}",
            "Of another model give its matrices, such as [layer.weight for layer in mlp.layers].",
        )
    weights = tuple(jnp.asarray(w) for w in weights_or_net)
    check_weights("weights_or_net", weights)
    return weights


def singular_values(weights_or_net: AbstractNetwork | Sequence[Array]) -> tuple[Float[Array, " _"], ...]:
    """The singular values of every layer, largest first: one array of `min(fan_out, fan_in)` a layer.

    **Arguments:** `weights_or_net`, a network or its matrices, first layer first.
    """
    return tuple(jnp.linalg.svd(w, compute_uv=False) for w in matrices_of(weights_or_net))


def low_rank_margin(weights_or_net: AbstractNetwork | Sequence[Array]) -> Float[Array, " layers"]:
    """`(σ_1/σ_2) / l^{1/4}` for the layers `l = 1 … L`, shape `(L,)`.

    In the optimal escape direction of a deep ReLU network `σ_1(W_l)/σ_i(W_l) ≥ l^{1/4}` for `i ≥ 2` (Bantzis, Simon &
    Jacot, arXiv:2505.21722), so that a margin of at least one is what that theorem promises. A layer of rank one has an
    infinite margin, a layer of zeros none (`nan`).

    **Arguments:** `weights_or_net`, a network or its matrices, first layer first.
    """
    return jnp.stack(
        [
            (values[0] / values[1] if values.size > 1 else jnp.where(values[0] > 0, jnp.inf, jnp.nan)) / layer**0.25
            for layer, values in enumerate(singular_values(weights_or_net), start=1)
        ]
    )


def stable_rank(weights_or_net: AbstractNetwork | Sequence[Array]) -> Float[Array, " layers"]:
    """`‖W_l‖_F² / ‖W_l‖_op²` of every layer, shape `(L,)`: one for rank one, never above the rank, zero for zeros.

    **Arguments:** `weights_or_net`, a network or its matrices.
    """
    relative = [values / jnp.where(values[0] > 0, values[0], 1) for values in singular_values(weights_or_net)]
    return jnp.stack([jnp.sum(jnp.square(values)) for values in relative])


def rank_one_excess(weights_or_net: AbstractNetwork | Sequence[Array]) -> Float[Array, " layers"]:
    """`Σ_{i≥2} σ_i² / Σ_i σ_i²` of every layer, shape `(L,)`: the share of the squared norm beyond rank one.

    It is zero for a layer of rank one, and for one of zeros.

    **Arguments:** `weights_or_net`, a network or its matrices.
    """
    return jnp.stack(
        [
            jnp.square(safe_norm(v[1:]) / jnp.where(v[0] > 0, safe_norm(v), 1)) if v.size > 1 else jnp.zeros_like(v[0])
            for v in singular_values(weights_or_net)
        ]
    )
