"""The state of a flow in the plateau clock: one vector, the rate that a solver leaves there, and what it remembers."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..parameters import GroupShapes
from .coordinates import Coordinates


class Layout(NamedTuple):
    """What a state vector holds, one after another: coordinates, time, loss, energy, and a drift for each hidden layer."""

    shapes: GroupShapes
    hidden: int

    @property
    def size(self) -> int:
        """The number of entries."""
        return self.shapes.size + len(self.shapes.shapes) + 3 + self.hidden

    def join(self, parts: "Parts") -> Float[Array, " state"]:
        """The vector of such parts."""
        here, numbers = parts.coordinates, jnp.stack([parts.time, parts.loss, parts.energy])
        return jnp.concatenate([here.joined, here.log_units, numbers, parts.drift])

    def split(self, vector: Float[Array, " state"]) -> "Parts":
        """The parts of a vector, of a state or of its rate."""
        n, end = self.shapes.size, self.shapes.size + len(self.shapes.shapes)
        here = Coordinates(vector[:n], vector[n:end], self.shapes)
        return Parts(here, vector[end], vector[end + 1], vector[end + 2], vector[end + 3 :])


class Parts(NamedTuple):
    """The parts of a state, or of its rate per unit of `s`.

    - `coordinates`: of the parameters.
    - `time`: `t/τ(θ_0)`, which stays near one on a plateau of any length.
    - `loss`: `∫ 𝓛 ds`; its rate at the end of a step is the loss there, at no cost.
    - `energy`: `∫ ‖∇𝓛‖² dt`, which for the exact flow is the loss lost.
    - `drift`: `∫ (dΔ_l/dt) dt`, one number for each hidden layer of a perceptron.
    """

    coordinates: Coordinates
    time: Float[Array, ""]
    loss: Float[Array, ""]
    energy: Float[Array, ""]
    drift: Float[Array, " hidden"]


class Memory(NamedTuple):
    """What a solver of this package remembers from step to step, as floating-point numbers.

    - `share`: how small a part of the parameters the error must be small beside, one unless they nearly cancel.
    - `least_share`: the smallest of these so far.
    - `log_ratio`: the largest logarithm so far of the gradient norm over what it is proportional to.
    - `log_first`, `log_highest`, `log_lowest`: logarithms of the gradient norm at the start, of the largest and of the
      smallest so far; `log_lost`: of the smallest since dormant parts were lost.
    - `log_sizes`: logarithms of the norms of the groups where the gradient norm was smallest.
    - `dormant_lost`: one where something smaller than rounding has grown all the same.
    - `at_rest`: one where nothing but rounding moves the parameters any more.
    - `relaxed`: one where the loss had left the height of the plateau already where the gradient norm was smallest, since
      something, such as a bias, has a minimum of its own.
    - `rises`: one where the gradient norm has risen from its smallest value, by more than errors of the steps make it.
    - `log_decay`: the logarithm of the fastest rate of decay per unit of `t` that was seen lately.
    - `unsuited`: how many steps more than others would have paid as steps of another kind.
    - `sliding`: how many units slide along their kinks.
    """

    share: Float[Array, ""]
    least_share: Float[Array, ""]
    log_ratio: Float[Array, ""]
    log_first: Float[Array, ""]
    log_highest: Float[Array, ""]
    log_lowest: Float[Array, ""]
    log_lost: Float[Array, ""]
    log_sizes: Float[Array, " groups"]
    dormant_lost: Float[Array, ""]
    at_rest: Float[Array, ""]
    relaxed: Float[Array, ""]
    rises: Float[Array, ""]
    log_decay: Float[Array, ""]
    unsuited: Float[Array, ""]
    sliding: Float[Array, ""]


class ClockState(eqx.Module):
    """What diffrax integrates over `s`.

    - `vector`: the state itself, see `Parts`.
    - `rate`: its rate, where the solver has left it there, so that events and step sizes need no gradient of their own;
      NaN where it is not known. Solvers of other packages leave it as it is.
    - `memory`: see `Memory`.
    - `error`: zero; in the error estimate of a step, an error that the solver has measured itself.
    """

    vector: Float[Array, " state"]
    rate: Float[Array, " state"]
    memory: Memory
    error: Float[Array, ""]

    @classmethod
    def unknown(cls, vector: Float[Array, " state"], memory: Memory) -> "ClockState":
        """A state whose rate is not known."""
        return cls(vector, jnp.full_like(vector, jnp.nan), memory, jnp.zeros_like(memory.share))
