"""Normal random numbers in programs that compile quickly."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

LEAST = 1024


def standard_normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype | type = float) -> Float[Array, "..."]:
    """Independent standard normal numbers, cut from a vector whose length is a power of two.

    With JAX's default generator they are those of `jax.random.normal`. XLA takes up to five times longer to compile that
    for an odd shape than for a power of two, and the program for one power serves many shapes.
    """
    size = math.prod(shape)
    room = max(LEAST, 1 << (size - 1).bit_length())
    return jax.random.normal(key, (room,), dtype)[:size].reshape(shape)
