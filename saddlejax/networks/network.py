"""Bias-free networks: what they compute from their weights, their matrices and their activation."""

import abc
from collections.abc import Sequence
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._numerics import safe_norm
from .activations import Activation, ActivationParts
from .kinked import applied

Weights = tuple[Float[Array, "_ _"], ...]
"""One matrix `(fan_out, fan_in)` a layer."""


class AbstractNetwork(eqx.Module):
    """A bias-free network `z_l = M_l h_{l−1}`, `h_l = σ(z_l)` for `l < L`, `f(x) = z_L`.

    `weights` are the parameters that a gradient flow moves, one matrix a layer; `matrices()` are the `M_l`
    they stand for, of the same shapes: the weights themselves in an ordinary network. Arrays of the activation, and
    other arrays that `matrices()` uses, are fixed numbers unless the `trainable` of a flow says
    otherwise; one can differentiate by them.

    A subclass says by `matrices()` what it computes. One that overrides `__call__`, or that holds arrays (such as
    biases) which `matrices()` does not use, is a model like any other Equinox module: flows follow what its `__call__`
    returns and move all its arrays, and what only perceptrons have, such as the imbalance, refuses it.
    """

    weights: eqx.AbstractVar[Weights]
    activation: eqx.AbstractVar[Activation]

    @abc.abstractmethod
    def matrices(self) -> Weights:
        """The matrices `M_l`, of shape `(n_l, n_{l−1})`."""

    @property
    def depth(self) -> int:
        """Number `L` of weight matrices."""
        return len(self.weights)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The `L + 1` sizes of the layers, input and output included."""
        return (self.weights[0].shape[-1], *(w.shape[-2] for w in self.weights))

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """The output `f(x)` for one sample."""
        return preactivations(self, x)[-1]

    def with_weights(self: "Net", weights: Sequence[Array | np.ndarray]) -> "Net":
        """The same network with other weights."""
        return eqx.tree_at(lambda net: net.weights, self, tuple(map(jnp.asarray, weights)))


Net = TypeVar("Net", bound=AbstractNetwork)


class AbstractNetworkOfParts(AbstractNetwork):
    """A network that is a tree of arrays, whatever its activation: it keeps the arrays and the rest of it apart."""

    activation_parts: eqx.AbstractVar[ActivationParts]

    @property  # type: ignore[misc]  # in Equinox a property may stand for an AbstractVar
    def activation(self) -> Activation:  # type: ignore[override]
        """The activation `σ`."""
        return self.activation_parts.whole


def preactivations(net: AbstractNetwork, x: Float[Array, "*batch in"]) -> list[Float[Array, "*batch _"]]:
    """The pre-activations `z_1 … z_L` for a sample or a batch; the last one is the output.

    Matrix products run at full precision whatever the global setting.
    """
    h = x
    zs: list[Array] = []
    for layer, matrix in enumerate(net.matrices()):
        h = applied(net.activation, zs[-1]) if layer > 0 else h
        zs.append(jnp.matmul(h, matrix.T, precision="highest"))
    return zs


def layer_norms(net: AbstractNetwork) -> Float[Array, " layers"]:
    """The Frobenius norms `‖W_l‖_F`, safe from underflow and overflow of the squares."""
    return jnp.stack([safe_norm(w) for w in net.weights])
