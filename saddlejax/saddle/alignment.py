"""How far a network has turned to an escape direction, layer by layer."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check
from ..networks.checks import check_network, check_weights
from ..networks.network import AbstractNetwork
from .ascent import unit_layers
from .merge import merge
from .origin import tangent


def layer_cosines(net: AbstractNetwork, direction: Sequence[Array]) -> Float[Array, " layers"]:
    """The cosine between `W_l` and `ρ̃_l` for every layer, shape `(L,)`; `ρ̃` is a direction as good as `ρ`.

    Permuting hidden neurons, or splitting one into several parallel ones, changes neither the function nor the speed of a
    direction, so that a network turns to one of many equivalents of `ρ` rather than to `ρ` itself. `ρ̃` is the equivalent
    that fits the network best. It is found layer by layer from the first: parallel neurons of `ρ` are merged, each neuron
    of the network is assigned to the neuron of `ρ` with which its weights have the largest inner product, and each neuron
    of `ρ` is split among those assigned to it: `ρ̃_l = Q_l ρ_l Q_{l−1}ᵀ` with non-negative `Q_l` of unit columns (of
    either sign, where the network is linear to leading order). Near zero for a random network; one in every layer where the
    network is an optimal direction; zero where the network's layer is zero.

    **Arguments:** `net`, the network; `direction`, matrices with the same inputs, outputs and depth, such as the
    `weights` of [`saddlejax.escape_direction`][] (values, not traced ones).

    **Raises:** `ValueError` for matrices that do not fit the network, that are not finite, or through which no signal
    passes.
    """
    check_network(net)
    rho = [np.asarray(w, float) for w in direction]
    check_weights("direction", [jnp.asarray(w) for w in rho])
    _check.finite("direction", np.concatenate([w.ravel() for w in rho]))
    merged = merge(rho, 1e-6)
    if not all(np.any(w) for w in merged):
        raise _check.fail("direction", "pass a signal through every layer", "one whose output is zero for every input")
    matrices = unit_layers(net.matrices())
    ours, theirs = ((len(ws), ws[0].shape[1], ws[-1].shape[0]) for ws in (matrices, rho))
    if ours != theirs:
        raise _check.fail("direction", f"have the network's depth, inputs and outputs {ours}", theirs)
    signed = tangent(net.activation).linear
    below = jnp.eye(ours[1], dtype=matrices[0].dtype)
    cosines = []
    for layer, (w, target) in enumerate(zip(matrices, merged, strict=True)):
        agreement = jnp.matmul(jnp.matmul(w, below, precision="highest"), target.T, precision="highest")
        if layer == len(matrices) - 1:
            cosines.append(jnp.trace(agreement))
            continue
        strength = jnp.abs(agreement) if signed else jnp.maximum(agreement, 0)
        chosen = strength == jnp.max(strength, axis=1, keepdims=True)
        split = jnp.where(chosen & (strength > 0), agreement, 0)
        lengths = jnp.linalg.norm(split, axis=0)
        below = split / jnp.where(lengths > 0, lengths, 1)
        cosines.append(jnp.sum(lengths))
    return jnp.stack(cosines)
