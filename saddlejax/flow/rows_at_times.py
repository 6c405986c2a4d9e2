"""Rows of a flow at times that are asked for: a solver that writes them as it passes."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, Int, PyTree

from .crossing import Chandrupatla
from .field import PlateauField
from .record import Row, Save, row
from .state import ClockState


class Passed(NamedTuple):
    """The state of the solver inside, the rows written so far with the steps taken until then, and the steps so far."""

    inner: PyTree
    rows: Row
    steps: Int[Array, " rows"]
    count: Int[Array, ""]
    taken: Int[Array, ""]


class RowsAtTimes(dfx.AbstractAdaptiveSolver):
    """A solver that keeps a row at each of the times `save.times` that its steps pass over.

    `diffrax.SaveAt(ts=...)` counts in the clock's own `s`, in which the times `t` are not known beforehand.
    """

    solver: dfx.AbstractAdaptiveSolver
    save: Save
    term_structure: ClassVar = dfx.ODETerm

    @property
    def interpolation_cls(self) -> Callable[..., dfx.AbstractLocalInterpolation]:  # type: ignore[override]
        """The states within a step."""
        return self.solver.interpolation_cls

    def order(self, terms: Any) -> int | None:
        """The order of the solver."""
        return self.solver.order(terms)

    def error_order(self, terms: Any) -> Any:
        """The order of its error estimate."""
        return self.solver.error_order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: ClockState, args: PlateauField) -> Passed:
        """No rows yet; times that have passed before are left out."""
        times = self.save.times
        assert times is not None
        like = jax.eval_shape(lambda: row(self.save, args, y0))
        rows = jax.tree.map(lambda a: jnp.full((times.size, *a.shape), jnp.nan, a.dtype), like)
        passed = jnp.sum(jnp.log(times) <= args.log_time(y0))
        steps = jnp.full(times.size, -1)
        return Passed(self.solver.init(terms, t0, t1, y0, args), rows, steps, passed, jnp.asarray(0))

    def func(self, terms: Any, t0: Any, y0: ClockState, args: PlateauField) -> ClockState:
        """The vector field."""
        return self.solver.func(terms, t0, y0, args)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: ClockState, args: PlateauField, solver_state: Passed, made_jump: Any
    ) -> tuple[ClockState, Any, dict[str, Any], Passed, Any]:
        """One step from `t0` to `t1`, and the rows of the times within it."""
        y1, error, dense, inner, result = self.solver.step(terms, t0, t1, y0, args, solver_state.inner, made_jump)
        within = self.solver.interpolation_cls(t0=t0, t1=t1, **dense)
        passed = solver_state._replace(inner=inner, taken=solver_state.taken + 1)
        return y1, error, dense, self._write(args, within, t0, t1, args.log_time(y1), passed), result

    def _write(
        self,
        field: PlateauField,
        within: dfx.AbstractLocalInterpolation,
        t0: Array,
        t1: Array,
        limit: Float[Array, ""],
        passed: Passed,
    ) -> Passed:
        assert self.save.times is not None
        log_times = jnp.log(self.save.times).astype(limit.dtype)
        last = log_times.size - 1
        finder = Chandrupatla(rtol=4 * float(jnp.finfo(limit.dtype).eps), atol=0.0)  # type: ignore[call-arg]

        def waiting(passed: Passed) -> Array:
            return (passed.count <= last) & (log_times[jnp.minimum(passed.count, last)] <= limit)

        def write(passed: Passed) -> Passed:
            index = passed.count
            # In units of τ(θ_0), as the state holds it: nearly linear in s from the first step on.
            time = jnp.exp(log_times[jnp.minimum(index, last)] - field.log_time_unit)
            late = lambda s, _: field.layout.split(within.evaluate(s).vector).time - time  # noqa: E731
            at = optx.root_find(late, finder, t1, options={"lower": t0, "upper": t1}, throw=False).value
            state = within.evaluate(at)
            new = row(self.save, field, eqx.tree_at(lambda y: y.rate, state, field.motion(state.vector)))
            rows = jax.tree.map(lambda all, one: all.at[index].set(one), passed.rows, new)
            return passed._replace(rows=rows, steps=passed.steps.at[index].set(passed.taken), count=index + 1)

        return jax.lax.while_loop(waiting, write, passed)
