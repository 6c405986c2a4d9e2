"""The size of steps: an error relative to each layer, and a prediction of how it will change."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .state import FlowState

SAFETY = 0.9
LEAST_INFLUENCE = 0.05
LARGEST_CUT = 0.2
CUT_AFTER_FAILURE = 0.25


class StepSize(eqx.Module):
    """What is remembered from step to step."""

    size: Float[Array, ""]
    last_size: Float[Array, ""]
    last_error: Float[Array, ""]
    just_rejected: Bool[Array, ""]


def first_step_size(rtol: Float[Array, ""], order: int) -> StepSize:
    """The clock makes all rates of order one, so the first step follows from the tolerance alone."""
    one = jnp.ones_like(rtol)
    return StepSize(rtol ** (1 / order), one, jnp.zeros_like(rtol), jnp.asarray(False))


def relative_errors(error: FlowState, after: FlowState) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest relative error of a step over the layers, and that of the time.

    The units have none, for they grow steadily over a step. Time is relative to itself. The quadratures that ride
    along do not count.
    """
    turned, here, shapes = error.coordinates.joined, after.coordinates.joined, error.shapes
    squares = shapes.inner(turned, turned) / jnp.maximum(shapes.inner(here, here), 1)
    time = jnp.abs(error.time) / jnp.where(after.time > 0, after.time, 1)
    return jnp.sqrt(jnp.max(squares)), time


def influence(state: FlowState, rate: FlowState) -> Float[Array, ""]:
    """How much an error of the layers made now can still change the escape time, between 0.05 and 1.

    On the plateau `τ` falls while the layers grow, so that most of the time `t` has passed long before the escape. An
    error relative to the layers changes the time still to come in the same proportion, which is `τ/t` of the whole.
    """
    share = rate.time / jnp.where(state.time > 0, state.time, rate.time)
    return jnp.clip(share, LEAST_INFLUENCE, 1)


def cancellation(state: FlowState, rate: FlowState) -> Float[Array, ""]:
    """How far the flow is from running straight into the saddle at the origin: one where it does not, zero where it does.

    On the stable manifold of the saddle every layer shrinks at one rate, `dW_l/dt = −λ W_l`. Near it the layers nearly
    cancel: what will grow later is a part of the weights smaller by this factor, and so is the error that it bears. With
    `r_l = ‖dW_l/dt‖/‖W_l‖` it is `√2/2 ‖θ̂ + v̂‖`, at most one, where `θ̂` has the layers `W_l/‖W_l‖` and `v̂` the layers
    `(dW_l/dt)/‖W_l‖`, both weighted by `r_l` and normalised, so that layers that stand still do not count.
    """
    here = state.coordinates
    shapes, velocity = here.shapes, here.velocity(rate.coordinates)
    squares, speeds = shapes.inner(here.joined, here.joined), shapes.inner(velocity, velocity)
    there = squares > 0
    rates = jnp.where(there, speeds / jnp.where(there, squares, 1), 0)  # r_l²
    moving = jnp.any(rates > 0) & ~jnp.any(~there & (speeds > 0))  # a layer that starts from zero grows
    first, second = jnp.sqrt(jnp.sum(rates)), jnp.sqrt(jnp.sum(jnp.square(rates)))
    along = here.joined / jnp.where(moving, first, 1) + velocity / jnp.where(moving, second, 1)
    weights = jnp.where(there, rates / jnp.where(there, squares, 1), 0)
    distance = jnp.sqrt(0.5 * jnp.sum(weights * shapes.inner(along, along)))
    return jnp.where(moving, jnp.minimum(distance, 1), 1)


def next_step_size(
    step: StepSize,
    error: Float[Array, ""],
    accepted: Bool[Array, ""],
    failed: Bool[Array, ""],
    order: int,
    min_step: Float[Array, ""],
    largest_growth: float,
    longest_step: float,
) -> StepSize:
    """The next size from the error in units of the tolerance.

    Where the last two accepted steps show the error growing, the growth is taken to go on (Gustafsson's predictive
    control); after a rejection the size does not grow at once. `failed` marks steps that are not finite or raise the
    loss, whose error says nothing: only they take the size below `min_step`, from where it has to grow again.
    """
    error = jnp.clip(jnp.where(jnp.isfinite(error), error, 1), 1e-10, 1e10)
    plain = SAFETY * error ** (-1 / order)
    known = step.last_error > 0
    predicted = plain * (step.size / step.last_size) * (jnp.where(known, step.last_error, error) / error) ** (1 / order)
    growing = jnp.clip(
        jnp.where(known, jnp.minimum(plain, predicted), plain),
        LARGEST_CUT,
        jnp.where(step.just_rejected, 1, largest_growth),
    )
    shrinking = jnp.where(failed, CUT_AFTER_FAILURE, jnp.clip(plain, LARGEST_CUT, SAFETY))
    proposed = step.size * jnp.where(accepted, growing, shrinking)
    size = jnp.where(failed | (step.size < min_step), proposed, jnp.maximum(proposed, min_step))
    size = jnp.minimum(size, longest_step)
    return StepSize(
        size=size,
        last_size=jnp.where(accepted, step.size, step.last_size),
        last_error=jnp.where(accepted, error, step.last_error),
        just_rejected=~accepted,
    )
