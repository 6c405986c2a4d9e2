"""Numbers and arrays, whatever they stand for: precision, norms and random draws."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

Tree = TypeVar("Tree")
Numbers = Sequence[float | int] | Array | np.ndarray
"""A sequence of numbers, or an array."""

LEAST_DRAW = 1024


def in_precision(tree: Tree, dtype: Any) -> Tree:
    """The same tree with its real floating-point arrays, JAX's and NumPy's, in another precision."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_real_array(leaf) else leaf, tree)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is a JAX or NumPy array."""
    return isinstance(leaf, jax.Array | np.ndarray)


def is_real_array(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating-point numbers."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def safe_norm(array: Float[Array, "..."]) -> Float[Array, ""]:
    """Euclidean norm of all entries, whose squares may underflow or overflow; differentiable, 0 at 0."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(array)))
    unit = jnp.where(largest == 0, 1, largest)
    squares = jnp.sum(jnp.square(array / unit))
    zero = squares == 0
    return unit * jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def power_of_ten(log_value: float, digits: int = 5) -> str:
    """A number from its natural logarithm, however large, with so many digits after the first."""
    if not np.isfinite(log_value):
        return str(np.exp(log_value))
    exponent = int(np.floor(log_value / np.log(10)))
    if exponent < -4 or exponent > 5:
        return f"{np.exp(log_value - exponent * np.log(10)):.{digits}f}e{exponent:+d}"
    return f"{np.exp(log_value):.{max(digits - exponent, 0)}f}"


def standard_normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = float) -> Float[Array, "..."]:
    """Independent standard normal numbers, cut from a vector whose length is a power of two.

    With JAX's default generator they are those of `jax.random.normal`. XLA takes up to five times longer to compile that
    for an odd shape than for a power of two, and the program for one power serves many shapes.
    """
    size = math.prod(shape)
    room = max(LEAST_DRAW, 1 << (size - 1).bit_length())
    return jax.random.normal(key, (room,), dtype)[:size].reshape(shape)
