"""When a flow ends: at its escape, at a time, or at a loss."""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check
from .field import PlateauField, known
from .state import ClockState
from .status import Status


class AbstractUntil(eqx.Module):
    """A function of the state that rises through zero where the flow shall end."""

    reached: eqx.AbstractClassVar[Status]
    """The outcome when it does."""

    @property
    @abc.abstractmethod
    def uses_curvature(self) -> bool:
        """Whether evaluating it costs a Hessian-vector product."""

    asks_for_escape: eqx.AbstractClassVar[bool]
    """Whether the time of the end is what matters, so that errors count by their influence on it."""

    @abc.abstractmethod
    def condition(self, field: PlateauField, state: ClockState) -> Float[Array, ""]:
        """Negative before the end, positive after it: a function of `field.loss(state)`, `field.model(state)`,
        `field.log_time(state)` or `field.growth(state)`."""

    def end_time(self) -> Float[Array, ""] | None:
        """The time `t` of the end, where it is known beforehand."""
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """The end in words."""


def in_words(value: Float[Array, "..."]) -> str:
    """A number, or the range of several, with all its digits: stores tell sweeps apart by them."""
    if not _check.is_concrete(value):
        return "(being traced)"
    low, high = np.min(np.asarray(value)), np.max(np.asarray(value))
    return str(low) if low == high else f"{low!s} to {high!s}"


class Escape(AbstractUntil):
    """End at the escape from the first plateau.

    By default this is the steepest point of the first descent: the first local maximum of `‖∇𝓛‖` along the flow, where
    `∇𝓛ᵀ H ∇𝓛` changes from negative to positive. It needs no parameter and works where the first descent lowers the
    loss by a few per cent only.

    **Arguments:** `loss_fraction`, where given, a number in (0, 1): the escape is then where the loss falls to this
    fraction of its value at zero weights, the height of the plateau. Meant for problems with one mode.
    """

    loss_fraction: Float[Array, ""] | None
    reached: ClassVar[Status] = Status.escaped
    asks_for_escape: ClassVar[bool] = True

    def __init__(self, loss_fraction: float | int | Array | None = None):
        if loss_fraction is not None:
            _check.positive_number("loss_fraction", loss_fraction)
            if _check.is_concrete(loss_fraction) and not np.all(np.asarray(loss_fraction) < 1):
                raise _check.fail("loss_fraction", "lie between 0 and 1", loss_fraction)
            loss_fraction = jnp.asarray(loss_fraction, dtype=float)
        self.loss_fraction = loss_fraction

    @property
    def uses_curvature(self) -> bool:
        return self.loss_fraction is None

    def condition(self, field: PlateauField, state: ClockState) -> Float[Array, ""]:
        if self.loss_fraction is None:
            growth = field.growth(state)
            # A maximum after no rise is one of errors. What is remembered does not tell for steps of other solvers.
            counts = ~known(state) | (state.memory.rises > 0)
            return jnp.where(counts, -growth, -jnp.abs(growth))
        return self.loss_fraction * field.plateau - field.loss(state)

    def describe(self) -> str:
        if self.loss_fraction is None:
            return "the steepest point of the first descent"
        return f"loss at {in_words(self.loss_fraction)} of its value at zero weights"


class Time(AbstractUntil):
    """End at a time `t` of the flow, in the units of `dθ/dt = −∇𝓛` (gradient-descent steps times learning rate)."""

    time: Float[Array, ""]
    reached: ClassVar[Status] = Status.time_reached
    asks_for_escape: ClassVar[bool] = False

    def __init__(self, time: float | int | Array):
        _check.positive_number("time", time)
        self.time = jnp.asarray(time, dtype=float)

    @property
    def uses_curvature(self) -> bool:
        return False

    def condition(self, field: PlateauField, state: ClockState) -> Float[Array, ""]:
        # As a difference of logarithms, since the time itself may overflow.
        log_time = field.log_time(state)
        started = jnp.isfinite(log_time)
        return jnp.where(started, jnp.where(started, log_time, 0) - jnp.log(self.time), -1)

    def end_time(self) -> Float[Array, ""]:
        return self.time

    def describe(self) -> str:
        return f"time {in_words(self.time)}"


class Loss(AbstractUntil):
    """End where the loss falls to `value`."""

    value: Float[Array, ""]
    reached: ClassVar[Status] = Status.loss_reached
    asks_for_escape: ClassVar[bool] = False

    def __init__(self, value: float | int | Array):
        _check.finite("value", value)
        self.value = jnp.asarray(value, dtype=float)

    @property
    def uses_curvature(self) -> bool:
        return False

    def condition(self, field: PlateauField, state: ClockState) -> Float[Array, ""]:
        return self.value - field.loss(state)

    def describe(self) -> str:
        return f"loss {in_words(self.value)}"
