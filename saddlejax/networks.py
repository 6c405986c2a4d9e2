"""Bias-free networks as Equinox modules, and their initial scales."""

import abc
import itertools
from collections.abc import Sequence
from functools import singledispatch
from typing import Self, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from ._normal import standard_normal
from .activations import Activation, activation_name, resolve_activation

Weights = tuple[Float[Array, "fan_out fan_in"], ...]
Net = TypeVar("Net", bound="AbstractNetwork")


class AbstractNetwork(eqx.Module):
    """A bias-free network `z_l = M_l h_{l−1}`, `h_l = σ(z_l)` for `l < L`, `f(x) = z_L`.

    `weights` are the parameters that a gradient flow moves, one array a layer; `matrices()` are the `M_l`
    they stand for, the weights themselves in an ordinary network.
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
        return predict(self, x)

    def with_weights(self, weights: Sequence[Array]) -> Self:
        """The same network with other weights."""
        return eqx.tree_at(lambda net: net.weights, self, tuple(weights))


class MLP(AbstractNetwork):
    """A multilayer perceptron without biases.

    **Arguments:**

    - `sizes`: the sizes of the layers, `[in_size, width, …, out_size]`; `L = len(sizes) − 1`.
    - `activation`: a name from `saddlejax.ACTIVATIONS` or any elementwise JAX function.
    - `key`: a JAX random key; the weights are He-normal, `W_l ~ N(0, 2/n_{l−1})`.
    - `dtype`: of the weights; by default JAX's default float type.

    `weights` is a tuple of `L` arrays of shape `(fan_out, fan_in)`.

    **Raises:** `ValueError` for fewer than two sizes, sizes below one, or an unknown activation.
    """

    weights: Weights
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Activation = "relu",
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype | type | None = None,
    ):
        sizes = _check.layer_sizes("sizes", sizes)
        self.activation = resolve_activation(activation)
        keys = jax.random.split(key, len(sizes) - 1)
        shapes = zip(sizes[1:], sizes[:-1], strict=True)
        self.weights = tuple(he_normal(k, shape, dtype or float) for k, shape in zip(keys, shapes, strict=True))

    @classmethod
    def from_weights(cls, weights: Sequence[Array], activation: str | Activation = "relu") -> "MLP":
        """The network with given weights, a sequence of `L` arrays of shape `(fan_out, fan_in)`.

        **Raises:** `ValueError` where the shapes of neighbouring layers do not fit.
        """
        arrays = [jnp.asarray(w) for w in weights]
        check_weights("weights", arrays)
        dtype = jnp.result_type(*arrays)
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
        net = cls((1, 1), activation, key=jax.random.key(0))
        return eqx.tree_at(lambda n: n.weights, net, tuple(w.astype(dtype) for w in arrays))

    def matrices(self) -> Weights:
        """The weights."""
        return self.weights

    def __str__(self) -> str:
        sizes = "-".join(map(str, self.sizes))
        return f"MLP {sizes}, {activation_name(self.activation)}, {self.weights[0].dtype}"


def he_normal(key: PRNGKeyArray, shape: tuple[int, int], dtype: jnp.dtype | type) -> Float[Array, "fan_out fan_in"]:
    """The initial weights of a layer, `N(0, 2/fan_in)`."""
    return jnp.sqrt(jnp.asarray(2 / shape[1], dtype)) * standard_normal(key, shape, dtype)


def check_weights(argument: str, weights: Sequence[Array]) -> None:
    """Refuse weights that are not matrices, or whose neighbours do not fit."""
    if len(weights) == 0:
        raise _check.fail(argument, "hold at least one matrix", "empty")
    for layer, w in enumerate(weights):
        if w.ndim != 2 or 0 in w.shape:
            raise _check.fail(f"{argument}[{layer}]", "be a matrix (fan_out, fan_in)", f"of shape {w.shape}")
    for layer, (below, above) in enumerate(itertools.pairwise(weights)):
        if below.shape[0] != above.shape[1]:
            raise _check.fail(
                argument,
                "fit together: the columns of a layer are the rows of the one below",
                f"{below.shape} in layer {layer} and {above.shape} in layer {layer + 1}",
            )


def preactivations(net: AbstractNetwork, x: Float[Array, "*batch in"]) -> list[Float[Array, "*batch _"]]:
    """The pre-activations `z_1 … z_L` for a sample or a batch; the last one is the output.

    Matrix products run at full precision whatever the global setting.
    """
    h = x
    zs: list[Array] = []
    for layer, matrix in enumerate(net.matrices()):
        h = net.activation(zs[-1]) if layer > 0 else h
        zs.append(jnp.matmul(h, matrix.T, precision="highest"))
    return zs


@singledispatch
def predict(net: AbstractNetwork, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """The outputs for a sample or a batch. Networks that store their layers in another way register their own."""
    return preactivations(net, x)[-1]


def scale_layers(net: Net, scale: float | Array, layers: Sequence[int] | int | None = None) -> Net:
    """Multiply layers by `scale`, an init scale `ε`.

    **Arguments:**

    - `net`: any network.
    - `scale`: a positive number, or one a chosen layer.
    - `layers`: indices from 0, negative ones from the end; by default every layer. Choosing `r` layers of an
      otherwise He-normal network makes a bottleneck of `r` layers.

    **Returns:** a new network; `net` is unchanged.

    **Raises:** `ValueError` for scales that are not positive, unknown or repeated layers.
    """
    _check.positive_number("scale", scale, "An init scale multiplies the weights; use a small positive one.")
    chosen = _check.layer_indices(layers, net.depth)
    scales = jnp.asarray(scale)
    if scales.ndim > 1 or (scales.ndim == 1 and scales.shape != (len(chosen),)):
        raise _check.fail(
            "scale", f"be a number or {len(chosen)} numbers, one a chosen layer", f"of shape {scales.shape}"
        )
    scales = jnp.broadcast_to(scales, (len(chosen),))
    weights = list(net.weights)
    for position, layer in enumerate(chosen):
        weights[layer] = weights[layer] * scales[position].astype(weights[layer].dtype)
    return net.with_weights(weights)


def layer_norms(net: AbstractNetwork) -> Float[Array, " layers"]:
    """The Frobenius norms `‖W_l‖_F`, safe from underflow and overflow of the squares."""
    return jnp.stack([safe_norm(w) for w in net.weights])


def safe_norm(array: Float[Array, "..."]) -> Float[Array, ""]:
    """Euclidean norm of all entries, whose squares may underflow or overflow; differentiable, 0 at 0."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(array)))
    unit = jnp.where(largest == 0, 1, largest)
    squares = jnp.sum(jnp.square(array / unit))
    zero = squares == 0
    return unit * jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))
