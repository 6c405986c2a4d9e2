"""The size of steps in the plateau clock: an error relative to each group, and a prediction of how it will change."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from .. import _check
from .field import PlateauField
from .memory import smallest_share
from .state import ClockState

SAFETY = 0.9
LEAST_INFLUENCE = 0.05
LARGEST_CUT = 0.2
CUT_AFTER_FAILURE = 0.25
SMALLEST_STEP = 1e-9
LOSS_ROUNDING = 100


class StepSize(eqx.Module):
    """What is remembered from step to step: sizes, the last error in units of the tolerance, and the loss."""

    size: Float[Array, ""]
    last_size: Float[Array, ""]
    last_error: Float[Array, ""]
    just_rejected: Bool[Array, ""]
    loss: Float[Array, ""]


class PlateauController(dfx.AbstractAdaptiveStepSizeController):
    """Chooses the steps of a flow in the plateau clock, for [`saddlejax.plateau_clock`][] in a `diffrax.diffeqsolve`.

    The error of a step is the largest over the groups of `‖error_g‖/‖θ_g‖`. A step that raises the loss is rejected, since
    it has jumped over what there was to follow. Where the last two accepted steps show the error growing, the growth is
    taken to go on (Gustafsson's predictive control). The solve ends with `dt_min_reached` where no step is short enough.

    **Arguments:**

    - `rtol`: the error of a step relative to each group.
    - `min_step`: the size in `s` below which errors no longer shorten a step; for activations with kinks, 2e-3.
    - `to_escape`: whether the solve is to end at its first escape, the default. On the way there an error counts by its
      influence on the escape time, which falls to a twentieth late on the plateau, when nearly all of the time has passed;
      fully where a bias has found its minimum, since the clock then tells the pace of the bias, not that of the plateau.
      Pass False for all other ends: steps of an explicit solver are then at most 0.5 long, without which parts of a group
      that decay beside the others are lost.
    - `largest_growth`: the most by which a step may be longer than the one before, 2 by default.
    - `longest_step`: the longest step in `s`; by default 0.5 where `to_escape` is False, and else none.
    - `first_rtol`: a bound on the tolerance until the loss leaves the plateau it starts on, none by default. Errors there
      all lengthen or shorten that plateau, by some fifty times the tolerance.
    """

    rtol: Float[Array, ""] | float = 1e-4
    min_step: Float[Array, ""] | float = 0.0
    to_escape: bool = eqx.field(static=True, default=True)
    largest_growth: float = eqx.field(static=True, default=2.0)
    longest_step: float | None = eqx.field(static=True, default=None)
    first_rtol: float = eqx.field(static=True, default=float("inf"))
    atol: ClassVar[float] = 0.0
    norm: ClassVar[Callable[..., Array]] = optx.max_norm

    def __check_init__(self) -> None:
        _check.tolerance("rtol", self.rtol)
        if not self.first_rtol > 0:
            raise _check.fail("first_rtol", "be positive, or infinite for no bound", self.first_rtol)

    def wrap(self, direction: Any) -> "PlateauController":
        """The clock runs forwards only."""
        del direction
        return self

    def init(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: ClockState,
        dt0: Any,
        args: PlateauField,
        func: Callable[..., Any],
        error_order: Any,
    ) -> tuple[Array, StepSize]:
        """The clock makes all rates of order one, so the first step follows from the tolerance alone, unless `dt0` is given."""
        del terms, t1, func
        rtol = jnp.asarray(self.rtol, y0.vector.dtype)
        size = rtol ** (1 / error_order) if dt0 is None else jnp.asarray(dt0, rtol.dtype)
        loss = jax.lax.stop_gradient(args.loss(y0))
        state = StepSize(size, jnp.ones_like(rtol), jnp.zeros_like(rtol), jnp.asarray(False), loss)
        return t0 + size, state

    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: ClockState,
        y1: ClockState,
        args: PlateauField,
        y_error: Any,
        error_order: Any,
        controller_state: StepSize,
    ) -> tuple[Array, Array, Array, bool, StepSize, Any]:
        """Whether to keep the step from `t0` to `t1`, and how long the next one is."""
        y0, y1, y_error, rtol = jax.lax.stop_gradient((y0, y1, y_error, jnp.asarray(self.rtol, y0.vector.dtype)))
        min_step = jnp.asarray(self.min_step, rtol.dtype)
        rtol = jnp.where(args.has_left_plateau(controller_state.loss), rtol, jnp.minimum(rtol, self.first_rtol))
        size = t1 - t0
        of_groups, of_time = relative_errors(args, y_error, y1)
        share = jnp.maximum(y0.memory.share, smallest_share(rtol))
        weight = influence(args, y0, y1, size) if self.to_escape else 1
        scaled = jnp.maximum(of_groups * weight / share, of_time) / rtol
        loss, before = jax.lax.stop_gradient(args.loss(y1)), controller_state.loss
        # Where little is left of the loss it is the outputs that are rounded, not the loss itself.
        scale = jnp.maximum(jnp.abs(before), jnp.sqrt(jnp.abs(before * args.plateau)))
        rounding = LOSS_ROUNDING * jnp.finfo(rtol.dtype).eps * scale
        failed = ~(jnp.isfinite(scaled) & jnp.all(jnp.isfinite(y1.vector)) & (loss <= before + rounding))
        # The size as it was chosen: that between `t0` and `t1` is rounded.
        accepted = ((scaled <= 1) | (controller_state.size <= min_step)) & ~failed
        longest = self.longest_step
        if longest is None:
            longest = jnp.inf if self.to_escape else 0.5
        step = jax.lax.stop_gradient(
            next_step_size(
                controller_state, scaled, accepted, failed, error_order, min_step, self.largest_growth, longest, loss
            )
        )
        stuck = ~accepted & (step.size < SMALLEST_STEP * jnp.minimum(step.last_size, 1))
        result = dfx.RESULTS.where(stuck, dfx.RESULTS.dt_min_reached, dfx.RESULTS.successful)
        begin = jnp.where(accepted, t1, t0)
        return accepted, begin, begin + step.size, False, step, result


def relative_errors(
    field: PlateauField, error: ClockState, after: ClockState
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest relative error of a step over the groups, and that of the time, relative to itself.

    Where a solver has measured the error of the groups itself, that counts. The quadratures that ride along do not count.
    """
    wrong, here = field.layout.split(error.vector), field.layout.split(after.vector)
    turned, joined, shapes = wrong.coordinates.joined, here.coordinates.joined, field.layout.shapes
    squares = shapes.inner(turned, turned) / jnp.maximum(shapes.inner(joined, joined), 1)
    squares = squares + jnp.square(wrong.coordinates.log_units)
    time = jnp.abs(wrong.time) / jnp.where(here.time > 0, here.time, 1)
    return jnp.maximum(jnp.sqrt(jnp.max(squares)), jnp.abs(error.error)), time


def influence(field: PlateauField, before: ClockState, after: ClockState, size: Float[Array, ""]) -> Float[Array, ""]:
    """How much an error of the groups made now can still change the escape time, between 0.05 and 1.

    On the plateau `τ` falls while the groups grow, so that most of the time `t` has passed long before the escape. An
    error relative to the groups changes the time still to come in the same proportion, which is `τ/t` of the whole. It is
    one where something else than the escape sets the pace `τ`.
    """
    passed, now = field.layout.split(before.vector).time, field.layout.split(after.vector).time
    tau = (now - passed) / size
    share = jnp.clip(tau / jnp.where(passed > 0, passed, tau), LEAST_INFLUENCE, 1)
    return jnp.where(after.memory.relaxed > 0, 1, share)


def next_step_size(
    step: StepSize,
    error: Float[Array, ""],
    accepted: Bool[Array, ""],
    failed: Bool[Array, ""],
    order: float | int,
    min_step: Float[Array, ""],
    largest_growth: float,
    longest_step: float | int,
    loss: Float[Array, ""],
) -> StepSize:
    """The next size from the error in units of the tolerance.

    After a rejection the size does not grow at once. `failed` marks steps that are not finite or raise the loss, whose
    error says nothing: only they take the size below `min_step`, from where it has to grow again.
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
    return StepSize(
        size=jnp.minimum(size, longest_step),
        last_size=jnp.where(accepted, step.size, step.last_size),
        last_error=jnp.where(accepted, error, step.last_error),
        just_rejected=~accepted,
        loss=jnp.where(accepted, loss, step.loss),
    )
