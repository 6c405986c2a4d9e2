"""The loss next to the origin: its leading order, the activation's tangent there, and the matrix `M`."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check
from ..networks.activations import Activation, activation_name, resolve_activation
from ..networks.elementwise import evaluate
from ..networks.fits import check_perceptron_fits, match_precision
from ..networks.network import AbstractNetwork, Weights
from ..tasks.task import Task

_CHUNK_ENTRIES = 2**22  # hidden signals held at once for one network, in numbers
_PROBES = (1e-12, 1e-20, 1e-30)  # where the slopes of an activation at zero are read off


class Tangent(NamedTuple):
    """The 1-homogeneous function `σ_0(z) = plus·z` for `z > 0`, `minus·z` otherwise, that `σ` becomes near zero."""

    minus: float
    plus: float

    def __call__(self, z: Array) -> Array:
        """`σ_0(z)`, with the slope from below at zero."""
        return jnp.where(z > 0, self.plus, self.minus) * z

    @property
    def linear(self) -> bool:
        """Whether the slopes agree, so that the network is linear to leading order."""
        return abs(self.plus - self.minus) <= 1e-6 * max(abs(self.plus), abs(self.minus))


def tangent(activation: str | Activation) -> Tangent:
    """The one-sided slopes of an activation at zero, `lim σ(z)/z` from below and from above.

    A 1-homogeneous activation equals this tangent; a smooth one with `σ(0) = 0` has both slopes equal to its gain
    `α`, so that to leading order its network is linear.

    **Raises:** `ValueError` where the origin is no saddle of this kind: `σ(0) ≠ 0`, slopes that are both zero
    (squared ReLU), or none (`√|z|`).
    """
    sigma = resolve_activation(activation)
    name = repr(activation_name(sigma))
    points = np.asarray([sign * h for sign in (-1, 1) for h in _PROBES])
    at_zero, *values = evaluate(sigma, np.array([0.0, *points]))[0].astype(float)
    if at_zero != 0:
        raise _check.fail(
            "activation",
            "vanish at zero",
            f"{name} with σ(0) = {at_zero:.6g}",
            "Where σ(0) ≠ 0 the last layer has a non-zero gradient at zero weights: the origin is no saddle, and there "
            "is no escape direction. Subtract the constant, as in lambda z: σ(z) - σ(0).",
        )
    below, above = (values / points).reshape(2, len(_PROBES))
    size = max(np.max(np.abs(below)), np.max(np.abs(above)))
    slopes_agree = np.ptp(below) <= 1e-5 * size and np.ptp(above) <= 1e-5 * size
    if size < 1e-6:
        raise _check.fail(
            "activation",
            "have a non-zero slope at zero",
            f"{name}, whose slopes vanish there",
            "Its network is of higher than first degree in each layer near the origin, and escapes by another law.",
        )
    if not (np.isfinite(size) and slopes_agree):
        raise _check.fail("activation", "have a slope on either side of zero", f"{name}, which has none")
    return Tangent(float(below[-1]), float(above[-1]))


def has_tangent(activation: str | Activation) -> bool:
    """Whether an activation has a non-zero slope on a side of zero: whether [`saddlejax.saddle.tangent`][] takes it."""
    try:
        tangent(activation)
    except ValueError:
        return False
    return True


def pull(task: Task) -> Float[Array, "samples out"]:
    """`r_i = −p_i ∇c(0, y_i)`, how each sample pulls the outputs of a network at zero; `p_i` is its weight (`1/n`).

    Then `−𝓛_0(θ) = Σ_i ⟨r_i, f(x_i)⟩`.
    """
    zero = jnp.zeros(task.out_size, task.x.dtype)
    gradients = jax.vmap(jax.grad(task.loss), (None, 0))(zero, task.y)
    if task.sample_weights is None:
        return -gradients / task.samples
    return -gradients * task.sample_weights[:, None]


def origin_matrix(task: Task) -> Float[Array, "out in"]:
    """`M = −E[∇c(0, y) xᵀ]`, all a linear network sees of a task near the origin."""
    return jnp.matmul(pull(task).T, task.x, precision="highest")


class Origin(eqx.Module):
    """What the leading-order loss of a task and an activation is made of.

    `−𝓛_0(θ) = Σ_i ⟨r_i, W_L σ_0(W_{L−1} … σ_0(W_1 x_i))⟩` with inputs `x`, pulls `r` and the tangent's slopes.
    """

    x: Float[Array, "samples in"]
    r: Float[Array, "samples out"]
    minus: Float[Array, ""]
    plus: Float[Array, ""]

    def __init__(self, task: Task, slopes: Tangent):
        self.x, self.r = task.x, pull(task)
        self.minus, self.plus = (jnp.asarray(slope, task.x.dtype) for slope in slopes)

    def activation(self, z: Array, rounding: Array | None = None) -> Array:
        """The tangent `σ_0`, with the slope from below at zero; or its kink rounded over `|z| ≲ rounding`."""
        if rounding is None:
            return jnp.where(z > 0, self.plus, self.minus) * z
        bend = jnp.sqrt(jnp.square(z) + jnp.square(rounding)) - rounding
        return 0.5 * (self.plus + self.minus) * z + 0.5 * (self.plus - self.minus) * bend


def energy(weights: Weights, origin: Origin, rounding: Array | None = None) -> Float[Array, ""]:
    """`−𝓛_0(θ)`, differentiable, in chunks of samples so that the memory does not grow with their number.

    With `rounding`, a length, the kinks of the activation are rounded: see [`saddlejax.saddle.origin.Origin`][].
    """
    x, r = _chunks(origin.x, origin.r, sum(w.shape[0] for w in weights))

    @jax.checkpoint
    def of_chunk(weights: Weights, x: Array, r: Array) -> Array:
        h = x
        for layer, w in enumerate(weights):
            h = jnp.matmul(h if layer == 0 else origin.activation(h, rounding), w.T, precision="highest")
        return jnp.sum(r * h)

    if len(x) == 1:
        return of_chunk(weights, x[0], r[0])
    zero = jnp.zeros((), jnp.result_type(x, *weights))
    return jax.lax.scan(lambda total, chunk: (total + of_chunk(weights, *chunk), None), zero, (x, r))[0]


def _chunks(x: Array, r: Array, units: int) -> tuple[Array, Array]:
    """The samples in equal chunks, filled up with samples that pull nothing."""
    count = -(-len(x) * units // _CHUNK_ENTRIES)
    size = -(-len(x) // count)
    fill = count * size - len(x)
    padded_x, padded_r = (jnp.pad(a, ((0, fill), (0, 0))).reshape(count, size, -1) for a in (x, r))
    return padded_x, padded_r


def leading_order_loss(net: AbstractNetwork, task: Task) -> Float[Array, ""]:
    """`𝓛_0(θ) = E⟨∇c(0, y), f_0(x)⟩`, the part of the loss that moves a network with small weights.

    `f_0` is the network with its activation replaced by the tangent at zero: the network itself for 1-homogeneous
    activations, `α^{L−1} W_L … W_1 x` for smooth ones. Then `𝓛 = C(0) + 𝓛_0(θ) + …` near the origin.

    **Arguments:** `net`, a network without biases; `task`, the problem. Differentiable in both.

    **Raises:** `ValueError` where net and task do not fit, and for activations that [`saddlejax.saddle.tangent`][]
    refuses.
    """
    check_perceptron_fits(net, task)
    slopes = tangent(net.activation)
    net, task = match_precision(net, task)
    return -energy(net.matrices(), Origin(task, slopes))
