"""Directions whose layers all have rank one: a problem in the input dimension only."""

import numpy as np

from .origin import Tangent
from .pieces import Matrices


def chain_tangent(slopes: Tangent, depth: int) -> tuple[Tangent, float]:
    """The scalar function that the hidden layers of a rank-one direction apply, and the sign of its inner weights.

    With all layers of rank one the network is `u ψ(v·x)`, where `ψ` is a chain of `L − 1` activations with weights `±1` in
    between. The speed is a convex function of the two slopes of `ψ`, so that it is enough to try weights of one sign
    throughout, once positive and once negative. For ReLU and `|z|` `ψ` is the activation itself, whatever the depth.
    """
    chains = []
    for sign in (1.0, -1.0):
        ends = [-slopes.minus, slopes.plus]  # ψ(−1) and ψ(1)
        for _ in range(depth - 2):
            ends = [max(sign * v, 0) * slopes.plus + min(sign * v, 0) * slopes.minus for v in ends]
        chains.append((Tangent(-ends[0], ends[1]), sign))
    return max(chains, key=lambda chain: max(abs(chain[0].minus), abs(chain[0].plus)))


def embed(narrow: Matrices, sizes: tuple[int, ...], sign: float) -> Matrices:
    """The network of the given sizes that is `u ψ(v·x)`, for `narrow = [vᵀ, u]`."""
    weights = [np.zeros(shape) for shape in zip(sizes[1:], sizes[:-1], strict=True)]
    weights[0][0] = narrow[0][0]
    weights[-1][:, 0] = narrow[1][:, 0]
    for w in weights[1:-1]:
        w[0, 0] = sign
    return weights
