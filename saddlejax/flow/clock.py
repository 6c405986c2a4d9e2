"""Gradient flow in the plateau clock.

`dθ/ds = −τ ∇𝓛`, `dt/ds = τ` with `1/τ² = Σ_l ‖∂𝓛/∂W_l‖² / ‖W_l‖²`: one unit of `s` changes the layers by a factor of
about e, however slowly that happens in time `t`. A plateau of any length then takes `O(log 1/ε)` steps.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..gradient import gradient
from ..networks.mlp import AbstractNetwork, safe_norm
from ..tasks.task import Task, task_loss
from .coordinates import Coordinates, to_coordinates, to_net
from .state import FlowState


class PlateauField(eqx.Module):
    """The vector field `d(state)/ds` of gradient flow in the plateau clock."""

    net: AbstractNetwork
    task: Task
    log_time_unit: Float[Array, ""]

    def rate(self, state: FlowState, growth: Float[Array, " layers"] | None = None) -> FlowState:
        """The rate of the state, with units that grow at given rates, by default as their layers do.

        Nothing moves where the gradient is exactly zero.
        """
        rate = motion(self.net, self.task, state.coordinates, growth)
        stalled = jnp.isneginf(rate.log_rate)
        time = jnp.where(stalled, 0, jnp.exp(-jnp.where(stalled, 0, rate.log_rate) - self.log_time_unit))
        return FlowState.of(rate.coordinates, time, rate.imbalance_drift, rate.loss)

    def state_net(self, state: FlowState) -> AbstractNetwork:
        """The network at a state."""
        return to_net(state.coordinates, self.net)

    def loss(self, state: FlowState) -> Float[Array, ""]:
        """The loss at a state, by one forward pass."""
        return task_loss(self.state_net(state), self.task)

    def log_time(self, state: FlowState) -> Float[Array, ""]:
        """`log t`, which stays finite where `t` itself overflows; `−inf` at the start."""
        started = state.time > 0
        return jnp.where(started, jnp.log(jnp.where(started, state.time, 1)) + self.log_time_unit, -jnp.inf)

    def log_gradient_norm(self, state: FlowState, rate: FlowState) -> Float[Array, ""]:
        """`log ‖∇𝓛‖`, from the velocity `−τ∇𝓛` and `τ`; `−inf` where the gradient is exactly zero."""
        here, moving = state.coordinates, rate.time > 0
        velocity = here.velocity(rate.coordinates)
        squares = here.shapes.inner(velocity, velocity)
        there = squares > 0
        logs = jnp.where(there, here.log_units + 0.5 * jnp.log(jnp.where(there, squares, 1)), -jnp.inf)
        log_velocity = 0.5 * jax.nn.logsumexp(2 * jnp.where(moving, logs, 0))
        return jnp.where(moving, log_velocity - jnp.log(jnp.where(moving, rate.time, 1)) - self.log_time_unit, -jnp.inf)

    def _velocity(self, state: FlowState, rate: FlowState) -> list[Array]:
        """`dW_l/ds`."""
        here = state.coordinates
        velocities = here.shapes.split(here.velocity(rate.coordinates))
        return [unit * v for unit, v in zip(jnp.exp(here.log_units), velocities, strict=True)]

    def growth(self, state: FlowState, rate: FlowState) -> Float[Array, ""]:
        """`d log‖∇𝓛‖/ds = −τ ∇𝓛ᵀH∇𝓛/‖∇𝓛‖²`, from one second derivative along the flow (forward over forward)."""
        net = self.state_net(state)
        velocity = self._velocity(state, rate)

        def along(a: Array) -> Array:
            moved = [w + a * v for w, v in zip(net.weights, velocity, strict=True)]
            return task_loss(net.with_weights(moved), self.task)

        origin, one = jnp.zeros_like(rate.time), jnp.ones_like(rate.time)
        slope, bend = jax.jvp(lambda a: jax.jvp(along, (a,), (one,))[1], (origin,), (one,))
        return jnp.where(slope < 0, bend / jnp.where(slope < 0, slope, 1), 0)


class Motion(NamedTuple):
    """How a network moves per unit of `s`.

    - `coordinates`, `imbalance_drift`: rates of those parts of the state.
    - `loss`: `𝓛`.
    - `log_rate`: `log 1/τ`, `−inf` where the gradient is exactly zero.
    """

    coordinates: Coordinates
    imbalance_drift: Float[Array, " hidden"]
    loss: Float[Array, ""]
    log_rate: Float[Array, ""]


def motion(
    net: AbstractNetwork, task: Task, coordinates: Coordinates, growth: Float[Array, " layers"] | None = None
) -> Motion:
    """The motion of the network at given coordinates, whose units grow at given rates, by default as their layers do."""
    here = gradient(to_net(coordinates, net), task)
    shapes, inverses = coordinates.shapes, jnp.exp(-coordinates.log_units)
    relative = shapes.join([g * inverse for g, inverse in zip(here.weights, inverses, strict=True)])
    norm = _norm(relative)  # 1/τ
    stalled = norm == 0
    tau = jnp.where(stalled, 0, 1 / jnp.where(stalled, 1, norm))
    drift = jnp.stack([jnp.sum(rate) for rate in here.neuron_rates]) if here.neuron_rates else jnp.zeros(0, tau.dtype)
    log_rate = jnp.where(stalled, -jnp.inf, jnp.log(jnp.where(stalled, 1, norm)))
    return Motion(coordinates.along(-tau * relative, growth), drift * tau, here.loss, log_rate)


def _norm(vector: Float[Array, " weights"]) -> Float[Array, ""]:
    """The norm of a long vector in one pass over it, and two more where the sum of squares may have underflown."""
    squares, limits = jnp.sum(jnp.square(vector)), jnp.finfo(vector.dtype)
    plain = (squares > limits.tiny / limits.eps**2) & (squares < limits.max)
    return jax.lax.cond(plain, lambda v: jnp.sqrt(jnp.where(plain, squares, 1)), safe_norm, vector)


def start(net: AbstractNetwork, task: Task) -> tuple[PlateauField, FlowState, FlowState]:
    """The field with its unit of time `τ(θ_0)`, the state at `s = 0` and its rate."""
    zero = jnp.zeros((), task.x.dtype)
    state = FlowState.of(to_coordinates(net.weights), zero, jnp.zeros(net.depth - 1, task.x.dtype), zero)
    rate = motion(net, task, state.coordinates)
    stalled = jnp.isneginf(rate.log_rate)
    field = PlateauField(net, task, jnp.where(stalled, 0, -rate.log_rate))
    time = jnp.where(stalled, zero, 1)
    return field, state, FlowState.of(rate.coordinates, time, rate.imbalance_drift, rate.loss)
