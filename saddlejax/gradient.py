"""The loss, its gradient and the imbalance rate from one forward and one backward pass."""

from collections.abc import Callable
from functools import singledispatch
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .networks.mlp import AbstractNetwork, Weights
from .tasks.task import Task

WORTH_TURNING = 16


class Gradient(NamedTuple):
    """What one pass forward and backward gives.

    - `loss`: `𝓛(θ)`.
    - `weights`: `∂𝓛/∂W_l`, one array a layer.
    - `neuron_rates`: `dΔ_{l,j}/dt = 2 E[(W_{l+1}ᵀ δ_{l+1})_j φ(z_l)_j]`, one array `(n_l,)` for each hidden layer.
    """

    loss: Float[Array, ""]
    weights: Weights
    neuron_rates: tuple[Float[Array, " neurons"], ...]


def homogeneity_defect(activation: Callable[[Array], Array], z: Float[Array, "..."]) -> Float[Array, "..."]:
    """`φ(z) = z σ'(z) − σ(z)`, which vanishes exactly where `σ` is homogeneous of degree one."""
    value, slope_times_z = jax.jvp(activation, (z,), (z,))
    return slope_times_z - value


@singledispatch
def gradient(net: AbstractNetwork, task: Task) -> Gradient:
    """Loss, gradient and the right-hand side of the imbalance identity in one forward and backward pass.

    Back-propagation, `δ_L = ∂c/∂f`, `δ_l = (W_{l+1}ᵀ δ_{l+1}) σ'(z_l)` and `∂𝓛/∂W_l = E[δ_l h_{l−1}ᵀ]`, written out for
    the sake of the `W_{l+1}ᵀ δ_{l+1}` on the way. Networks that store their layers in another way register their own.
    """
    matrices, to_weights = jax.vjp(lambda weights: net.with_weights(weights).matrices(), net.weights)
    zs, signals, slopes = [_product(task.x, matrices[0].T)], [task.x], []
    for matrix in matrices[1:]:
        h, slope = jax.vjp(net.activation, zs[-1])
        zs.append(_product(h, matrix.T))
        signals.append(h)
        slopes.append(slope)
    loss, delta = jax.value_and_grad(task.mean_loss)(zs[-1])
    samples = jnp.full(task.samples, 2, task.x.dtype)  # on CPUs a product is summed faster than an array
    slopes_of_loss, rates = [_outer(delta, signals[-1])], []
    for layer in reversed(range(net.depth - 1)):
        signal = _product(delta, matrices[layer + 1])
        rates.append(_product(samples, signal * homogeneity_defect(net.activation, zs[layer])))
        (delta,) = slopes[layer](signal)
        slopes_of_loss.append(_outer(delta, signals[layer]))
    (weights,) = to_weights(tuple(reversed(slopes_of_loss)))
    return Gradient(loss, weights, tuple(reversed(rates)))


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _outer(delta: Float[Array, "samples out"], h: Float[Array, "samples in"]) -> Float[Array, "out in"]:
    """`δᵀ h`. On CPUs XLA multiplies matrices faster that lie in memory as they are multiplied, so `δ` is turned first."""
    turned = delta.T
    if jax.default_backend() == "cpu" and min(delta.shape[1], h.shape[1]) >= WORTH_TURNING:
        turned = jax.lax.optimization_barrier(turned)
    return _product(turned, h)
