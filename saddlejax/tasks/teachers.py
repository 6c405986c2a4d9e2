"""Teachers: problems whose solution is known."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .. import _check
from .._numerics import Numbers, standard_normal
from .losses import mse
from .task import Task


def linear_teacher(singular_values: Numbers, in_size: int) -> Task:
    """A linear teacher on whitened inputs, so that every plateau is known exactly.

    The inputs are the `d = in_size` rows of `√d · I` (so `E[x xᵀ] = I`), the targets `y = S x` with `S` the
    rectangular diagonal matrix of the singular values; one output for each of them. The loss on the plateau after
    `k` learned modes is `½ Σ_{j>k} S_j²` (Saxe, McClelland & Ganguli, arXiv:1312.6120).

    **Raises:** `ValueError` for negative or no singular values, or more of them than inputs.
    """
    _check.whole_number("in_size", in_size)
    if np.ndim(singular_values) != 1 or not 0 < len(singular_values) <= in_size:
        raise _check.fail(
            "singular_values", f"be a list of 1 to {in_size} numbers (in_size)", f"of shape {np.shape(singular_values)}"
        )
    _check.finite("singular_values", singular_values)
    if _check.is_concrete(singular_values) and np.any(np.asarray(singular_values) < 0):
        raise _check.fail("singular_values", "not be negative", singular_values)
    values = jnp.asarray(singular_values, dtype=float)
    x = jnp.sqrt(jnp.asarray(in_size, values.dtype)) * jnp.eye(in_size, dtype=values.dtype)
    return Task(x, x[:, : values.size] * values)


def single_index(link: Callable[[Array], Array], in_size: int, samples: int, *, key: PRNGKeyArray) -> Task:
    """A single-index teacher `y = link(v·x)` with Gaussian inputs and a random unit direction `v`.

    **Arguments:** `link`, any JAX function; `in_size` and `samples`; `key`, a JAX random key.
    """
    if not callable(link):
        raise _check.fail("link", "be a JAX function", repr(link))
    _check.whole_number("in_size", in_size)
    _check.whole_number("samples", samples)
    key_x, key_v = jax.random.split(key)
    x = standard_normal(key_x, (samples, in_size))
    v = standard_normal(key_v, (in_size,))
    y = link(jnp.matmul(x, v / jnp.linalg.norm(v), precision="highest"))[:, None]
    return Task(x, y, mse)
