"""The units of a model that have kinks: a loss with some of their slopes frozen, and what is asked of them."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..networks.activations import Activation
from ..networks.kinked import outputs_seen
from ..networks.kinks import Kinks, kinks_of
from ..objective import AbstractObjective, TaskObjective
from ..parameters import Parameters
from ..tasks.task import Task

OTHER_WEIGHTS = 0.5
"""The relative size of a random change of the weights."""
NEGLIGIBLE = 1e-4
"""How small the rest of the inputs of a unit is beside what a little of lower units at their kinks gives it, for it to depend on these."""

LITTLE = 1e-2
"""How far a unit is above its kink where it is so a little, times the root of the rounding of the largest pre-activation."""

OutputsOf = Callable[[Activation, Kinks, Float[Array, "samples units"], slice], Float[Array, "samples units"]]
"""What the units of one place put out, from its activation, its kinks, its pre-activations, and which units it has."""


class Frozen(NamedTuple):
    """Units whose slope is held, one number for each sample and unit.

    - `which`: which units those are.
    - `shares`: where between the two slopes at its kink that of a unit lies, 0 below and 1 above.
    - `anchor`: the pre-activations from where the outputs are continued with these slopes; None for where the units are.
    - `forces`: what the loss has in addition, times the pre-activations relative to the anchor.
    """

    which: Bool[Array, "samples units"]
    shares: Float[Array, "samples units"]
    anchor: Float[Array, "samples units"] | None
    forces: Float[Array, "samples units"]

    def work(self, z: Float[Array, "samples units"]) -> Float[Array, ""]:
        """What the forces add to the loss."""
        return jnp.sum(self.forces * (z - (jax.lax.stop_gradient(z) if self.anchor is None else self.anchor)))


class FrozenObjective(AbstractObjective):
    """The loss of a model in which the outputs of some units are linear: `σ(z_0) + a (z − z_0)`.

    With the slopes `a` that units have on average over a step it is a smooth function which the model follows over that
    step.
    """

    objective: TaskObjective
    frozen: Frozen

    def loss(self, model: PyTree) -> Float[Array, ""]:
        outputs, z = seen(model, self.objective.task.x, frozen_outputs(self.frozen))
        return self.objective.task.mean_loss(outputs) + self.frozen.work(z)

    def plateau(self) -> Float[Array, ""]:
        return self.objective.plateau()

    def has_signal(self) -> Array:
        return self.objective.has_signal()


def seen(
    model: PyTree, x: Float[Array, "samples ..."], outputs_of: OutputsOf
) -> tuple[Float[Array, "samples out"], Float[Array, "samples units"]]:
    """What a model puts out where its units put out something else, and the pre-activations of these units."""
    found: list[Array] = []

    def at_place(activation: Activation, z: Array) -> Array:
        kinks = kinks_of(activation)
        if not kinks.places:
            return activation(z)
        flat = z.reshape(len(z), -1)
        start = sum(part.shape[1] for part in found)
        found.append(flat)
        return outputs_of(activation, kinks, flat, slice(start, start + flat.shape[1])).reshape(z.shape)

    outputs = outputs_seen(model, x, at_place)
    return outputs, jnp.concatenate([jnp.zeros((len(x), 0), outputs.dtype), *found], axis=1)


def own_outputs(activation: Activation, kinks: Kinks, z: Array, units: slice) -> Array:
    """The outputs that units have."""
    del kinks, units
    return activation(z)


def frozen_outputs(frozen: Frozen, push: Float[Array, "samples units"] | None = None) -> OutputsOf:
    """The outputs with some slopes frozen, and with something added to them."""

    def outputs_of(activation: Activation, kinks: Kinks, z: Array, units: slice) -> Array:
        anchor = jax.lax.stop_gradient(z) if frozen.anchor is None else frozen.anchor[:, units]
        slope = kinks.slope(anchor, frozen.shares[:, units])
        out = jnp.where(frozen.which[:, units], activation(anchor) + slope * (z - anchor), activation(z))
        return out if push is None else out + push[:, units]

    return outputs_of


class Heights(NamedTuple):
    """How far above their kinks units are, whatever their weights make of their inputs.

    - `which`: of which units it is said; `above`: how far.
    """

    which: Bool[Array, "samples units"]
    above: Float[Array, "samples units"]

    def outputs(self, activation: Activation, kinks: Kinks, z: Array, units: slice) -> Array:
        """The outputs of units of one place."""
        kink = z - kinks.distance(z)
        high = activation(kink) + kinks.slope(z, jnp.ones_like(z)) * self.above[:, units]
        return jnp.where(self.which[:, units], high, activation(z))


def little(z: Float[Array, "samples units"]) -> Float[Array, ""]:
    """How far a unit is above its kink where it is so a little."""
    numbers = jnp.finfo(z.dtype)
    return jnp.maximum(jnp.sqrt(numbers.eps) * LITTLE * jnp.max(jnp.abs(z)), jnp.sqrt(numbers.tiny))


class KinkedUnits(eqx.Module):
    """The units with kinks of a model on a task, all samples together, as functions of the parameters as one vector."""

    parameters: Parameters
    objective: TaskObjective

    @property
    def task(self) -> Task:
        """The task."""
        return self.objective.task

    def model(self, theta: Float[Array, " parameters"]) -> PyTree:
        """The model with such parameters."""
        return self.parameters.with_arrays(self.parameters.shapes.split(theta))

    def preactivations(self, theta: Float[Array, " parameters"]) -> Float[Array, "samples units"]:
        """The pre-activations of all units."""
        return seen(self.model(theta), self.task.x, own_outputs)[1]

    def distances(self, z: Float[Array, "samples units"]) -> Float[Array, "samples units"]:
        """How far above its nearest kink each unit is."""
        return self._by_place(z, lambda kinks, z: kinks.distance(z))

    def jumps(self, z: Float[Array, "samples units"]) -> Float[Array, "samples units"]:
        """By how much the slope of each unit rises at its nearest kink."""
        return self._by_place(z, lambda kinks, z: kinks.jump(z))

    def loss(self, theta: Float[Array, " parameters"], frozen: Frozen) -> Float[Array, ""]:
        """The loss with some slopes frozen."""
        outputs, z = seen(self.model(theta), self.task.x, frozen_outputs(frozen))
        return self.task.mean_loss(outputs) + frozen.work(z)

    def gradient(
        self, theta: Float[Array, " parameters"], frozen: Frozen
    ) -> tuple[
        Float[Array, ""], Float[Array, " parameters"], Float[Array, "samples units"], Float[Array, "samples units"]
    ]:
        """The loss, its gradient, the signals `∂𝓛/∂h` at the outputs `h` of the units, and the pre-activations."""

        def loss(theta: Array, push: Array) -> tuple[Array, Array]:
            outputs, z = seen(self.model(theta), self.task.x, frozen_outputs(frozen, push))
            return self.task.mean_loss(outputs) + frozen.work(z), z

        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, z), (slopes, signals) = both(theta, jnp.zeros_like(frozen.shares))
        return value, slopes, signals, z

    def rates(
        self, theta: Float[Array, " parameters"], frozen: Frozen, velocity: Float[Array, " parameters"]
    ) -> Float[Array, "samples units"]:
        """How fast the pre-activations change along a velocity of the parameters."""
        looks = lambda theta: seen(self.model(theta), self.task.x, frozen_outputs(frozen))[1]  # noqa: E731
        return jax.jvp(looks, (theta,), (velocity,))[1]

    def jacobian(
        self, theta: Float[Array, " parameters"], frozen: Frozen, which: Int[Array, " some"]
    ) -> Float[Array, "some parameters"]:
        """The gradients of some pre-activations, counted through all samples: one backward pass on one sample for each."""
        units = frozen.shares.shape[1]

        def row(index: Array) -> Array:
            sample, unit = index // units, index % units
            x, held = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, sample, 1), (self.task.x, frozen))
            look = lambda theta: seen(self.model(theta), x, frozen_outputs(held))[1][0, unit]  # noqa: E731
            return jax.grad(look)(theta)

        return jax.vmap(row)(which)

    def own_signals(
        self,
        theta: Float[Array, " parameters"],
        frozen: Frozen,
        depends: Bool[Array, "samples units"],
        heights: Heights,
        which: Int[Array, " some"],
    ) -> Float[Array, " some"]:
        """The signals at the outputs of units, each while it alone is a little higher than `heights` has it.

        They differ from those of [`gradient`][] where units depend on it: these are then on the side to which it moves them.
        """
        model, units = self.model(theta), frozen.shares.shape[1]
        outputs, z = seen(model, self.task.x, frozen_outputs(frozen))
        pulls = jax.grad(self.task.mean_loss)(outputs)

        def signal(index: Array) -> Array:
            sample, unit = index // units, index % units
            here = self.task.x, frozen, depends, heights, pulls
            x, held, dependent, high, pull = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, sample, 1), here)
            risen = Heights(high.which & ~dependent, high.above.at[0, unit].add(little(z)))
            above = self.distances(seen(model, x, risen.outputs)[1]) > 0
            held = held._replace(shares=jnp.where(dependent, above.astype(z.dtype), held.shares))
            pulled = lambda push: jnp.sum(pull * seen(model, x, frozen_outputs(held, push))[0])  # noqa: E731
            return jax.grad(pulled)(jnp.zeros_like(held.shares))[0, unit]

        return jax.vmap(signal)(which)

    def _by_place(
        self, z: Float[Array, "samples units"], function: Callable[[Kinks, Array], Array]
    ) -> Float[Array, "samples units"]:
        return jnp.concatenate([function(kinks, z[:, units]) for kinks, units in self.places()], axis=1)

    def places(self) -> list[tuple[Kinks, slice]]:
        """The kinks of each place of the model, in the order of its calls, and which units it has."""
        return places_of(self.parameters.model, self.task)


def places_of(model: PyTree, task: Task) -> list[tuple[Kinks, slice]]:
    """The places of a model where activations have kinks, and which units of a sample each has."""
    found: list[tuple[Kinks, slice]] = []

    def note(activation: Activation, kinks: Kinks, z: Array, units: slice) -> Array:
        found.append((kinks, units))
        return activation(z)

    eqx.filter_eval_shape(lambda model, x: seen(model, x, note), model, task.x)
    return found


def dependent_units(
    units: KinkedUnits,
    theta: Float[Array, " parameters"],
    heights: Heights,
    stays: Bool[Array, "samples units"],
    pushes: Float[Array, "samples units"],
) -> tuple[Bool[Array, "samples units"], Bool[Array, "samples units"]]:
    """Units whose inputs come from lower units at their kinks, and whether each is above its kink when these rise.

    Where the lower units of a sample are silent but for those that slide, a unit is at its kink with them, at any weights
    of its own: it has no kink of its own to slide along. Where some of the lower units leave their kinks, for `heights`,
    it is on one side with them; where all slide, on that of the excursions on which they are pushed, by `pushes`. Such
    units are found by other weights: without the lower units at their kinks, all in `heights` but those that `stay` above
    them, their inputs are then next to nothing beside what the excursions make of them.
    """
    z = units.preactivations(theta)
    distance = units.distances(z)
    if len(units.places()) < 2:
        return jnp.zeros_like(stays), distance > 0
    others = theta * (1 + OTHER_WEIGHTS * jax.random.normal(jax.random.key(0), theta.shape, theta.dtype))

    def without_near(activation: Activation, kinks: Kinks, new: Array, which: slice) -> Array:
        own = z[:, which]
        value, slope = jax.jvp(activation, (own,), (jnp.ones_like(own),))
        at_kink = activation(own - kinks.distance(own))
        return jnp.where((heights.which & ~stays)[:, which], at_kink, value + slope * (new - own))

    rest = units.distances(seen(units.model(others), units.task.x, without_near)[1])
    silent = jnp.abs(rest) <= NEGLIGIBLE * little(z)

    def after(above: Array) -> Array:
        high = Heights(heights.which & ~silent, above)
        return units.distances(seen(units.model(theta), units.task.x, high.outputs)[1])

    pushed = little(z) * pushes / jnp.maximum(jnp.max(pushes), jnp.finfo(z.dtype).tiny)
    before, risen = after(jnp.zeros_like(z)), after(heights.above + pushed)
    return silent & (risen != before), risen > 0
