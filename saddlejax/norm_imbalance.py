"""The norm imbalance of neighbouring layers, and the exact identity for its rate of change."""

from typing import Literal, overload

import jax.numpy as jnp
from jaxtyping import Array, Float

from .gradient import gradient
from .networks.mlp import AbstractNetwork, check_network
from .tasks.task import Task, check_fits, match_precision

PerLayer = Float[Array, " hidden_layers"]
PerNeuron = list[Float[Array, " neurons"]]


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
        for below, above in zip(net.weights[:-1], net.weights[1:], strict=True)
    ]
    return neurons if per_neuron else sum_neurons(neurons, net.weights[0].dtype)


@overload
def imbalance_rate(net: AbstractNetwork, task: Task, *, per_neuron: Literal[False] = False) -> PerLayer: ...
@overload
def imbalance_rate(net: AbstractNetwork, task: Task, *, per_neuron: Literal[True]) -> PerNeuron: ...
def imbalance_rate(net: AbstractNetwork, task: Task, *, per_neuron: bool = False) -> PerLayer | PerNeuron:
    """The rate of change of the imbalance under gradient flow, from one forward and one backward pass.

    `dΔ_l/dt = 2 E⟨W_{l+1}ᵀ δ_{l+1}, φ(z_l)⟩` with `φ(z) = z σ'(z) − σ(z)` and `δ_l = ∂c/∂z_l`: exact for any
    differentiable activation `σ` and loss `c` (Rawal & DeWeese, arXiv:2605.01288), and, with the products taken
    entry by entry, for every hidden neuron.

    Relative to `‖W_l‖ ‖∂𝓛/∂W_l‖` the error is a few units of rounding. Relative to the rate itself it grows where
    pre-activations are small: `φ ~ z^q` is then a difference of two numbers of the size of `z`, known to about
    `eps / z^{q−1}` (for tanh in single precision not at all below `z ~ 1e-3`).

    **Arguments:**

    - `net`, `task`: a network and a task of the same numbers of inputs and outputs, computed in the wider of their
      two floating-point types. Batches: `jax.vmap(imbalance_rate, in_axes=(0, None))(nets, task)`.
    - `per_neuron`: the rate of each `Δ_{l,j}`.

    **Returns:** an array `(L − 1,)`; with `per_neuron`, a list of `L − 1` arrays `(n_l,)`.

    **Raises:** `ValueError` where the network does not fit the task, or its weights are not finite.
    """
    check_fits(net, task)
    net, task = match_precision(net, task)
    rates = list(gradient(net, task).neuron_rates)
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
        for below, above in zip(net.weights[:-1], net.weights[1:], strict=True)
    ]


def sum_neurons(neurons: list[Float[Array, " _"]] | tuple[Float[Array, " _"], ...], dtype: jnp.dtype) -> Array:
    """One number for each hidden layer from one for each of its neurons; an empty array where there is none."""
    return jnp.stack([jnp.sum(layer) for layer in neurons]) if neurons else jnp.zeros((0,), dtype)
