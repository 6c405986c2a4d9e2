"""The record of a run of gradient descent: its steps in flow time, its rows, its minibatches."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._numerics import safe_norm
from ..objective import Problem
from ..tasks.task import Task
from .coordinates import to_coordinates
from .record import spectra

RISE = 0.01
"""The gradient norm counts as having risen, or fallen, once it has changed by this fraction."""


LEAST_STEPS = 10
EARLY_TIME = 0.75
"""On a plateau of at least so many steps, the first half of them covers less than this share of its flow time."""


class Peak(NamedTuple):
    """The search for the first local maximum of a series: how low it was, how high since, at what step and time.

    `half` is the time at half of that step, from two steps that are remembered with their times: `late` comes after at least
    twice as many as `early`, and the present one before twice as many as `late`.
    """

    low: Array
    high: Array
    step: Array
    time: Array
    half: Array
    passed: Array
    early: tuple[Array, Array]
    late: tuple[Array, Array]

    @classmethod
    def start(cls, value: Array) -> "Peak":
        """The search before the first step, from the first value."""
        zero, unknown, start = jnp.zeros_like(value), jnp.full_like(value, jnp.nan), (jnp.asarray(0), value * 0)
        return cls(value, zero, jnp.asarray(-1), unknown, unknown, jnp.asarray(False), start, start)

    def updated(self, value: Array, step: Array, time: Array) -> "Peak":
        """The search after one more value of the series."""
        doubled = step >= jnp.maximum(2 * self.late[0], 1)
        early, late = jax.tree.map(
            lambda new, old: jnp.where(doubled, new, old), (self.late, (step, time)), (self.early, self.late)
        )
        steps, times = (jnp.stack([*ends]).astype(time.dtype) for ends in zip(early, late, strict=True))
        low = jnp.minimum(self.low, value)
        rising = value > (1 + RISE) * low
        higher = ~self.passed & rising & (value > self.high)
        return Peak(
            low=jnp.where(self.passed, self.low, low),
            high=jnp.where(higher, value, self.high),
            step=jnp.where(higher, step, self.step),
            time=jnp.where(higher, time, self.time),
            half=jnp.where(higher, jnp.interp((step / 2).astype(time.dtype), steps, times), self.half),
            passed=self.passed | (value < (1 - RISE) * self.high),
            early=early,
            late=late,
        )

    @property
    def after_plateau(self) -> Array:
        """Whether the steps had to wait for the maximum, instead of covering most of the time within a few of them."""
        return (self.half < EARLY_TIME * self.time) & (self.step >= LEAST_STEPS)


class Row(NamedTuple):
    """One row of the record."""

    loss: Array
    gradient_norm: Array
    group_norms: Array
    singular_values: tuple[Array | None, ...]


def row_of(problem: Problem, arrays: Sequence[Array]) -> Row:
    """The row of a model with given groups, from one gradient of the whole loss."""
    loss, slopes = jax.value_and_grad(problem.loss)(tuple(arrays))
    here = to_coordinates(arrays)
    return Row(loss, safe_norm(here.shapes.join(slopes)), here.norms(), spectra(here))


def imbalance_rate(weights: Sequence[Array], slopes: Sequence[Array]) -> Float[Array, " hidden"]:
    """`dΔ_l/dt = 2⟨W_l, ∂𝓛/∂W_l⟩ − 2⟨W_{l+1}, ∂𝓛/∂W_{l+1}⟩` of the layers of a perceptron under gradient flow."""
    return -2 * jnp.diff(jnp.stack([jnp.sum(w * slope) for w, slope in zip(weights, slopes, strict=True)]))


def flow_time(update: Float[Array, " parameters"], gradient: Float[Array, " parameters"]) -> Float[Array, ""]:
    """`max(0, −⟨u, g⟩ / ‖g‖²)`, safe from underflow of the squares; 0 where the gradient vanishes."""
    size = jnp.max(jnp.abs(gradient))
    unit = jnp.where(size > 0, size, 1)
    scaled = gradient / unit
    squares = jnp.where(size > 0, jnp.sum(jnp.square(scaled)), 1)
    return jnp.where(size > 0, jnp.maximum(0, -jnp.sum(update * scaled) / (squares * unit)), 0)


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
