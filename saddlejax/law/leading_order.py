"""The prediction for a perceptron whose data have a signal: its leading order, on a problem without samples where that is enough."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _check
from .._numerics import safe_norm
from ..bottleneck import init_scales
from ..curvature.sharpness import sharpness
from ..flow import Status
from ..networks.activations import Activation, ActivationParts
from ..networks.network import AbstractNetwork, AbstractNetworkOfParts, Weights, layer_norms, preactivations
from ..objective import outputs, task_loss
from ..saddle.origin import Tangent, pull
from ..tasks.task import Task, zero_loss
from .follow import follow, one_minus_overlap, share_of_optimum, steepest_energy
from .prediction import LEADING_ORDER, SIGNAL_ROUNDING, EscapePrediction


def predict_from_leading_order(
    net: AbstractNetwork, task: Task, slopes: Tangent, chosen: tuple[int, ...], with_sharpness: bool
) -> EscapePrediction | None:
    """The prediction of order `r = len(chosen)`; None where the signal matrix is known to vanish to rounding."""
    first, order = chosen[0], len(chosen)
    small, linear_task = leading_order_problem(net, task, slopes, first)
    signal, error, sizes, growth = _at_start(net, task, small, linear_task, slopes)
    least_signal = SIGNAL_ROUNDING * jnp.finfo(signal.dtype).eps
    if _check.is_concrete(signal) and float(signal) <= least_signal:
        return None

    def whole(upper: "UpperLayers") -> AbstractNetwork:
        return net.with_weights([*net.weights[:first], *upper.weights])

    def steepest(upper: "UpperLayers") -> Array:
        return steepest_energy(task, 0.0, outputs(whole(upper), task.x), order)

    plateau, zero = zero_loss(task), jnp.zeros((), task.x.dtype)
    done = follow(small, linear_task.x, linear_task.y / len(linear_task.x), zero, plateau, steepest)
    end = whole(done.model)
    status = Status.where(signal > least_signal, done.status, Status.stationary)
    escaped = status == Status.escaped
    bottleneck = jnp.asarray(chosen)
    return EscapePrediction(
        log_time=jnp.where(escaped, done.log_time, jnp.nan),
        learning_rate=None,
        order=jnp.asarray(order, task.x.dtype),
        followed=LEADING_ORDER,
        layers=chosen,
        names=None,
        scales=init_scales(net)[bottleneck],
        speed=jnp.where(escaped, done.energy / jnp.prod(layer_norms(end)[bottleneck]), jnp.nan),
        drop=jnp.where(escaped, done.energy * (1 - share_of_optimum(order) / 2) / plateau, jnp.nan),
        status=status,
        gradient_evaluations=done.gradient_evaluations,
        signal=signal,
        gradient_error=error,
        preactivations=sizes,
        bend=_bend(end, task, slopes, first),
        growth_rate=growth,
        largest_learning_rate=2 / _sharpness(end, task) if with_sharpness else None,
    )


_sharpness = eqx.filter_jit(sharpness)


@eqx.filter_jit
def _at_start(
    net: AbstractNetwork, task: Task, small: "UpperLayers", linear_task: Task, slopes: Tangent
) -> tuple[Array, Array, Array, Array]:
    """Signal, error of the gradient, sizes of the pre-activations, rate of growth: see the fields of the prediction."""
    first = net.depth - small.depth
    zs = preactivations(net, task.x)
    features = task.x if first == 0 else net.activation(zs[first - 1])
    h = features if small.depth == 1 else slopes(preactivations(small, features)[-2])
    pulls = pull(task)
    overlap = jnp.matmul(_in_unit(pulls).T, _in_unit(h), precision="highest")
    lengths = jnp.linalg.norm(_in_unit(pulls), axis=1) * jnp.linalg.norm(_in_unit(h), axis=1)
    leading = jax.grad(lambda w: task_loss(small.with_weights(w), linear_task))(small.weights)
    full = jax.grad(lambda w: task_loss(net.with_weights(w), task))(net.weights)[first:]
    norm = lambda arrays: safe_norm(jnp.stack([safe_norm(a) for a in arrays]))  # noqa: E731
    error = norm([a - b for a, b in zip(full, leading, strict=True)]) / norm(leading)
    rates = [safe_norm(g) / safe_norm(w) for g, w in zip(leading, small.weights, strict=True)]
    sizes = [safe_norm(z) / jnp.sqrt(z.size) for z in zs[first:-1]]
    return jnp.linalg.norm(overlap) / jnp.sum(lengths), error, _stack(sizes, error.dtype), jnp.max(jnp.stack(rates))


def _in_unit(array: Array) -> Array:
    """The array in units of its largest entry, whose squares do not underflow."""
    largest = jnp.max(jnp.abs(array))
    return array / jnp.where(largest > 0, largest, 1)


def _stack(numbers: list[Array], dtype: jnp.dtype) -> Array:
    return jnp.stack(numbers) if numbers else jnp.zeros(0, dtype)


@eqx.filter_jit
def _bend(net: AbstractNetwork, task: Task, slopes: Tangent, first: int) -> Float[Array, " hidden"]:
    """`rms(σ(z) − σ_0(z)) / rms(σ_0(z))` in the hidden layers from `first` on."""
    zs = preactivations(net, task.x)[first:-1]
    return _stack([safe_norm(net.activation(z) - slopes(z)) / safe_norm(slopes(z)) for z in zs], task.x.dtype)


class UpperLayers(AbstractNetworkOfParts):
    """The last layers of a network, with the tangent of its activation; every weight times a fixed multiplier."""

    weights: Weights
    multipliers: Weights
    activation_parts: ActivationParts

    def __init__(self, weights: Weights, multipliers: Weights, activation: Activation):
        self.weights, self.multipliers = weights, multipliers
        self.activation_parts = ActivationParts(activation)

    def matrices(self) -> Weights:
        """The matrices that multiply the signals."""
        return tuple(w * m for w, m in zip(self.weights, self.multipliers, strict=True))


def leading_order_problem(net: AbstractNetwork, task: Task, slopes: Tangent, first: int) -> tuple[UpperLayers, Task]:
    """The layers from the first bottleneck layer on, and the task whose gradient flow is that of `𝓛_0` in them.

    The layers below are a fixed map of the inputs. Above, the activation is its tangent at zero and the loss
    `1 − E⟨r, f⟩` with the pulls `r` of the samples; for a linear tangent only `M = Σ_i r_i h_iᵀ` counts, one sample an input.
    """
    features = task.x if first == 0 else net.activation(preactivations(net, task.x)[first - 1])
    pulls = pull(task)
    if slopes.linear:
        matrix = jnp.matmul(features.T, pulls, precision="highest")
        x, y = jnp.eye(len(matrix), dtype=matrix.dtype), matrix * len(matrix)
    else:
        x, y = features, pulls * task.samples
    multipliers = net.with_weights([jnp.ones_like(w) for w in net.weights]).matrices()
    upper = UpperLayers(net.weights[first:], multipliers[first:], slopes)
    return upper, Task(x, y, one_minus_overlap)
