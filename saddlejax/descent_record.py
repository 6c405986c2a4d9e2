"""What a run of gradient descent looks at: its steps in flow time, its record, its minibatches."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .gradient import Gradient, gradient
from .imbalance import imbalance
from .networks import AbstractNetwork, layer_norms, safe_norm
from .tasks.task import Task

RISE = 0.01
"""The gradient norm counts as having risen, or fallen, once it has changed by this fraction."""


class Peak(NamedTuple):
    """The search for the first local maximum of a series: how low it was, how high since, and where."""

    low: Array
    high: Array
    step: Array
    time: Array
    passed: Array

    def see(self, value: Array, step: Array, time: Array) -> "Peak":
        """The search after one more value of the series."""
        low = jnp.minimum(self.low, value)
        rising = value > (1 + RISE) * low
        higher = ~self.passed & rising & (value > self.high)
        passed = self.passed | (value < (1 - RISE) * self.high)
        return Peak(
            jnp.where(self.passed, self.low, low),
            jnp.where(higher, value, self.high),
            jnp.where(higher, step, self.step),
            jnp.where(higher, time, self.time),
            passed,
        )


class Seen(NamedTuple):
    """One row of the record."""

    loss: Array
    gradient_norm: Array
    layer_norms: Array
    singular_values: tuple[Array, ...]
    imbalance: Array


def look(net: AbstractNetwork, task: Task) -> Seen:
    """The row of a network, from one gradient on all samples."""
    at = gradient(net, task)
    values = tuple(jnp.linalg.svdvals(w) for w in net.weights)
    return Seen(at.loss, gradient_norm(at), layer_norms(net), values, imbalance(net))


def gradient_norm(at: Gradient) -> Float[Array, ""]:
    """`‖∇𝓛‖`."""
    return safe_norm(jnp.stack([safe_norm(g) for g in at.weights]))


def flow_time(updates: tuple[Array, ...], gradients: tuple[Array, ...]) -> Float[Array, ""]:
    """`max(0, −⟨u, g⟩ / ‖g‖²)`, safe from underflow of the squares; 0 where the gradient vanishes."""
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in gradients]))
    unit = jnp.where(size > 0, size, 1)
    scaled = [g / unit for g in gradients]
    along = sum(jnp.sum(u * g) for u, g in zip(updates, scaled, strict=True))
    squares = sum(jnp.sum(jnp.square(g)) for g in scaled)
    return jnp.where(size > 0, jnp.maximum(0, -along / (jnp.where(size > 0, squares, 1) * unit)), 0)


class Minibatches(eqx.Module):
    """Samples drawn without replacement, `size` at a time, and shuffled again after each pass through the data."""

    size: int = eqx.field(static=True)
    key: PRNGKeyArray

    def draw(self, task: Task, order: Array, taken: Array) -> tuple[Array, Task]:
        """The order of samples in this pass through the data, and the minibatch of the step after `taken` steps."""
        batches = task.samples // self.size
        through, position = taken // batches, taken % batches
        order = jax.lax.cond(
            position == 0,
            lambda: jax.random.permutation(jax.random.fold_in(self.key, through), task.samples),
            lambda: order,
        )
        chosen = jax.lax.dynamic_slice_in_dim(order, position * self.size, self.size)
        return order, eqx.tree_at(lambda t: (t.x, t.y), task, (task.x[chosen], task.y[chosen]))
