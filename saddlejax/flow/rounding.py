"""Where the precision of the floating-point type ends: gradients that are rounding errors, weights lost beside others."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..networks.network import AbstractNetwork, preactivations
from ..parameters import rank
from ..tasks.task import Task

GRADIENT_ROUNDING = 10
LOST_PRODUCT = 1e3
LOST_SIGNAL = 1e-6


def log_sensitivity(log_norms: Any) -> Any:
    """`log Π ‖W_k‖` over all layers but the smallest, which a gradient is proportional to; along the last axis.

    Layers that are zero do not count. Works on arrays of JAX and of NumPy.
    """
    numpy = log_norms.__array_namespace__()
    there = numpy.isfinite(log_norms)
    total = numpy.sum(numpy.where(there, log_norms, 0), axis=-1)
    smallest = numpy.min(numpy.where(there, log_norms, numpy.inf), axis=-1)
    return numpy.where(numpy.isfinite(smallest), total - smallest, 0)


def log_gradient_rounding(log_ratio: Any, sensitivity: Any) -> Any:
    """The logarithm of the gradient norm below which a gradient may be all rounding.

    Rounding of the outputs makes errors in proportion to `sensitivity`, the product of the other layers; `log_ratio`, the
    largest logarithm along the flow of a gradient over it, tells how large the terms are that the gradient sums.
    """
    return float(np.log(GRADIENT_ROUNDING * np.finfo(sensitivity.dtype).eps)) + log_ratio + sensitivity


def dormant_log_shares(log_sizes: Float[Array, " groups"], log_norms: Float[Array, " groups"]) -> Array:
    """Logarithms of the sizes that the dormant parts had at the start beside the groups as they are now, at most 0.

    `log_sizes` are those of the root mean square of the singular values at the start; a group that started from zero has
    no dormant parts.
    """
    shares = log_sizes - log_norms
    return jnp.where(jnp.isfinite(shares), jnp.minimum(shares, 0), 0)


def dormant_lost(log_sizes: Float[Array, " groups"], log_norms: Float[Array, " groups"]) -> Bool[Array, ""]:
    """Whether in some group they are below the rounding of what the group has learned."""
    return jnp.min(dormant_log_shares(log_sizes, log_norms)) < jnp.log(jnp.finfo(log_norms.dtype).eps)


def dormant_gradient_lost(log_sizes: Float[Array, " groups"], log_norms: Float[Array, " groups"]) -> Bool[Array, ""]:
    """Whether their own gradient, a product of all layers but one, may be below the rounding of the gradient."""
    shares = dormant_log_shares(log_sizes, log_norms)
    return jnp.sum(shares) - jnp.max(shares) < jnp.log(LOST_PRODUCT * jnp.finfo(shares.dtype).eps)


def least_factor(first: np.ndarray, last: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> float:
    """By how much larger the weights must start for their dormant parts not to be lost, from the norms of the groups.

    Their product over all layers but one is then at least ten times the rounding of what has been learned.
    """
    ranks = np.asarray([rank(shape) for shape in shapes])
    there = (first > 0) & (last > 0)
    shares = np.where(there, np.minimum(first / np.where(there, last, 1) / np.sqrt(ranks), 1), 1)
    log_product = np.sum(np.log(shares)) - np.max(np.log(shares))
    wanted = np.log(GRADIENT_ROUNDING * np.finfo(last.dtype).eps)
    return float(np.exp((wanted - log_product) / max(len(shares) - 1, 1)))


def signal_left(net: AbstractNetwork, task: Task) -> Bool[Array, ""]:
    """Whether something is still to be learned: whether `E[∇c(f, y) h_lᵀ]` is not zero for some layer below the last two.

    Where it vanishes for all of them, nothing that is dormant can grow. Compared with its value at zero output.
    """
    zs = preactivations(net, task.x)
    signals = [task.x, *(net.activation(z) for z in zs[:-2])]
    at_zero = jax.grad(task.mean_loss)(jnp.zeros_like(zs[-1]))
    here = jax.grad(task.mean_loss)(zs[-1])
    pairs = [(jnp.linalg.norm(_outer(here, h)), jnp.linalg.norm(_outer(at_zero, h))) for h in signals]
    return jnp.any(jnp.stack([left > LOST_SIGNAL * first for left, first in pairs]))


def _outer(slopes: Float[Array, "samples out"], h: Float[Array, "samples in"]) -> Float[Array, "out in"]:
    return jnp.matmul(slopes.T, h, precision="highest")
