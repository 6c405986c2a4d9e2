"""Reduction to the block-symmetric submanifold, expansion from it, projection on it and the distance from it.

Networks whose neurons within a block are identical form a linear subspace of the weights that gradient flow preserves
for any data, loss and activation (Rawal & DeWeese, arXiv:2605.01288). With the isometries `U_l` of the blocks, the
subspace is `W_l = U_l A_l U_{l−1}ᵀ`, and the flow on it the Euclidean gradient flow of the narrow `A_l`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check
from .._numerics import safe_norm
from ..networks.block_mlp import BlockMLP
from ..networks.checks import check_network
from ..networks.mlp import MLP
from ..networks.network import AbstractNetwork
from .blocks import Blocks, compress, hidden_labels, spread


def reduce(net: MLP, blocks: Blocks = 1) -> BlockMLP:
    """The narrow network, one unit a block, with the same outputs and the same gradient flow as a block-symmetric one.

    **Arguments:**

    - `net`: a network whose neurons within each block have the same incoming and the same outgoing weights.
    - `blocks`: the number of blocks of every hidden layer (runs of neighbours, as equal as possible); or a list with
      one entry a hidden layer, a number or the labels `0, 1, …` of its neurons.

    **Returns:** a [`saddlejax.manifold.BlockMLP`][] with `‖A_l‖_F = ‖W_l‖_F`.

    **Raises:** `ValueError` for a network that is not block-symmetric, with its distance, where that exceeds the square
    root of rounding relative to a layer's norm. Not looked at while JAX is tracing: the reduction is then that of
    [`saddlejax.manifold.project`][].
    """
    labels = _labels(net, blocks)
    if _check.is_concrete(net.weights):
        _refuse_asymmetric(net, blocks)
    return BlockMLP(weights=compress(net.weights, labels), labels=labels, activation=net.activation)


def expand(small: AbstractNetwork, widths: int | Sequence[int] | None = None) -> MLP:
    """The wide network of a narrow one: every unit becomes a block of identical neurons.

    **Arguments:**

    - `small`: a [`saddlejax.manifold.BlockMLP`][], or an ordinary network whose units each become a block.
    - `widths`: of the hidden layers of the wide network, one number for all or one each, divided among the units in
      runs as equal as possible. By default those a `BlockMLP` came from, in its own partition.

    **Returns:** a network with `‖W_l‖_F = ‖A_l‖_F`. Its outputs and flow are those of `small` where the blocks have the
    sizes that `small` stands for; in other widths, as from an ordinary network, the layer norms are kept instead.

    **Raises:** `ValueError` for widths below the number of units, and for no widths where `small` is an ordinary network.
    """
    check_network(small, "small")
    hidden = small.sizes[1:-1]
    if widths is None:
        if not isinstance(small, BlockMLP):
            raise _check.fail("widths", "be given for a network that was not reduced from a wide one", None)
        labels = small.labels
    else:
        chosen = [widths] * len(hidden) if isinstance(widths, int | np.integer) else list(widths)
        if len(chosen) != len(hidden):
            raise _check.fail("widths", f"be a number or {len(hidden)} numbers, one a hidden layer", repr(widths))
        for layer, (width, units) in enumerate(zip(chosen, hidden, strict=True)):
            _check.whole_number(f"widths[{layer}]", width, least=units)
        labels = tuple(hidden_labels([units], [width])[0] for units, width in zip(hidden, chosen, strict=True))
    return MLP.from_weights(spread(small.weights, labels), small.activation)


def project(net: MLP, blocks: Blocks = 1) -> MLP:
    """The nearest block-symmetric network: every block of every layer replaced by its mean.

    **Arguments:** as for [`saddlejax.manifold.reduce`][].
    """
    labels = _labels(net, blocks)
    return net.with_weights(spread(compress(net.weights, labels), labels))


def distance(net: MLP, blocks: Blocks = 1) -> Float[Array, ""]:
    """The distance `‖θ − Pθ‖` of all weights from the block-symmetric submanifold, `P` the orthogonal projection on it.

    Gradient flow preserves the submanifold but need not be attracted by it. Along a flow that kept its weights:
    `jax.vmap(lambda w: distance(net.with_weights(w), blocks))(flow.weights)`.

    **Arguments:** as for [`saddlejax.manifold.reduce`][].
    """
    return safe_norm(jnp.stack(_layer_distances(net, blocks)))


def _layer_distances(net: MLP, blocks: Blocks) -> list[Array]:
    near = project(net, blocks)
    return [safe_norm(w - p) for w, p in zip(net.weights, near.weights, strict=True)]


def _labels(net: MLP, blocks: Blocks) -> tuple[tuple[int, ...], ...]:
    check_network(net)
    if not isinstance(net, MLP):
        raise _check.fail("net", "be a saddlejax.MLP", type(net).__name__)
    return hidden_labels(blocks, net.sizes[1:-1])


def _refuse_asymmetric(net: MLP, blocks: Blocks) -> None:
    distances = np.asarray(jnp.stack(_layer_distances(net, blocks)))
    sizes = np.asarray(jnp.stack([safe_norm(w) for w in net.weights]))
    allowed = np.sqrt(jnp.finfo(net.weights[0].dtype).eps) * sizes
    if np.any(distances > allowed):
        layer = int(np.argmax(distances - allowed))
        raise _check.fail(
            "net",
            "have identical neurons within each block",
            f"at distance {np.linalg.norm(distances):.3g} from such networks (layer {layer}: {distances[layer]:.3g} of "
            f"norm {sizes[layer]:.3g})",
            "Start from saddlejax.manifold.project(net, blocks), or choose other blocks.",
        )
