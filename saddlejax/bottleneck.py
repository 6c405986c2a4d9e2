"""Which layers of a network are small: its bottleneck."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _check
from .manifold.network import BlockMLP
from .networks import AbstractNetwork, check_network, layer_norms

LARGEST_SMALL = 1 / 3


def init_scales(net: AbstractNetwork) -> Float[Array, " layers"]:
    """The init scale of every layer, `‖W_l‖_F / √(2 n_l)`: near one for He-normal weights, `ε` after `scale_layers`.

    For a reduced network, the scales of the wide one.
    """
    sizes = net.wide_sizes if isinstance(net, BlockMLP) else net.sizes
    return layer_norms(net) / jnp.sqrt(2 * jnp.asarray(sizes[1:], net.weights[0].dtype))


def bottleneck_layers(net: AbstractNetwork) -> tuple[int, ...]:
    """The layers, counted from 0, that count as small.

    Those whose init scale is nearer, as a ratio, to the smallest of the network's than to one, the scale of He-normal
    weights; all of them where even the smallest is above a third.

    **Raises:** `ValueError` while JAX is tracing the weights: name the layers then.
    """
    check_network(net)
    if not _check.is_concrete(net.weights):
        raise _check.fail(
            "layers", "be given where the weights are traced", None, "For instance layers=range(net.depth)."
        )
    scales = np.asarray(init_scales(net), float)
    if np.min(scales) > LARGEST_SMALL:
        return tuple(range(net.depth))
    return tuple(int(layer) for layer in np.flatnonzero(scales <= np.sqrt(np.min(scales))))


def chosen_layers(net: AbstractNetwork, layers: Sequence[int] | int | None) -> tuple[int, ...]:
    """The layers an argument names, in increasing order, or the bottleneck of the network where it is None."""
    if layers is None:
        return bottleneck_layers(net)
    check_network(net)
    chosen = _check.layer_indices(layers, net.depth)
    if not chosen:
        raise _check.fail("layers", "name at least one layer", list(chosen))
    return tuple(sorted(chosen))
