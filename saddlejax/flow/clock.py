"""The plateau clock as components of diffrax, for anyone's own `diffeqsolve`."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .. import _check
from ..objective import Problem, as_problem
from ..parameters import Trainable
from ..tasks.task import Task
from .crossing import Chandrupatla
from .field import PlateauField, start
from .memory import nothing_yet, remember
from .solvers import velocity
from .state import ClockState
from .until import AbstractUntil, Escape

END_TOLERANCE = 1e-2
"""How well the end of a flow is located within its step, in units of the tolerance."""


class PlateauClock(eqx.Module):
    """Gradient flow in the plateau clock, in the parts that `diffrax.diffeqsolve` takes.

    - `term`: the vector field, a `diffrax.ODETerm`; `args`: its arguments, the model and what it lowers.
    - `y0`: the state at the start; `rate`: its rate.
    """

    args: PlateauField
    y0: ClockState
    rate: Float[Array, " state"]

    @property
    def term(self) -> dfx.ODETerm:
        """The vector field `d(state)/ds`."""
        return dfx.ODETerm(velocity)

    def event(self, until: AbstractUntil | None = None, rtol: float | int | Array = 1e-4) -> dfx.Event:
        """The end of a flow as a `diffrax.Event`, located to a hundredth of `rtol` in `s`."""
        until = checked_until(until)
        dtype = self.y0.vector.dtype
        rounding = 4 * float(jnp.finfo(dtype).eps)
        known = until.end_time() is not None  # looking at the time costs next to nothing
        atol = jnp.zeros((), dtype) if known else jnp.asarray(END_TOLERANCE * jnp.asarray(rtol), dtype)
        return dfx.Event(Condition(until), Chandrupatla(rtol=rounding, atol=atol), direction=True)  # type: ignore[call-arg]

    def log_time(self, y: ClockState) -> Float[Array, ""]:
        """`log t` at a state, which stays finite where `t` itself overflows; `−inf` at the start."""
        return self.args.log_time(y)

    def model(self, y: ClockState) -> PyTree:
        """The model at a state."""
        return self.args.model(y)

    @eqx.filter_jit
    def loss(self, y: ClockState) -> Float[Array, ""]:
        """The loss at a state."""
        return self.args.loss(y)


class Condition(eqx.Module):
    """When a flow ends, as diffrax asks for it."""

    until: AbstractUntil

    def __call__(self, t: Any, y: ClockState, args: PlateauField, **kwargs: Any) -> Float[Array, ""]:
        del t, kwargs
        return self.until.condition(args, y).astype(float)  # diffrax compares it with a plain 0.0


def checked_until(until: AbstractUntil | None) -> AbstractUntil:
    """The end of a flow, by default its first escape."""
    if until is None:
        return Escape()
    if not isinstance(until, AbstractUntil):
        raise _check.fail("until", "be saddlejax.Escape(), Time(t) or Loss(value)", repr(until))
    return until


def plateau_clock(
    model: PyTree, task: Task | Callable[[Any], Array], *, trainable: Trainable | None = None
) -> PlateauClock:
    """Gradient flow of a model in the plateau clock, as components for a `diffrax.diffeqsolve` of one's own.

    The clock is `dθ/ds = −τ∇𝓛`, `dt/ds = τ` with `1/τ² = Σ_g ‖∂𝓛/∂θ_g‖²/‖θ_g‖²` over the arrays `θ_g` of the model, in
    which a plateau of any length takes a number of steps that grows like `log 1/ε` in the init scale `ε`.

    ```python
    clock = saddlejax.plateau_clock(model, task)
    solution = diffrax.diffeqsolve(
        clock.term, diffrax.Tsit5(), 0.0, jax.numpy.inf, None, clock.y0, args=clock.args,
        stepsize_controller=saddlejax.PlateauController(rtol=1e-4), event=clock.event(saddlejax.Escape()), max_steps=4096,
    )
    end = jax.tree.map(lambda a: a[-1], solution.ys)
    clock.log_time(end), clock.loss(end), clock.model(end)
    ```

    [`saddlejax.gradient_flow`][] is made of these parts. With [`saddlejax.PlateauSolver`][] in place of the plain solver the
    steps are the same, and the checks of a step and of its end cost no gradients.

    **Arguments:** as those of [`saddlejax.gradient_flow`][].

    **Returns:** a `PlateauClock` with `term`, `y0`, `args`, `event(until)`, and the functions `log_time(y)`, `model(y)` and
    `loss(y)` of a state. Times `ts` of the solve are values of `s`, not of `t`.

    **Raises:** `ValueError` as [`saddlejax.gradient_flow`][] does for its `model` and `task`.
    """
    return clock_of(as_problem(model, task, trainable))


@eqx.filter_jit
def clock_of(problem: Problem) -> PlateauClock:
    """The plateau clock of a problem that is checked already."""
    field, vector, rate = start(problem)
    nothing = nothing_yet(field)
    memory = remember(nothing, field, vector, rate, nothing.unsuited, nothing.log_decay)
    return PlateauClock(field, ClockState.unknown(vector, memory), rate)
