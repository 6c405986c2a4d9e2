"""Signal energy and instantaneous escape speed of a network."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..networks.fits import check_perceptron_fits, match_precision
from ..networks.network import AbstractNetwork
from ..objective import outputs
from ..tasks.task import Task
from .ascent import unit_layers
from .origin import Origin, energy, pull, tangent


def signal_energy(net: AbstractNetwork, task: Task) -> Float[Array, ""]:
    """`γ(θ) = −E⟨∇c(0, y), f(x)⟩`, how far the network's outputs follow the pull of the loss at zero output.

    For squared error it is the overlap `E⟨y, f(x)⟩` of network and targets; for a 1-homogeneous activation it is
    `−𝓛_0(θ)`. While the loss is on its first plateau `dγ/dt ≈ Σ_l ‖∂γ/∂W_l‖²` (Rawal & DeWeese, arXiv:2605.01288).

    **Arguments:** `net`, a network without biases; `task`, the problem. Differentiable in both.

    **Raises:** `ValueError` where net and task do not fit.
    """
    check_perceptron_fits(net, task)
    net, task = match_precision(net, task)
    return jnp.sum(pull(task) * outputs(net, task.x))


def instantaneous_speed(net: AbstractNetwork, task: Task) -> Float[Array, ""]:
    """`−𝓛_0(θ̄)`, `θ̄` the network with every layer divided by its norm: at most the optimal escape speed `s*`.

    `𝓛_0` is the leading-order loss, [`saddlejax.saddle.leading_order_loss`][]. Near the origin the network moves
    outwards at this speed: with layers of equal norm `y`, `dy/dt = −𝓛_0(θ̄) y^{L−1}`. A layer of zeros stays zero in
    `θ̄`, so that the speed is zero.

    **Arguments:** `net`, a network without biases; `task`, the problem.

    **Raises:** `ValueError` where net and task do not fit, and for activations that [`saddlejax.saddle.tangent`][]
    refuses.
    """
    check_perceptron_fits(net, task)
    slopes = tangent(net.activation)
    net, task = match_precision(net, task)
    return energy(unit_layers(net.matrices()), Origin(task, slopes))
