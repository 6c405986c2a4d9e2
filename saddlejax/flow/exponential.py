"""An exponential integrator for stiff gradient flows, as a diffrax solver."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from .. import _check
from .._numerics import safe_norm
from ..curvature.lanczos import Function, KrylovProblem, KrylovSpace, phi


class Work(NamedTuple):
    """What a step or a solve has spent."""

    vector_fields: Int[Array, ""]
    products: Int[Array, ""]


class Increments(NamedTuple):
    """What a step from `y_0` adds to it.

    - `end`: over the whole step; `inner`: over the fractions of it that were asked for.
    - `estimate`: of the error of `end`, what the Krylov spaces leave included.
    - `largest`: the largest eigenvalue of the Jacobian seen from the vector field, zero if that is negative.
    - `fastest`: the largest absolute value of these eigenvalues.
    - `spaces`: those of the vector field and of the remainders, where they were asked for.
    - `work`: spent on it.
    """

    end: Float[Array, " n"]
    inner: tuple[Float[Array, " n"], ...]
    estimate: Float[Array, " n"]
    largest: Float[Array, ""]
    fastest: Float[Array, ""]
    spaces: tuple[KrylovSpace, ...] | None
    work: Work


Norm = Callable[[PyTree[Array]], Callable[[PyTree[Array]], Float[Array, ""]]]


def relative_to_leaves(y: PyTree[Array]) -> Callable[[PyTree[Array]], Float[Array, ""]]:
    """The largest over the leaves of `‖error‖/‖y‖`, absolute where a leaf is zero."""
    sizes = [safe_norm(leaf) for leaf in jax.tree.leaves(y)]

    def norm(error: PyTree[Array]) -> Array:
        leaves = zip(jax.tree.leaves(error), sizes, strict=True)
        return jnp.max(jnp.stack([safe_norm(e) / jnp.where(size > 0, size, 1) for e, size in leaves]))

    return norm


def _functions(x: Array | float, h: Array) -> tuple[Function, Function, Function]:
    """What multiplies `F`, `a` and `b` in the increment over the fraction `x` of a step `h`, as functions of `J`."""
    return (
        lambda z: x * h * phi(1, x * h * z),
        lambda z: x**3 * h * 2 * phi(3, x * h * z),
        lambda z: x**4 * h * 6 * phi(4, x * h * z),
    )


class ExponentialInterpolation(dfx.AbstractLocalInterpolation):
    """The continuous extension of [`saddlejax.ExponentialRosenbrock`][]: of its order, right in the stiff directions.

    With `x = (t − t_0)/h` it is `y_0 + x h φ_1(xhJ) F + x³ h 2 φ_3(xhJ) a + x⁴ h 6 φ_4(xhJ) b` (with two
    stages `a = D(y_2)`, and `b` is not there), at the end of the step its result. It needs no further evaluations, since
    the Krylov spaces are kept.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    y0: PyTree[Array]
    spaces: tuple[KrylovSpace, ...]

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> PyTree[Array]:
        del left
        if t1 is not None:
            return jax.tree.map(lambda a, b: a - b, self.evaluate(t1), self.evaluate(t0))
        size = self.t1 - self.t0
        flat, unravel = ravel_pytree(self.y0)
        functions = _functions((t0 - self.t0) / size, jnp.asarray(size, flat.dtype))
        parts = [space.apply(function)[0] for space, function in zip(self.spaces, functions, strict=False)]
        return unravel(flat + sum(parts))


