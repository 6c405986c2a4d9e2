"""The loss, its gradient and the imbalance rate from one forward and one backward pass."""

from collections.abc import Callable
from functools import singledispatch
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .networks import AbstractNetwork, Weights, preactivations
from .tasks.task import Task


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

    Networks that store their layers in another way register their own.
    """

    def run(weights: Weights, taps: tuple[Array, ...]) -> tuple[Array, list[Array]]:
        # The derivative with respect to a tap on h_l is W_{l+1}ᵀ δ_{l+1}, one row a sample.
        zs = preactivations(net.with_weights(weights), task.x, taps)
        return task.mean_loss(zs[-1]), zs[:-1]

    taps = tuple(jnp.zeros((task.samples, size), task.x.dtype) for size in net.sizes[1:-1])
    (loss, hidden), (weights, signals) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(net.weights, taps)
    samples = jnp.full(task.samples, 2, task.x.dtype)  # on CPUs a product is summed faster than an array
    rates = tuple(
        jnp.matmul(samples, signal * homogeneity_defect(net.activation, z), precision="highest")
        for signal, z in zip(signals, hidden, strict=True)
    )
    return Gradient(loss, weights, rates)
