"""An exponential integrator for stiff gradient flows, as a diffrax solver."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ..networks import safe_norm
from .krylov import KrylovSpace, krylov_space, phi


class Work(NamedTuple):
    """What a step or a solve has spent."""

    vector_fields: Int[Array, ""]
    products: Int[Array, ""]


Norm = Callable[[PyTree[Array]], Callable[[PyTree[Array]], Float[Array, ""]]]


def relative_to_leaves(y: PyTree[Array]) -> Callable[[PyTree[Array]], Float[Array, ""]]:
    """The largest over the leaves of `‖error‖/‖y‖`, absolute where a leaf is zero."""
    sizes = [safe_norm(leaf) for leaf in jax.tree.leaves(y)]

    def norm(error: PyTree[Array]) -> Array:
        leaves = zip(jax.tree.leaves(error), sizes, strict=True)
        return jnp.max(jnp.stack([safe_norm(e) / jnp.where(size > 0, size, 1) for e, size in leaves]))

    return norm


class ExponentialInterpolation(dfx.AbstractLocalInterpolation):
    """The continuous extension of [`saddlejax.ExponentialRosenbrock`][]: of order four, right in the stiff directions.

    With `x = (t − t_0)/h` it is `y_0 + x h φ_1(xhJ) F + x³ h 2 φ_3(xhJ) a + x⁴ h 6 φ_4(xhJ) b`, at the end of the step
    its result. It needs no further evaluations, since the Krylov spaces are kept.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    y0: PyTree[Array]
    spaces: tuple[KrylovSpace, KrylovSpace, KrylovSpace]

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> PyTree[Array]:
        del left
        if t1 is not None:
            return jax.tree.map(lambda a, b: a - b, self.evaluate(t1), self.evaluate(t0))
        size = self.t1 - self.t0
        flat, unravel = ravel_pytree(self.y0)
        return unravel(flat + _increment(self.spaces, (t0 - self.t0) / size, size))


def _increment(spaces: tuple, x: Array | float, size: Array) -> Array:
    field, second, third = spaces
    h = x * size
    return (
        h * field.apply(lambda z: phi(1, h * z))
        + x**2 * h * second.apply(lambda z: 2 * phi(3, h * z))
        + x**3 * h * third.apply(lambda z: 6 * phi(4, h * z))
    )


class ExponentialRosenbrock(dfx.AbstractAdaptiveSolver):
    """The parallel exponential Rosenbrock method of order four with an embedded one of order three.

    For autonomous flows `dy/dt = F(y)` whose Jacobian `J` is symmetric, such as gradient flows `F = −∇V`, where `−J` is
    the Hessian. Directions that decay fast do not bound the step. With `D(y) = F(y) − F(y_0) − J(y − y_0)`,

        y_2 = y_0 + ½h φ_1(½hJ) F,     y_3 = y_0 + h φ_1(hJ) F,
        a = 8 D(y_2) − D(y_3),         b = 2 D(y_3) − 8 D(y_2),
        y_1 = y_0 + h φ_1(hJ) F + 2h φ_3(hJ) a + 6h φ_4(hJ) b,

    and the last term is the error estimate. Only products with `J` are needed, which come from `jax.linearize`: every
    function of `J` is taken in a Krylov space (Lanczos), so that memory grows linearly with the size of `y`. Where a
    Krylov space runs full, what it leaves is added to the error estimate and the step controller shortens the step.

    **Arguments:**

    - `tolerance`: the error of the Krylov spaces, relative to the norm of every leaf of `y`. A tenth to a hundredth of
      the tolerance of the step controller is a good choice.
    - `krylov_size`: the most vectors in a space.

    The solver state counts vector fields and products, see `Work`. Derivatives through a solve are not available.

    Source: Hochbruck, Ostermann & Schweitzer, SIAM J. Numer. Anal. 47 (2009); Luan & Ostermann, J. Comput. Appl. Math.
    305 (2016), for stages that do not wait for one another.
    """

    tolerance: Float[Array, ""] | float = 1e-5
    krylov_size: int = eqx.field(static=True, default=48)
    norm: Norm = eqx.field(static=True, default=relative_to_leaves)
    term_structure: ClassVar = dfx.ODETerm
    interpolation_cls: ClassVar[Callable[..., ExponentialInterpolation]] = ExponentialInterpolation

    def order(self, terms: dfx.ODETerm) -> int:
        """Four; the error estimate is that of a method of order three."""
        return 4

    def init(self, terms: dfx.ODETerm, t0: Any, t1: Any, y0: PyTree, args: Any) -> Work:
        """No work yet."""
        return Work(jnp.asarray(0), jnp.asarray(0))

    def func(self, terms: dfx.ODETerm, t0: Any, y0: PyTree, args: Any) -> PyTree:
        """The vector field."""
        return terms.vf(t0, y0, args)

    def step(
        self,
        terms: dfx.ODETerm,
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

        def field(y: Array) -> Array:
            return ravel_pytree(terms.vf(t0, unravel(y), args))[0]

        norm = self.norm(y0)

        def measure(error: Array) -> Array:
            return norm(unravel(error))

        def space(vector: Array, order: int) -> tuple[KrylovSpace, Array, Array]:
            factor = {1: 1, 3: 2, 4: 6}[order]
            return krylov_space(
                product,
                vector,
                lambda z: factor * h * h * phi(order + 1, h * z),
                measure,
                jnp.asarray(self.tolerance, start.dtype),
                self.krylov_size,
            )

        rate, product = jax.linearize(field, start)
        along, left_1, products_1 = space(rate, 1)

        def rest(change: Array) -> Array:
            return field(start + change) - rate - product(change)

        half = along.apply(lambda z: 0.5 * h * phi(1, 0.5 * h * z))
        whole = along.apply(lambda z: h * phi(1, h * z))
        rest_2, rest_3 = rest(half), rest(whole)
        second, left_2, products_2 = space(8 * rest_2 - rest_3, 3)
        third, left_3, products_3 = space(2 * rest_3 - 8 * rest_2, 4)
        estimate = third.apply(lambda z: 6 * h * phi(4, h * z))
        change = whole + second.apply(lambda z: 2 * h * phi(3, h * z)) + estimate
        spent = Work(solver_state.vector_fields + 3, solver_state.products + products_1 + products_2 + products_3 + 2)
        dense = {"y0": y0, "spaces": (along, second, third)}
        return (
            unravel(start + change),
            unravel(estimate + left_1 + left_2 + left_3),
            dense,
            spent,
            dfx.RESULTS.successful,
        )
