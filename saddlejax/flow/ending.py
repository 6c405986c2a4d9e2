"""Why a flow ends before it is to: at rest, without a plateau, or for want of another kind of step."""

import math
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .controller import PlateauController
from .field import PlateauField
from .state import ClockState

NO_PLATEAU_GRADIENT = 1e-6
NO_PLATEAU_LOSS = 0.5


class Ends(NamedTuple):
    """Why a stretch of a flow ended; the first one that holds counts."""

    until: Bool[Array, ""]
    at_rest: Bool[Array, ""]
    no_plateau: Bool[Array, ""]
    unsuited: Bool[Array, ""]
    no_step: Bool[Array, ""]


class EndingController(dfx.AbstractStepSizeController):
    """A step size controller that also ends a solve: at rest, without a plateau, or for another kind of step."""

    controller: PlateauController
    patience: Float[Array, ""]
    sees_plateau: bool = eqx.field(static=True)

    def wrap(self, direction: Any) -> "EndingController":
        """The clock runs forwards only."""
        del direction
        return self

    def init(self, *arguments: Any) -> Any:
        """The first step is that of the controller inside."""
        return self.controller.init(*arguments)

    def adapt_step_size(
        self, t0: Any, t1: Any, y0: ClockState, y1: ClockState, args: PlateauField, *others: Any
    ) -> tuple[Any, ...]:
        """The choice of the controller inside, and whether the flow ends."""
        keep, begin, end, made_jump, state, result = self.controller.adapt_step_size(t0, t1, y0, y1, args, *others)
        ends = self.ends(args, y1)
        over = keep & (ends.at_rest | ends.no_plateau | ends.unsuited) | (y0.memory.at_rest > 0)
        result = dfx.RESULTS.where(over, dfx.RESULTS.event_occurred, result)
        # A group whose units are at their kinks may be zero after a finite time, to which the clock never comes: it goes so
        # slowly that a unit of it does not change the time.
        time, pace = (args.layout.split(y).time for y in (y1.vector, y1.rate))
        stands_still = keep & (y1.memory.sliding > 0) & (time + pace <= time)
        result = dfx.RESULTS.where(stands_still, dfx.RESULTS.dt_min_reached, result)
        return keep & ~(y0.memory.at_rest > 0), begin, end, made_jump, state, result

    def ends(self, field: PlateauField, state: ClockState) -> Ends:
        """Which ends have come at a state whose rate is known."""
        memory = state.memory
        # In other models a bias that finds its minimum looks alike: of those it is told at rest.
        no_plateau = _no_plateau(field, state) if self.sees_plateau and field.perceptron else jnp.asarray(False)
        not_here = jnp.asarray(False)
        return Ends(not_here, memory.at_rest > 0, no_plateau, memory.unsuited > self.patience, not_here)


def _no_plateau(field: PlateauField, state: ClockState) -> Bool[Array, ""]:
    """Whether a gradient that never rose has fallen for good."""
    memory = state.memory
    rose = memory.log_highest > memory.log_first
    fallen = field.log_gradient_norm(state.vector, state.rate) < memory.log_first + math.log(NO_PLATEAU_GRADIENT)
    loss = field.layout.split(state.rate).loss
    return ~rose & (fallen | (loss < NO_PLATEAU_LOSS * field.plateau))