class ExponentialRosenbrock(dfx.AbstractAdaptiveSolver):
    """Exponential Rosenbrock methods: the parallel one of order four with an embedded one of order three, and one below.

    For autonomous flows `dy/dt = F(y)` whose Jacobian `J` is symmetric, such as gradient flows `F = −∇V`, where `−J` is
    the Hessian. Directions that decay fast do not bound the step. With `D(y) = F(y) − F(y_0) − J(y − y_0)`,

        y_2 = y_0 + ½h φ_1(½hJ) F,     y_3 = y_0 + h φ_1(hJ) F,
        a = 8 D(y_2) − D(y_3),         b = 2 D(y_3) − 8 D(y_2),
        y_1 = y_0 + h φ_1(hJ) F + 2h φ_3(hJ) a + 6h φ_4(hJ) b,

    and the last term is the error estimate. With two stages it is the method of order three with an embedded one of order
    two,

        y_1 = y_2 + 2h φ_3(hJ) D(y_2),     y_2 = y_0 + h φ_1(hJ) F,

    to which jumps of the vector field within a step do less harm. Only products with `J` are needed, which come from
    `jax.linearize`: every function of `J` is taken in a Krylov space (Lanczos), so that memory grows linearly with the size
    of `y`. Where a Krylov space runs full, what it leaves is added to the error estimate and the step controller shortens
    the step.

    **Arguments:**

    - `tolerance`: the error of the Krylov spaces, relative to the norm of every leaf of `y`. A tenth to a hundredth of
      the tolerance of the step controller is a good choice.
    - `krylov_size`: the most vectors in a space.
    - `stages`: three for the method of order four, the default, or two for that of order three.

    The solver state counts vector fields and products, see `Work`. Derivatives through a solve are not available.

    Source: Hochbruck, Ostermann & Schweitzer, SIAM J. Numer. Anal. 47 (2009); Luan & Ostermann, J. Comput. Appl. Math.
    305 (2016), for stages that do not wait for one another.
    """

    tolerance: Float[Array, ""] | float = 1e-5
    krylov_size: int = eqx.field(static=True, default=48)
    norm: Norm = eqx.field(static=True, default=relative_to_leaves)
    stages: int = eqx.field(static=True, default=3)
    term_structure: ClassVar = dfx.ODETerm
    interpolation_cls: ClassVar[Callable[..., ExponentialInterpolation]] = ExponentialInterpolation

    def __check_init__(self) -> None:
        _check.whole_number("krylov_size", self.krylov_size)
        if self.stages not in (2, 3):
            raise _check.fail("stages", "be 2 or 3", repr(self.stages))

    def order(self, terms: dfx.AbstractTerm) -> int:
        """Four, or three with two stages; the error estimate is that of a method whose order is less by one."""
        return self.stages + 1

    def init(self, terms: dfx.AbstractTerm, t0: Any, t1: Any, y0: PyTree, args: Any) -> Work:
        """No work yet."""
        return Work(jnp.asarray(0), jnp.asarray(0))

    def func(self, terms: dfx.AbstractTerm, t0: Any, y0: PyTree, args: Any) -> PyTree:
        """The vector field."""
        return terms.vf(t0, y0, args)

    def step(
        self,
        terms: dfx.AbstractTerm,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: Any,
        solver_state: Work,
        made_jump: Any,
    ) -> tuple[PyTree, PyTree, dict[str, Any], Work, Any]:
        """One step from `t0` to `t1`."""
        del made_jump
        start, unravel = ravel_pytree(y0)
        h = jnp.asarray(t1 - t0, start.dtype)
        step = self.increments(lambda y: terms.vf(t0, y, args), y0, h, keep=True)
        spent = Work(*(before + new for before, new in zip(solver_state, step.work, strict=True)))
        dense = {"y0": y0, "spaces": step.spaces}
        return unravel(start + step.end), unravel(step.estimate), dense, spent, dfx.RESULTS.successful

    def increments(
        self,
        vector_field: Callable[[PyTree], PyTree],
        y0: PyTree,
        h: Float[Array, ""],
        fractions: Sequence[float] = (),
        *,
        keep: bool = False,
    ) -> Increments:
        """A step of size `h`, flattened, with the states at fractions of it; `keep` keeps the Krylov spaces as well.

        Without them it needs less time: most spaces are small, and room for large ones is then taken only where needed.
        """
        start, unravel = ravel_pytree(y0)
        norm = self.norm(y0)
        at = [_functions(x, h) for x in (*fractions, 1.0)]

        def field(y: Array) -> Array:
            return ravel_pytree(vector_field(unravel(y)))[0]

        def several(vector: Array, order: int, functions: Sequence[Function]) -> tuple:
            factor = {1: 1, 3: 2, 4: 6}[order]
            problem = KrylovProblem(
                product,
                vector,
                lambda z: factor * h * h * phi(order + 1, h * z),
                lambda error: norm(unravel(error)),
                jnp.asarray(self.tolerance, start.dtype),
                self.krylov_size,
            )
            if not keep:
                found = problem.apply(*functions)
                return found.results, found.extremes, found.error, found.used, None
            space = problem.space()
            return space.apply(*functions), space.extremes, space.error, space.used, space

        rate, product = jax.linearize(field, start)

        def rest(change: Array) -> Array:
            return field(start + change) - rate - product(change)

        half = [_functions(0.5, h)[0]] if self.stages == 3 else []
        inside, (lowest, largest), left, used, space = several(rate, 1, [*half, *(one[0] for one in at)])
        states, spaces = inside[len(half) :], [space]
        rests = [rest(change) for change in [*inside[: len(half)], states[-1]]]
        remainders = [8 * rests[0] - rests[1], 2 * rests[1] - 8 * rests[0]] if half else rests
        for order, remainder in enumerate(remainders, 3):
            parts, _, more_left, more_used, space = several(remainder, order, [one[order - 2] for one in at])
            states = [state + part for state, part in zip(states, parts, strict=True)]
            left, used, spaces = left + more_left, used + more_used, [*spaces, space]
        *inner, end = states
        return Increments(
            end=end,
            inner=tuple(inner),
            estimate=parts[-1] + left,
            largest=largest,
            fastest=jnp.maximum(largest, -lowest),
            spaces=tuple(spaces) if keep else None,
            work=Work(jnp.asarray(self.stages), used + self.stages - 1),
        )
