"""Explicit solvers in the plateau clock that leave the rate at the end of a step in the state."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .. import _check
from .._numerics import safe_norm
from .field import PlateauField
from .memory import decay_seen, remember
from .state import ClockState, Layout, Memory

ROUNDING = 1e3
LEAST_COSINE = 1e-2
STABILITY_LIMIT = 2.0
"""Where a step in `t`, times the largest rate of decay `ρ`, is more than this, stability and not accuracy bounds it."""


class PlateauInterpolation(dfx.AbstractLocalInterpolation):
    """The states within a step, whose rates are not known."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    within: dfx.AbstractLocalInterpolation
    memory: Memory

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> ClockState:
        return ClockState.unknown(self.within.evaluate(t0, t1, left), self.memory)


def _interpolate(
    inner: Callable[..., dfx.AbstractLocalInterpolation], *, t0: Any, t1: Any, within: PyTree, memory: Memory
) -> PlateauInterpolation:
    return PlateauInterpolation(t0=t0, t1=t1, within=inner(t0=t0, t1=t1, **within), memory=memory)


class PlateauSolver(dfx.AbstractAdaptiveSolver):
    """An explicit solver for the plateau clock, to be used with [`saddlejax.plateau_clock`][].

    Its steps are those of the diffrax solver that it holds. At the end of each it leaves the rate in the state, which that
    solver has computed as its last stage, so that events and step sizes need no gradient of their own.

    **Arguments:** `solver`: an explicit diffrax solver whose last stage is the first of the next step: `Tsit5` (the
    default), `Dopri5`, `Dopri8` or `Bosh3`.

    **Raises:** `ValueError` for any other solver.
    """

    solver: dfx.AbstractERK = dfx.Tsit5()
    term_structure: ClassVar = dfx.ODETerm

    def __check_init__(self) -> None:
        solver = self.solver
        tableau = getattr(solver, "tableau", None)
        if not (isinstance(solver, dfx.AbstractERK) and isinstance(tableau, dfx.ButcherTableau) and tableau.fsal):
            raise _check.fail(
                "solver",
                "be an explicit first-same-as-last diffrax solver: Tsit5, Dopri5, Dopri8 or Bosh3",
                repr(solver),
            )

    @property
    def interpolation_cls(self) -> Callable[..., PlateauInterpolation]:  # type: ignore[override]
        """The states within a step."""
        return partial(_interpolate, self.solver.interpolation_cls)

    @property
    def _inner(self) -> dfx.AbstractERK:
        """The solver inside; derivatives in both modes go through its loop over stages, as diffrax has it for its own."""
        if self.solver.scan_kind is not None:
            return self.solver
        return eqx.tree_at(lambda s: s.scan_kind, self.solver, "bounded", is_leaf=lambda leaf: leaf is None)

    def gradients(self, attempts: Int[Array, ""]) -> Int[Array, ""]:
        """The gradients that so many attempted steps take: the first one needs one more than the others."""
        tableau = self.solver.tableau
        assert isinstance(tableau, dfx.ButcherTableau)
        return attempts * (tableau.num_stages - 1) + (attempts > 0)

    def order(self, terms: Any) -> int | None:
        """The order of the solver."""
        return self.solver.order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: ClockState, args: PlateauField) -> PyTree:
        """The state of the solver."""
        return self._inner.init(_alone(terms, y0), t0, t1, y0.vector, args)

    def func(self, terms: Any, t0: Any, y0: ClockState, args: PlateauField) -> ClockState:
        """The vector field."""
        return terms.vf(t0, y0, args)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: ClockState, args: PlateauField, solver_state: PyTree, made_jump: Any
    ) -> tuple[ClockState, ClockState, dict[str, Any], PyTree, Any]:
        """One step from `t0` to `t1`."""
        vector, error, within, solver_state, result = self._inner.step(
            _alone(terms, y0), t0, t1, y0.vector, args, solver_state, made_jump
        )
        moves, passed = within["k"], args.layout.split(vector - y0.vector).time
        rate = moves[-1] / (t1 - t0)
        fastest = self._fastest_decay(args.layout, y0.vector, vector, moves)
        log_decay = decay_seen(y0.memory, fastest, args.log_time_unit)
        stiff = log_decay + args.log_time_unit + jnp.log(jnp.maximum(passed, 0)) > math.log(STABILITY_LIMIT)
        unsuited = jnp.maximum(y0.memory.unsuited + jnp.where(stiff, 1, -1), 0)
        memory = remember(y0.memory, args, vector, rate, unsuited, log_decay)
        zero = jnp.zeros_like(vector)
        y1 = ClockState(vector, rate, memory, jnp.zeros_like(y0.error))
        wrong = ClockState(error, zero, Memory(*[jnp.zeros_like(m) for m in memory]), jnp.zeros_like(y0.error))
        return y1, wrong, {"within": within, "memory": memory}, solver_state, result

    def _fastest_decay(self, layout: Layout, before: Array, after: Array, moves: Array) -> Float[Array, ""]:
        """`ρ = ‖∇𝓛(θ) − ∇𝓛(θ̃)‖/‖θ − θ̃‖` for the last two stages of a step, where both lie at its end.

        It is at most the largest absolute eigenvalue of the Hessian, and close to it where the steps are bounded by
        stability, since the stages then differ along that direction (Hairer & Wanner, Solving ODEs II, section IV.2). Where
        the last stages lie at different times it is `‖g‖²/|gᵀd|` with the differences `g` of the gradients and `d` of the
        parameters, in which their way from one time to the other hardly counts. In the unit of the time; zero where the two
        stages hardly differ.
        """
        tableau = self.solver.tableau
        assert isinstance(tableau, dfx.ButcherTableau)
        row = jnp.asarray(np.asarray(tableau.a_lower[-2]), moves.dtype)
        stage = before + jnp.matmul(row, moves[:-2], precision="highest")
        here, there = (layout.split(vector).coordinates for vector in (after, stage))
        rates, taus = zip(*[(parts.coordinates, parts.time) for parts in map(layout.split, moves[-2:])], strict=True)

        def apart(a: Float[Array, " parameters"], b: Float[Array, " parameters"]) -> Float[Array, " parameters"]:
            """The difference of two vectors, one here and one there, each in the units of its own place."""
            units = (jnp.exp(place.log_units - jnp.max(here.log_units)) for place in (here, there))
            one, other = (layout.shapes.map(lambda u, v: u * v, unit, v) for unit, v in zip(units, (a, b), strict=True))
            return one - other

        way = apart(here.joined, there.joined)
        moved, size = safe_norm(way), safe_norm(apart(here.joined, jnp.zeros_like(here.joined)))
        differ = (moved > ROUNDING * jnp.finfo(moves.dtype).eps * size) & (taus[0] > 0) & (taus[1] > 0)
        at_there, at_here = (
            place.velocity(rate) / jnp.where(differ, tau, 1)
            for place, rate, tau in zip((there, here), rates, taus, strict=True)
        )
        change = apart(at_here, at_there)
        largest = safe_norm(change) / jnp.where(differ, moved, 1)
        if tableau.c[-2] != tableau.c[-1]:
            turned = safe_norm(change)
            unit = change / jnp.where(turned > 0, turned, 1), way / jnp.where(differ, moved, 1)
            largest = largest / jnp.maximum(jnp.abs(jnp.dot(*unit, precision="highest")), LEAST_COSINE)
        return jnp.where(differ, largest, 0)


def _alone(terms: dfx.AbstractTerm, like: ClockState) -> dfx.ODETerm:
    """The term of the state vector alone."""
    return dfx.ODETerm(lambda s, vector, args: terms.vf(s, ClockState.unknown(vector, like.memory), args).vector)


def velocity(s: Any, y: ClockState, args: PlateauField) -> ClockState:
    """The vector field on the whole state: what is only remembered stands still."""
    del s
    still = Memory(*[jnp.zeros_like(number) for number in y.memory])
    return ClockState(args.motion(y.vector), jnp.zeros_like(y.vector), still, jnp.zeros_like(y.error))
