"""Numbers that floating-point types cannot hold: norms whose squares underflow, values known by their logarithms."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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
