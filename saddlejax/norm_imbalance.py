"""The norm imbalance of neighbouring layers, and the exact identity for its rate of change."""

import itertools
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .networks.checks import check_network
from .networks.fits import check_perceptron_fits, match_precision
from .networks.network import AbstractNetwork
from .objective import task_loss
from .tasks.task import Task

PerLayer = Float[Array, " hidden_layers"]
PerNeuron = list[Float[Array, " _"]]


@overload
def imbalance(net: AbstractNetwork, *, per_neuron: Literal[False] = False) -> PerLayer: ...
@overload
def imbalance(net: AbstractNetwork, *, per_neuron: Literal[True]) -> PerNeuron: ...
def imbalance(net: AbstractNetwork, *, per_neuron: bool = False) -> PerLayer | PerNeuron:
    """The norm imbalance `Δ_l = ‖W_{l+1}‖_F² − ‖W_l‖_F²` of neighbouring layers.

    Gradient flow conserves it exactly for activations homogeneous of degree one (Du, Hu & Lee, arXiv:1806.00900);
    for all others [`saddlejax.imbalance_rate`][] says how it changes.

    **Arguments:**

    - `net`: a network of `L` layers. Batches of networks: `jax.vmap(imbalance)(nets)`.
    - `per_neuron`: split it over the hidden neurons, `Δ_{l,j} = ‖W_{l+1}[:, j]‖² − ‖W_l[j, :]‖²`.

    **Returns:** an array `(L − 1,)`; with `per_neuron`, a list of `L − 1` arrays `(n_l,)` with these sums.
    """
    check_network(net)
    neurons = [
        jnp.sum(jnp.square(above), axis=0) - jnp.sum(jnp.square(below), axis=1)
        for below, above in itertools.pairwise(net.weights)
    ]
    return neurons if per_neuron else sum_neurons(neurons, net.weights[0].dtype)


@overload
def imbalance_rate(net: AbstractNetwork, task: Task, *, per_neuron: Literal[False] = False) -> PerLayer: ...
@overload
def imbalance_rate(net: AbstractNetwork, task: Task, *, per_neuron: Literal[True]) -> PerNeuron: ...
def imbalance_rate(net: AbstractNetwork, task: Task, *, per_neuron: bool = False) -> PerLayer | PerNeuron:
    """The rate of change of the imbalance under gradient flow, from the gradient of the loss.

    `dΔ_l/dt = 2⟨W_l, ∂_l⟩ − 2⟨W_{l+1}, ∂_{l+1}⟩` with `∂_l = ∂𝓛/∂W_l`; of a neuron, the row of `W_l ∘ ∂_l` that leads into
    it and the column of `W_{l+1} ∘ ∂_{l+1}` that leads out of it. By the imbalance identity it is
    `2 E⟨W_{l+1}ᵀ δ_{l+1}, φ(z_l)⟩` with `φ(z) = z σ'(z) − σ(z)` and `δ_l = ∂c/∂z_l`, for any differentiable activation `σ`
    and loss `c` (Rawal & DeWeese, arXiv:2605.01288): zero where `σ` is homogeneous of degree one.

    Relative to `‖W_l‖ ‖∂_l‖` the error is a few units of rounding. Relative to the rate itself it grows where
    pre-activations are small: where `φ ~ z^q` the two products differ by a share of `z^{q−1}` only, so that the rate is
    known to about `eps / z^{q−1}` (for tanh in single precision not at all below `z ~ 1e-3`).

    **Arguments:**

    - `net`, `task`: a network and a task of the same numbers of inputs and outputs, computed in the wider of their
      two floating-point types. Batches: `jax.vmap(imbalance_rate, in_axes=(0, None))(nets, task)`.
    - `per_neuron`: the rate of each `Δ_{l,j}`.

    **Returns:** an array `(L − 1,)`; with `per_neuron`, a list of `L − 1` arrays `(n_l,)`.

    **Raises:** `ValueError` where the network does not fit the task, or its weights are not finite.
    """
    check_perceptron_fits(net, task)
    net, task = match_precision(net, task)
    slopes = jax.grad(lambda weights: task_loss(net.with_weights(weights), task))(net.weights)
    products = [2 * w * slope for w, slope in zip(net.weights, slopes, strict=True)]
    rates = [jnp.sum(below, axis=1) - jnp.sum(above, axis=0) for below, above in itertools.pairwise(products)]
    return rates if per_neuron else sum_neurons(rates, net.weights[0].dtype)


def imbalance_matrices(net: AbstractNetwork) -> list[Float[Array, "neurons neurons"]]:
    """The matrices `W_{l+1}ᵀ W_{l+1} − W_l W_lᵀ`, which the gradient flow of a linear network conserves entirely.

    For any other activation only their diagonals, the imbalances of the neurons, obey an identity
    ([`saddlejax.imbalance_rate`][]). Source: Du, Hu & Lee, arXiv:1806.00900.

    **Returns:** a list of `L − 1` symmetric arrays `(n_l, n_l)`.
    """
    check_network(net)
    return [
        jnp.matmul(above.T, above, precision="highest") - jnp.matmul(below, below.T, precision="highest")
        for below, above in itertools.pairwise(net.weights)
    ]


def sum_neurons(neurons: list[Float[Array, " _"]] | tuple[Float[Array, " _"], ...], dtype: jnp.dtype) -> Array:
    """One number for each hidden layer from one for each of its neurons; an empty array where there is none."""
    return jnp.stack([jnp.sum(layer) for layer in neurons]) if neurons else jnp.zeros((0,), dtype)
