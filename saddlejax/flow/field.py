"""The vector field of gradient flow in the plateau clock.

`dθ/ds = −τ ∇𝓛`, `dt/ds = τ` with `1/τ² = Σ_g ‖∂𝓛/∂θ_g‖² / ‖θ_g‖²` over the groups of parameters: one unit of `s` changes
the groups by a factor of about e, however slowly that happens in time `t`. A plateau of any length then takes
`O(log 1/ε)` steps.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._numerics import safe_norm
from ..objective import AbstractObjective, Problem
from ..parameters import Parameters, rank
from .coordinates import to_coordinates
from .state import ClockState, Layout, Parts

LEFT_PLATEAU = 1e-3


class Scales(NamedTuple):
    """What a flow is measured by, from its start.

    - `plateau`: the height of the first plateau.
    - `log_time_unit`: `log τ(θ_0)`, the unit of the time in the state.
    - `log_sizes`: logarithms of the root mean square of the singular values of each group.
    """

    plateau: Float[Array, ""]
    log_time_unit: Float[Array, ""]
    log_sizes: Float[Array, " groups"]


class PlateauField(eqx.Module):
    """The vector field `d(state)/ds`, with what conditions of a flow may ask of a state.

    - `parameters`, `objective`: the model and what is lowered.
    - `scales`: from the start of the flow; `plateau` among them.
    - `layout`: of the state vector; `perceptron`: whether the groups are the layers of one.
    """

    parameters: Parameters
    objective: AbstractObjective
    scales: Scales
    layout: Layout = eqx.field(static=True)
    perceptron: bool = eqx.field(static=True)

    @property
    def plateau(self) -> Float[Array, ""]:
        """The height of the first plateau."""
        return self.scales.plateau

    @property
    def log_time_unit(self) -> Float[Array, ""]:
        """`log τ(θ_0)`, the unit of the time in the state."""
        return self.scales.log_time_unit

    def has_left_plateau(self, loss: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether a loss is below the height of the plateau by more than a thousandth of it."""
        return loss < self.plateau - LEFT_PLATEAU * jnp.abs(self.plateau)

    def model(self, state: ClockState) -> PyTree:
        """The model at a state."""
        return self.parameters.with_arrays(self.layout.split(state.vector).coordinates.arrays())

    def rate(self, state: ClockState) -> Float[Array, " state"]:
        """The rate of the state: the one known there, or that of the field."""
        return jax.lax.cond(known(state), lambda s: s.rate, lambda s: self.motion(s.vector), state)

    def loss(self, state: ClockState) -> Float[Array, ""]:
        """The loss at a state: the one known there, or that of one forward pass."""
        return jax.lax.cond(
            known(state),
            lambda s: self.layout.split(s.rate).loss,
            lambda s: self.objective.loss(self.model(s)),
            state,
        )

    def log_time(self, state: ClockState) -> Float[Array, ""]:
        """`log t`, which stays finite where `t` itself overflows; `−inf` at the start."""
        time = self.layout.split(state.vector).time
        started = time > 0
        return jnp.where(started, jnp.log(jnp.where(started, time, 1)) + self.log_time_unit, -jnp.inf)

    def log_gradient_norm(self, vector: Float[Array, " state"], rate: Float[Array, " state"]) -> Float[Array, ""]:
        """`log ‖∇𝓛‖`, from the velocity `−τ∇𝓛` and `τ`; `−inf` where the gradient is exactly zero."""
        here, moving = self.layout.split(vector).coordinates, self.layout.split(rate)
        velocity = here.velocity(moving.coordinates)
        squares = here.shapes.inner(velocity, velocity)
        there = squares > 0
        logs = jnp.where(there, here.log_units + 0.5 * jnp.log(jnp.where(there, squares, 1)), -jnp.inf)
        moves = moving.time > 0
        log_velocity = 0.5 * jax.nn.logsumexp(2 * jnp.where(moves, logs, 0))
        return jnp.where(moves, log_velocity - jnp.log(jnp.where(moves, moving.time, 1)) - self.log_time_unit, -jnp.inf)

    def growth(self, state: ClockState) -> Float[Array, ""]:
        """`d log‖∇𝓛‖/ds = −τ ∇𝓛ᵀH∇𝓛/‖∇𝓛‖²`, from one second derivative along the flow (forward over forward)."""
        here = self.layout.split(state.vector).coordinates
        velocities = here.shapes.split(here.velocity(self.layout.split(self.rate(state)).coordinates))
        steps = [unit * v for unit, v in zip(jnp.exp(here.log_units), velocities, strict=True)]
        arrays = here.arrays()

        def along(a: Array) -> Array:
            moved = [w + a * v for w, v in zip(arrays, steps, strict=True)]
            return self.objective.loss(self.parameters.with_arrays(moved))

        origin, one = jnp.zeros_like(self.log_time_unit), jnp.ones_like(self.log_time_unit)
        slope, bend = jax.jvp(lambda a: jax.jvp(along, (a,), (one,))[1], (origin,), (one,))
        return jnp.where(slope < 0, bend / jnp.where(slope < 0, slope, 1), 0)

    def motion(self, vector: Float[Array, " state"]) -> Float[Array, " state"]:
        """The rate of a state, from one gradient. Nothing moves where the gradient is exactly zero."""
        return self.motion_along(vector, *self.gradient(vector))

    def motion_along(
        self, vector: Float[Array, " state"], loss: Float[Array, ""], slopes: Float[Array, " parameters"]
    ) -> Float[Array, " state"]:
        """The rate of a state whose loss and gradient are given."""
        parts, log_pace = self.motion_and_pace(vector, loss, slopes)
        moves = jnp.isfinite(log_pace) | jnp.isnan(log_pace)
        time = jnp.where(moves, jnp.exp(-jnp.where(moves, log_pace, 0) - self.log_time_unit), 0)
        return self.layout.join(parts._replace(time=time))

    def gradient(self, vector: Float[Array, " state"]) -> tuple[Float[Array, ""], Float[Array, " parameters"]]:
        """The loss at a state and its gradient."""
        here = self.layout.split(vector).coordinates
        loss, slopes = jax.value_and_grad(lambda arrays: self.objective.loss(self.parameters.with_arrays(arrays)))(
            here.arrays()
        )
        return loss, here.shapes.join(slopes)

    def motion_and_pace(
        self, vector: Float[Array, " state"], loss: Float[Array, ""], slopes: Float[Array, " parameters"]
    ) -> tuple[Parts, Float[Array, ""]]:
        """The parts of the rate but for the time, and `log 1/τ`, `−inf` where the gradient is exactly zero."""
        here, shapes = self.layout.split(vector).coordinates, self.layout.shapes
        relative = shapes.map(lambda u, slope: slope * jnp.exp(-u), here.log_units, slopes)
        norm = safe_norm(relative)  # 1/τ
        stalled = norm == 0
        tau = jnp.where(stalled, 0, 1 / jnp.where(stalled, 1, norm))
        turning = -tau * relative
        radial, speeds = shapes.inner(here.joined, turning), shapes.inner(turning, turning)
        units = jnp.exp(2 * here.log_units)
        energy = jnp.sum(units * speeds) * norm  # τ‖∇𝓛‖²
        drift = 2 * jnp.diff(units * radial) if self.layout.hidden else jnp.zeros(0, tau.dtype)
        log_pace = jnp.where(stalled, -jnp.inf, jnp.log(jnp.where(stalled, 1, norm)))
        rates = here.along(turning, radial, speeds)
        return Parts(rates, jnp.zeros_like(tau), loss, energy, drift), log_pace


