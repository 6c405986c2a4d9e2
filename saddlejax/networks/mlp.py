"""The multilayer perceptron without biases."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray
from numpy.typing import ArrayLike

from .. import _check
from .._numerics import standard_normal
from .activations import Activation, ActivationParts, activation_name
from .checks import check_weights
from .network import AbstractNetworkOfParts, Weights


class MLP(AbstractNetworkOfParts):
    """A multilayer perceptron without biases.

    **Arguments:**

    - `sizes`: the sizes of the layers, `[in_size, width, …, out_size]`; `L = len(sizes) − 1`.
    - `activation`: a name from `saddlejax.ACTIVATIONS` or any elementwise JAX function. An Equinox module with arrays
      serves too: its values may differ between the lanes of a `vmap`, and one can differentiate by them, but training
      moves the weights only.
    - `key`: a JAX random key; the weights are He-normal, `W_l ~ N(0, 2/n_{l−1})`.
    - `dtype`: of the weights, float32 or float64; by default JAX's default float type.

    `weights` is a tuple of `L` arrays of shape `(fan_out, fan_in)`.

    **Raises:** `ValueError` for fewer than two sizes, sizes below one, an unknown activation or one that does not act
    entry by entry, and for weights in half precision.
    """

    weights: Weights
    activation_parts: ActivationParts

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Activation = "relu",
        *,
        key: PRNGKeyArray,
        dtype: DTypeLike | None = None,
    ):
        sizes = _check.layer_sizes("sizes", sizes)
        dtype = jnp.result_type(float) if dtype is None else dtype
        _check.float_type("dtype", dtype)
        self.activation_parts = ActivationParts(activation)
        try:
            keys = jax.random.split(key, len(sizes) - 1)
        except TypeError:
            raise _check.fail("key", "be a JAX random key such as jax.random.key(0)", repr(key)) from None
        shapes = zip(sizes[1:], sizes[:-1], strict=True)
        self.weights = tuple(he_normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True))

    @classmethod
    def from_weights(
        cls, weights: Sequence[ArrayLike] | Array | np.ndarray, activation: str | Activation = "relu"
    ) -> "MLP":
        """The network with given weights, a sequence of `L` arrays of shape `(fan_out, fan_in)`.

        **Raises:** `ValueError` where the shapes of neighbouring layers do not fit, for weights in half precision or
        that are not real, and for activations as `MLP` does.
        """
        arrays = _arrays("weights", weights)
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


def he_normal(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "fan_out fan_in"]:
    """The initial weights of a layer, `N(0, 2/fan_in)`."""
    return jnp.sqrt(jnp.asarray(2 / shape[1], dtype)) * standard_normal(key, shape, dtype)


def _arrays(argument: str, weights: Sequence[ArrayLike] | Array | np.ndarray) -> list[Array]:
    try:
        return [jnp.asarray(w) for w in weights]
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise _check.fail(
            argument, "be a sequence of matrices", f"of type {type(weights).__name__} ({reason})"
        ) from error
