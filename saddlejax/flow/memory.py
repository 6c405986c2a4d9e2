"""What is remembered along a flow, to tell whether rounding can matter and whether the flow has come to rest."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .field import PlateauField
from .rounding import dormant_lost, log_gradient_rounding, log_sensitivity
from .state import Memory

LEAST_ERROR, LARGEST_SHARE = 30, 0.1
LOSS_ROUNDING = 100
RISE = 0.01
CHANGE_OF_SIZE = 0.02
ERROR_OF_GROUPS = 1e-3
FORGOTTEN = math.log(1.02)
"""By how much what is remembered of the fastest decay falls in a step that does not show it."""
NEAR_SADDLE = 0.75


def smallest_share(rtol: Float[Array, ""]) -> Float[Array, ""]:
    """The smallest part of the parameters for which an error of `rtol` beside it stays above the rounding of the whole."""
    return jnp.minimum(LEAST_ERROR * jnp.finfo(rtol.dtype).eps / rtol, LARGEST_SHARE)


def nothing_yet(field: PlateauField) -> Memory:
    """The memory before the first step."""
    zero = jnp.zeros_like(field.log_time_unit)
    one, inf = zero + 1, zero + jnp.inf
    return Memory(
        one, one, -inf, -inf, -inf, inf, inf, field.scales.log_sizes, zero, zero, zero, zero, -inf, zero, zero
    )


def remember(
    before: Memory,
    field: PlateauField,
    vector: Float[Array, " state"],
    rate: Float[Array, " state"],
    unsuited: Float[Array, ""],
    log_decay: Float[Array, ""],
) -> Memory:
    """The memory after one more state, whose rate is known. Whether it is at rest is judged by its gradient alone.

    A rise of the gradient norm counts where, since it was smallest, some group has changed its size, and where it is above
    the errors of the steps along the direction that decays fastest (`log_decay`): a bias that has found its minimum leaves
    a gradient so small that errors make it go up and down.
    """
    here, moving = field.layout.split(vector).coordinates, field.layout.split(rate)
    share = cancellation(field, vector, rate)
    log_gradient = field.log_gradient_norm(vector, rate)
    sensitivity = log_sensitivity(here.log_norms()) if field.perceptron else jnp.zeros_like(log_gradient)
    highest = jnp.maximum(before.log_highest, log_gradient)
    # After the first escape something may grow that was too small to be there.
    fallen = (log_gradient < highest - 1) | jnp.isfinite(before.log_lost)
    lost = dormant_lost(field.scales.log_sizes, here.log_norms())
    log_lost = jnp.where(fallen & lost, jnp.minimum(before.log_lost, log_gradient), jnp.inf)
    lowest = jnp.minimum(before.log_lowest, log_gradient)
    ratio = jnp.maximum(before.log_ratio, log_gradient - sensitivity)
    smallest = log_gradient < before.log_lowest
    sizes = jnp.where(smallest, here.log_norms(), before.log_sizes)
    relaxed = jnp.where(smallest, field.has_left_plateau(moving.loss).astype(share.dtype), before.relaxed)
    grown = jnp.where(jnp.isfinite(sizes), jnp.abs(here.log_norms() - sizes), 0)
    rises = log_gradient > lowest + RISE
    if not field.perceptron:
        # What errors of the largest group along the fastest direction make of the gradient.
        log_errors = math.log(ERROR_OF_GROUPS) + log_decay + jnp.max(here.log_norms())
        rises = rises & (jnp.max(grown) > CHANGE_OF_SIZE) & (log_gradient > log_errors)
    rounding = log_gradient <= log_gradient_rounding(ratio, sensitivity)
    after = Memory(
        share=share,
        least_share=jnp.minimum(before.least_share, share),
        log_ratio=ratio,
        log_first=jnp.where(jnp.isneginf(before.log_first), log_gradient, before.log_first),
        log_highest=highest,
        log_lowest=lowest,
        log_lost=log_lost,
        dormant_lost=jnp.maximum(before.dormant_lost, log_gradient > log_lost + 1),
        at_rest=jnp.where(rounding | (moving.time == 0), 1.0, 0.0).astype(share.dtype),
        log_sizes=sizes,
        relaxed=relaxed,
        rises=rises.astype(share.dtype),
        log_decay=log_decay,
        unsuited=unsuited,
        sliding=jnp.zeros_like(unsuited),
    )
    return jax.lax.stop_gradient(after)


def log_pace(field: PlateauField, rate: Float[Array, " state"]) -> Float[Array, ""]:
    """`log τ` at a state with such a rate; that of the start where nothing moves."""
    time = field.layout.split(rate).time
    return jnp.log(jnp.where(time > 0, time, 1)) + field.log_time_unit


def decay_seen(before: Memory, fastest: Float[Array, ""], log_unit: Float[Array, ""]) -> Float[Array, ""]:
    """The logarithm of the fastest rate of decay in `t`, after a step that shows `fastest`, in a unit of time `e^{log_unit}`.

    A step shows it only where it moves along that direction, so that it is remembered, and slowly forgotten.
    """
    shown = jnp.where(fastest > 0, jnp.log(jnp.where(fastest > 0, fastest, 1)) - log_unit, -jnp.inf)
    return jnp.maximum(before.log_decay - FORGOTTEN, shown)


def cancellation(field: PlateauField, vector: Float[Array, " state"], rate: Float[Array, " state"]) -> Float[Array, ""]:
    """How far the flow is from running straight into a saddle: one where it does not, zero where it does.

    On the stable manifold of the saddle at the origin all groups shrink at one rate, `dθ_g/dt = −λ θ_g`. Near it they
    nearly cancel: what will grow later is a part of the parameters smaller by this factor, and so is the error that it
    bears. With `r_g = ‖dθ_g/dt‖/‖θ_g‖` it is `√2/2 ‖θ̂ + v̂‖`, at most one, where `θ̂` has the groups `θ_g/‖θ_g‖` and `v̂`
    the groups `(dθ_g/dt)/‖θ_g‖`, both weighted by `r_g` and normalised, so that groups that stand still do not count.

    It is one off the plateau, where the groups as a whole do not shrink, and where one group shrinks alone, such as a
    bias of the last layer on its way to its minimum.
    """
    here, moving = field.layout.split(vector).coordinates, field.layout.split(rate)
    shapes, velocity = here.shapes, here.velocity(moving.coordinates)
    squares, speeds = shapes.inner(here.joined, here.joined), shapes.inner(velocity, velocity)
    radial = jnp.exp(2 * here.log_units) * shapes.inner(here.joined, velocity)  # ½ d‖θ_g‖²/ds
    there = squares > 0
    rates = jnp.where(there, speeds / jnp.where(there, squares, 1), 0)  # r_g²
    moves = jnp.any(rates > 0) & ~jnp.any(~there & (speeds > 0))  # a group that starts from zero grows
    first, second = jnp.sqrt(jnp.sum(rates)), jnp.sqrt(jnp.sum(jnp.square(rates)))
    along = here.joined / jnp.where(moves, first, 1) + velocity / jnp.where(moves, second, 1)
    weights = jnp.where(there, rates / jnp.where(there, squares, 1), 0)
    distance = jnp.sqrt(0.5 * jnp.sum(weights * shapes.inner(along, along)))
    rates_of_size = jnp.where(there, radial / jnp.where(there, jnp.exp(2 * here.log_units) * squares, 1), 0)
    together = jnp.sum(rates_of_size <= 0.5 * jnp.min(rates_of_size)) > 1
    # Where the loss has fallen, the groups shrink towards a minimum. So they do where the outputs of a perceptron are too
    # large: with `u` for their share of the targets, `𝓛 − 𝓛(0) = (½u² − u)C` is less than `⟨θ, ∇𝓛⟩/L = (u² − u)C`.
    rounding = LOSS_ROUNDING * jnp.finfo(distance.dtype).eps * jnp.abs(field.plateau)
    outward = -jnp.sum(radial) * jnp.exp(-log_pace(field, rate)) / len(rates) if field.perceptron else 0
    above = moving.loss >= field.plateau + NEAR_SADDLE * outward - rounding
    counts = moves & above & together & (jnp.sum(radial) < 0)
    return jnp.where(counts, jnp.minimum(distance, 1), 1)
