"""Gradient flow in the plateau clock.

`dθ/ds = −τ ∇𝓛`, `dt/ds = τ` with `1/τ² = Σ_l ‖∂𝓛/∂W_l‖² / ‖W_l‖²`: one unit of `s` changes the layers by a factor of
about e, however slowly that happens in time `t`. A plateau of any length then takes `O(log 1/ε)` steps.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..gradient import gradient
from ..networks import AbstractNetwork, safe_norm
from ..tasks.task import Task, task_loss
from .coordinates import Coordinates, to_coordinates, to_net, unit_rate


class FlowState(eqx.Module):
    """The state that is integrated over `s`.

    - `coordinates`: the weights.
    - `time`: `t/τ(θ_0)`, which stays near one on a plateau of any length.
    - `imbalance_drift`: `∫ (dΔ_l/dt) dt` by the exact identity, one number for each hidden layer.
    - `loss_integral`: `∫ 𝓛 ds`; its rate at the end of a step is the loss there, at no cost.
    """

    coordinates: Coordinates
    time: Float[Array, ""]
    imbalance_drift: Float[Array, " hidden"]
    loss_integral: Float[Array, ""]


class PlateauField(eqx.Module):
    """The vector field `d(state)/ds` of gradient flow in the plateau clock."""

    net: AbstractNetwork
    task: Task
    log_time_unit: Float[Array, ""]

    def __call__(self, s: Array | float, state: FlowState, args: None) -> FlowState:
        """The rate of the state. Nothing moves where the gradient is exactly zero."""
        del s, args
        rate, log_rate = self.motion(state)
        stalled = jnp.isneginf(log_rate)
        time = jnp.where(stalled, 0, jnp.exp(-jnp.where(stalled, 0, log_rate) - self.log_time_unit))
        return eqx.tree_at(lambda r: r.time, rate, time)

    def motion(self, state: FlowState) -> tuple[FlowState, Float[Array, ""]]:
        """The rate of the state, time left out, and `log 1/τ`."""
        here = gradient(self.state_net(state), self.task)
        units, directions = jnp.exp(state.coordinates.log_units), state.coordinates.directions
        log_rate = log_relative_rate([safe_norm(g) for g in here.weights], units)
        stalled = jnp.isneginf(log_rate)
        tau = jnp.where(stalled, 0, jnp.exp(-jnp.where(stalled, 0, log_rate)))
        velocities = [-(g / unit) * tau for g, unit in zip(here.weights, units, strict=True)]
        growth = [unit_rate(v, w) for v, w in zip(directions, velocities, strict=True)]
        turning = tuple(w - a * v for a, v, w in zip(growth, directions, velocities, strict=True))
        drift = [jnp.sum(rate) * tau for rate in here.neuron_rates]
        rate = FlowState(
            coordinates=Coordinates(jnp.stack(growth), turning),
            time=jnp.zeros_like(tau),
            imbalance_drift=jnp.stack(drift) if drift else jnp.zeros(0, tau.dtype),
            loss_integral=here.loss,
        )
        return rate, log_rate

    def state_net(self, state: FlowState) -> AbstractNetwork:
        """The network at a state."""
        return to_net(state.coordinates, self.net)

    def log_time(self, state: FlowState) -> Float[Array, ""]:
        """`log t`, which stays finite where `t` itself overflows; `−inf` at the start."""
        started = state.time > 0
        return jnp.where(started, jnp.log(jnp.where(started, state.time, 1)) + self.log_time_unit, -jnp.inf)

    def log_gradient_norm(self, state: FlowState, rate: FlowState) -> Float[Array, ""]:
        """`log ‖∇𝓛‖`, from the velocity `−τ∇𝓛` and `τ`; `−inf` where the gradient is exactly zero."""
        norm = safe_norm(jnp.stack([safe_norm(v) for v in self._velocity(state, rate)]))
        moving = (norm > 0) & (rate.time > 0)
        log = jnp.log(jnp.where(moving, norm, 1)) - jnp.log(jnp.where(moving, rate.time, 1)) - self.log_time_unit
        return jnp.where(moving, log, -jnp.inf)

    def _velocity(self, state: FlowState, rate: FlowState) -> list[Array]:
        """`dW_l/ds`."""
        return jax.jvp(lambda c: c.weights(), (state.coordinates,), (rate.coordinates,))[1]

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


def log_relative_rate(gradient_norms: list[Array], units: Float[Array, " layers"]) -> Float[Array, ""]:
    """`log 1/τ = ½ log Σ_l (‖∂𝓛/∂W_l‖/‖W_l‖)²` without squaring small numbers; `−inf` for a zero gradient."""
    ratios = jnp.stack(gradient_norms) / units
    largest = jnp.max(ratios)
    stalled = largest == 0
    largest = jnp.where(stalled, 1, largest)
    squares = jnp.sum(jnp.square(jnp.where(stalled, 1, ratios / largest)))
    return jnp.where(stalled, -jnp.inf, jnp.log(largest) + 0.5 * jnp.log(squares))


def start(net: AbstractNetwork, task: Task) -> tuple[PlateauField, FlowState, FlowState]:
    """The field with its unit of time `τ(θ_0)`, the state at `s = 0` and its rate."""
    zero = jnp.zeros((), task.x.dtype)
    state = FlowState(to_coordinates(net.weights), zero, jnp.zeros(net.depth - 1, task.x.dtype), zero)
    rate, log_rate = PlateauField(net, task, zero).motion(state)
    stalled = jnp.isneginf(log_rate)
    field = PlateauField(net, task, jnp.where(stalled, 0, -log_rate))
    return field, state, eqx.tree_at(lambda r: r.time, rate, jnp.where(stalled, zero, 1))
