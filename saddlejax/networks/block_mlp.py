"""The narrow network whose gradient flow is that of a wide one."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .activations import Activation, ActivationParts, activation_name
from .network import AbstractNetworkOfParts, Weights

Labels = tuple[int, ...]
"""The block of every neuron of a layer, counted from 0."""


class BlockMLP(AbstractNetworkOfParts):
    """A narrow network whose gradient flow is that of a wide one with blocks of identical neurons.

    `weights` are the isometric coordinates `A_l` (`‖A_l‖_F = ‖W_l‖_F` of the wide network); with `m_l[p]` the number of
    neurons in block `p` of layer `l`, `z_l[p] = Σ_q A_l[p, q] √(m_{l−1}[q]/m_l[p]) h_{l−1}[q]` (Rawal & DeWeese,
    arXiv:2605.01288). `labels` are the blocks of the wide network's hidden neurons.

    An ordinary network to flows, plots and sweeps.
    """

    weights: Weights
    labels: tuple[Labels, ...] = eqx.field(static=True)
    activation_parts: ActivationParts

    def __init__(self, weights: Weights, labels: tuple[Labels, ...], activation: str | Activation):
        self.weights, self.labels = weights, labels
        self.activation_parts = ActivationParts(activation)

    def matrices(self) -> Weights:
        """The matrices that multiply the signals, `A_l[p, q] √(m_{l−1}[q]/m_l[p])`."""
        ones = [np.ones(n) for n in (self.sizes[0], self.sizes[-1])]
        counts = [ones[0], *map(block_sizes, self.labels), ones[1]]
        return tuple(
            w * jnp.asarray(np.sqrt(below / above[:, None]), w.dtype)
            for w, below, above in zip(self.weights, counts[:-1], counts[1:], strict=True)
        )

    @property
    def wide_sizes(self) -> tuple[int, ...]:
        """The sizes of the layers of the wide network."""
        return (self.sizes[0], *map(len, self.labels), self.sizes[-1])

    def __str__(self) -> str:
        narrow = "-".join(map(str, self.sizes))
        wide = "-".join(map(str, self.wide_sizes))
        return f"BlockMLP {narrow} of a wide {wide}, {activation_name(self.activation)}, {self.weights[0].dtype}"


def block_sizes(labels: Labels) -> np.ndarray:
    """The numbers `m[p]` of neurons in each block."""
    return np.bincount(labels)
