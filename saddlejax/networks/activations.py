"""The activations known by name."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._check import fail
from .._numerics import is_array
from .elementwise import check_elementwise

Activation = Callable[[Array], Array]


def identity(z: Array) -> Array:
    """`σ(z) = z`: a linear network."""
    return z


def relu(z: Array) -> Array:
    """`σ(z) = max(z, 0)`, with slope 0 at the kink."""
    return jnp.where(z > 0, z, jnp.zeros_like(z))


def leaky_relu(z: Array) -> Array:
    """`σ(z) = z` for positive `z`, `0.01 z` otherwise."""
    return jnp.where(z > 0, z, 0.01 * z)


def absolute(z: Array) -> Array:
    """`σ(z) = |z|`."""
    return jnp.abs(z)


def tanh(z: Array) -> Array:
    """`σ(z) = tanh z`."""
    return jnp.tanh(z)


def erf(z: Array) -> Array:
    """`σ(z) = erf z`; its gain at zero is `2/√π`."""
    return jax.lax.erf(z)


def sin(z: Array) -> Array:
    """`σ(z) = sin z`."""
    return jnp.sin(z)


def cos(z: Array) -> Array:
    """`σ(z) = cos z`; not zero at zero."""
    return jnp.cos(z)


def arctan(z: Array) -> Array:
    """`σ(z) = arctan z`."""
    return jnp.arctan(z)


def gelu(z: Array) -> Array:
    """`σ(z) = z Φ(z)` with the Gaussian distribution function `Φ`."""
    return jax.nn.gelu(z, approximate=False)


def gelu_tanh(z: Array) -> Array:
    """The tanh approximation of GELU."""
    return jax.nn.gelu(z, approximate=True)


def silu(z: Array) -> Array:
    """`σ(z) = z / (1 + e^{−z})`, also called Swish."""
    return z * jax.nn.sigmoid(z)


def mish(z: Array) -> Array:
    """`σ(z) = z tanh(log(1 + e^z))`."""
    return z * jnp.tanh(jax.nn.softplus(z))


def elu(z: Array) -> Array:
    """`σ(z) = z` for positive `z`, `e^z − 1` otherwise."""
    return jax.nn.elu(z)


def celu(z: Array) -> Array:
    """`σ(z) = max(z, 0) + min(0, 2 (e^{z/2} − 1))`: CELU with `α = 2` (`α = 1` is ELU)."""
    return jax.nn.celu(z, 2.0)


def selu(z: Array) -> Array:
    """The self-normalising scaled ELU; its slope jumps at zero."""
    return jax.nn.selu(z)


def softsign(z: Array) -> Array:
    """`σ(z) = z / (1 + |z|)`."""
    return jax.nn.soft_sign(z)


def hard_tanh(z: Array) -> Array:
    """`σ(z) = min(max(z, −1), 1)`."""
    return jax.nn.hard_tanh(z)


def relu6(z: Array) -> Array:
    """`σ(z) = min(max(z, 0), 6)`."""
    return jax.nn.relu6(z)


def squared_relu(z: Array) -> Array:
    """`σ(z) = max(z, 0)²`."""
    return jnp.square(relu(z))


def softplus(z: Array) -> Array:
    """`σ(z) = log(1 + e^z)`; not zero at zero."""
    return jax.nn.softplus(z)


def sigmoid(z: Array) -> Array:
    """`σ(z) = 1 / (1 + e^{−z})`; not zero at zero."""
    return jax.nn.sigmoid(z)


ACTIVATIONS = MappingProxyType(
    {
        "identity": identity,
        "linear": identity,
        "relu": relu,
        "leaky_relu": leaky_relu,
        "abs": absolute,
        "tanh": tanh,
        "erf": erf,
        "sin": sin,
        "cos": cos,
        "arctan": arctan,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "silu": silu,
        "swish": silu,
        "mish": mish,
        "elu": elu,
        "celu": celu,
        "selu": selu,
        "softsign": softsign,
        "hard_tanh": hard_tanh,
        "relu6": relu6,
        "squared_relu": squared_relu,
        "softplus": softplus,
        "sigmoid": sigmoid,
    }
)
"""Every activation that can be asked for by name."""


def resolve_activation(activation: str | Activation) -> Activation:
    """The function behind a name, or the function itself.

    **Arguments:** `activation`, a name in [`saddlejax.ACTIVATIONS`][] or any elementwise JAX function.

    **Raises:** `ValueError` for an unknown name, for anything that is neither a name nor callable, and for a function
    that does not act entry by entry, such as softmax, or that is not real or not differentiable by JAX.
    """
    if isinstance(activation, str):
        try:
            return ACTIVATIONS[activation.lower()]
        except KeyError:
            known = ", ".join(sorted(ACTIVATIONS))
            raise fail("activation", f"be one of {known}, or a JAX function", repr(activation)) from None
    if not callable(activation):
        raise fail("activation", "be a name or an elementwise JAX function", repr(activation))
    if not any(activation is known for known in ACTIVATIONS.values()):
        check_elementwise(activation)
    return activation


class ActivationParts(eqx.Module):
    """An activation as a network keeps it: `arrays`, those it holds, and `rest`, all else, a part of the structure.

    A network is then a tree of arrays whatever its activation is, and two networks whose activations differ in the
    values of their arrays only have one structure: nothing is compiled anew.
    """

    arrays: PyTree[Array]
    rest: Any = eqx.field(static=True)

    def __init__(self, activation: str | Activation):
        self.arrays, self.rest = eqx.partition(resolve_activation(activation), is_array)

    @property
    def whole(self) -> Activation:
        """The activation."""
        return eqx.combine(self.arrays, self.rest)


def activation_name(activation: Activation) -> str:
    """The name to print for an activation."""
    for name, function in ACTIVATIONS.items():
        if function is activation:
            return name
    return getattr(activation, "__name__", type(activation).__name__)
