"""Partitions of the hidden neurons into blocks, and the isometries they define."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check
from ..networks.block_mlp import Labels, block_sizes
from ..networks.network import Weights

Blocks = int | np.integer | Sequence[int | Sequence[int] | np.ndarray] | np.ndarray | Array
"""How to divide hidden layers: a number of blocks for all of them, or for each layer a number or one label a neuron."""


def hidden_labels(blocks: Blocks, widths: Sequence[int], argument: str = "blocks") -> tuple[Labels, ...]:
    """The block of every hidden neuron, one tuple `(n_l,)` a layer, counted from 0.

    A number `k` divides a layer into `k` runs of neighbours, as equal as possible.

    **Raises:** `ValueError` for more blocks than neurons, a wrong number of layers or labels, or labels left out.
    """
    if isinstance(blocks, int | np.integer) and _is_whole(blocks):
        blocks = [int(blocks)] * len(widths)
    if isinstance(blocks, np.ndarray | jax.Array):
        blocks = np.asarray(blocks).tolist()  # an array, one row of labels a layer
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or len(blocks) != len(widths):
        raise _check.fail(
            argument,
            f"be a whole number, or hold one entry for each of the {len(widths)} hidden layers",
            repr(blocks),
            "An entry is a number of blocks or the label of every neuron.",
        )
    return tuple(
        _layer_labels(entry, width, f"{argument}[{layer}]")
        for layer, (entry, width) in enumerate(zip(blocks, widths, strict=True))
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _layer_labels(entry: Any, width: int, argument: str) -> Labels:
    if _is_whole(entry):
        if not 1 <= entry <= width:
            raise _check.fail(argument, f"be between 1 and the {width} neurons of the layer", entry)
        parts = np.array_split(np.arange(width), int(entry))
        return tuple(block for block, part in enumerate(parts) for _ in part)
    labels = np.asarray(entry)
    if labels.shape != (width,) or not np.issubdtype(labels.dtype, np.integer):
        raise _check.fail(argument, f"be a number of blocks or {width} labels, one a neuron", repr(entry))
    if set(labels.tolist()) != set(range(int(labels.max()) + 1)):
        raise _check.fail(argument, "use every label from 0 to the largest", sorted(set(labels.tolist())))
    return tuple(int(label) for label in labels)


def isometry(labels: Labels, dtype: Any) -> Float[Array, "neurons blocks"]:
    """The matrix `U` with one column a block, `1/√m[p]` on its neurons: `Uᵀ U = 1`, and `U Uᵀ` averages over blocks."""
    rows = np.zeros((len(labels), max(labels) + 1))
    rows[np.arange(len(labels)), labels] = 1
    return jnp.asarray(rows / np.sqrt(block_sizes(labels)), dtype)


def compress(weights: Weights, labels: Sequence[Labels]) -> Weights:
    """`A_l = U_lᵀ W_l U_{l−1}`, the coordinates of the part of the weights that is constant over blocks."""
    return tuple(
        jnp.matmul(jnp.matmul(above.T, w, precision="highest"), below, precision="highest")
        for w, (below, above) in zip(weights, _around(weights, labels), strict=True)
    )


def spread(weights: Weights, labels: Sequence[Labels]) -> Weights:
    """`W_l = U_l A_l U_{l−1}ᵀ`, the wide weights with coordinates `A_l`."""
    return tuple(
        jnp.matmul(jnp.matmul(above, a, precision="highest"), below.T, precision="highest")
        for a, (below, above) in zip(weights, _around(weights, labels), strict=True)
    )


def _around(weights: Weights, labels: Sequence[Labels]) -> list[tuple[Array, Array]]:
    """The isometries below and above every layer; inputs and outputs are blocks of one."""
    dtype = weights[0].dtype
    ends = (jnp.eye(weights[0].shape[1], dtype=dtype), jnp.eye(weights[-1].shape[0], dtype=dtype))
    inner = [isometry(layer, dtype) for layer in labels]
    return list(zip([ends[0], *inner], [*inner, ends[1]], strict=True))