def known(state: ClockState) -> Array:
    """Whether the rate of a state is known."""
    return ~jnp.isnan(state.rate[-1])


def field_of(problem: Problem, scales: Scales) -> PlateauField:
    """The field of a problem, with what is known from the start of the flow."""
    shapes = problem.parameters.shapes
    layout = Layout(shapes, len(shapes.shapes) - 1 if problem.perceptron else 0)
    return PlateauField(problem.parameters, problem.objective, scales, layout, problem.perceptron)


def start(problem: Problem) -> tuple[PlateauField, Float[Array, " state"], Float[Array, " state"]]:
    """The field with its scales, the state at `s = 0` and its rate."""
    here = to_coordinates(problem.parameters.arrays)
    zero = jnp.zeros((), here.joined.dtype)
    ranks = jnp.asarray([rank(shape) for shape in here.shapes.shapes], zero.dtype)
    scales = Scales(problem.objective.plateau(), zero, here.log_norms() - 0.5 * jnp.log(ranks))
    field = field_of(problem, scales)
    layout = field.layout
    vector = layout.join(Parts(here, zero, zero, zero, jnp.zeros(layout.hidden, zero.dtype)))
    parts, log_pace = field.motion_and_pace(vector, *field.gradient(vector))
    stalled = jnp.isneginf(log_pace)
    field = field_of(problem, scales._replace(log_time_unit=jnp.where(stalled, 0, -log_pace)))
    return field, vector, layout.join(parts._replace(time=jnp.where(stalled, zero, 1)))
