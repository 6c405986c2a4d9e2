"""Which layers of a network are small: its bottleneck."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _check
from .networks import AbstractNetwork, layer_norms

GAP = 3.0


def init_scales(net: AbstractNetwork) -> Float[Array, " layers"]:
    """The init scale of every layer, `‖W_l‖_F / √(2 n_l)`: near one for He-normal weights, `ε` after `scale_layers`."""
    return layer_norms(net) / jnp.sqrt(2 * jnp.asarray(net.sizes[1:], net.weights[0].dtype))


def bottleneck_layers(net: AbstractNetwork) -> tuple[int, ...]:
    """The layers, counted from 0, that are small beside the others.

    Sorted by init scale, the layers below the widest gap if that is at least a factor of 3; else all of them.

    **Raises:** `ValueError` while JAX is tracing the weights: name the layers then.
    """
    if not _check.is_concrete(net.weights):
        raise _check.fail(
            "layers", "be given where the weights are traced", None, "For instance layers=range(net.depth)."
        )
    logs = np.log(np.maximum(np.asarray(init_scales(net), float), np.finfo(float).tiny))
    order = np.argsort(logs)
    gaps = np.diff(logs[order])
    if gaps.size == 0 or np.max(gaps) < np.log(GAP):
        return tuple(range(net.depth))
    return tuple(sorted(int(layer) for layer in order[: int(np.argmax(gaps)) + 1]))


def chosen_layers(net: AbstractNetwork, layers: Sequence[int] | int | None) -> tuple[int, ...]:
    """The layers an argument names, or the bottleneck of the network where it is None."""
    if layers is None:
        return bottleneck_layers(net)
    return _check.layer_indices(layers, net.depth)
