"""Exponential steps in the plateau clock, for flows whose fast directions would bound explicit ones."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .. import _check
from .._numerics import safe_norm
from ..parameters import GroupShapes
from .coordinates import Coordinates, to_coordinates
from .exponential import ExponentialRosenbrock, Work, relative_to_leaves
from .field import PlateauField
from .memory import decay_seen, log_pace, remember, smallest_share
from .state import ClockState, Memory, Parts

# Gauss-Lobatto quadrature with five nodes on [0, 1], exact for polynomials of degree seven.
INNER_NODES = (0.5 - (3 / 28) ** 0.5, 0.5, 0.5 + (3 / 28) ** 0.5)
NODES = (0.0, *INNER_NODES, 1.0)
ROUNDING, GROWING = 10, 0.01
ROUNDING_AT_KINKS = 0.5
"""The power of the rounding of numbers that is left of the velocity where slopes are frozen that are not quite those at rest."""
KRYLOV_SHARE, KRYLOV_SHARE_AT_KINKS = 0.01, 0.1
EXPLICIT, EXPLICIT_AT_KINKS = (6, 3.3), (9, 2.5)
"""What an explicit step costs, in gradients, and how far it reaches in times of the fastest decay."""
PRODUCT_COST = 1.8
"""What a Hessian-vector product costs, in gradients."""
WORTH_CHANGING = 0.8


def _integration() -> np.ndarray:
    """The integrals of the Lagrange polynomials of the nodes from 0 to every node; the last row is the quadrature rule."""
    nodes = np.asarray(NODES)
    rows = []
    for node, others in ((n, np.delete(nodes, i)) for i, n in enumerate(nodes)):
        lagrange = np.polynomial.Polynomial.fromroots(others) / np.prod(node - others)
        rows.append(lagrange.integ()(nodes))
    return np.stack(rows, axis=1)


INTEGRATION = _integration()


class NodeInterpolation(dfx.AbstractLocalInterpolation):
    """The polynomial of degree nine through the states and rates at the five nodes of a step."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    states: Float[Array, "5 state"]
    rates: Float[Array, "5 state"]
    memory: Memory

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> ClockState:
        del left
        if t1 is not None:
            return jax.tree.map(lambda a, b: a - b, self.evaluate(t1), self.evaluate(t0))
        size = self.t1 - self.t0
        x = (t0 - self.t0) / size
        values, slopes = _hermite(x)
        vector = jnp.matmul(values, self.states, precision="highest")
        return ClockState.unknown(vector + size * jnp.matmul(slopes, self.rates, precision="highest"), self.memory)


def _hermite(x: Float[Array, ""]) -> tuple[Float[Array, " 5"], Float[Array, " 5"]]:
    """The weights of values and slopes at the nodes in the Hermite polynomial through them, at `x` in [0, 1]."""
    others = ~np.eye(len(NODES), dtype=bool)
    apart = np.where(others, np.subtract.outer(NODES, NODES), 1)
    # The slopes of the Lagrange polynomials at their own nodes, and their values.
    slopes = jnp.asarray(np.sum(np.where(others, 1 / apart, 0), axis=1), x.dtype)
    nodes = jnp.asarray(NODES, x.dtype)
    squares = jnp.square(jnp.prod(jnp.where(others, (x - nodes) / jnp.asarray(apart, x.dtype), 1), axis=1))
    return squares * (1 - 2 * slopes * (x - nodes)), squares * (x - nodes)


class StiffPlateauSolver(dfx.AbstractAdaptiveSolver):
    """The exponential Rosenbrock solver in the plateau clock, with `τ` frozen over a step.

    With `τ` at its value at the start, a step in `s` is one in `t`, and the Jacobian is `−τ` times the Hessian, which is
    symmetric; with a `τ` that moves along it would not be. For [`saddlejax.plateau_clock`][], with the step size
    controller `PlateauController(rtol, to_escape=False, largest_growth=3.0, longest_step=math.inf)`.

    **Arguments:**

    - `rtol`: the tolerance of the controller; the error of the Krylov spaces is a hundredth of it, or a tenth at kinks.
    - `krylov_size`: the most vectors in a Krylov space.
    - `at_kinks`: whether it takes the steps of a [`saddlejax.SlidingSolver`][], whose smooth field may jump all the same where
      a unit comes to its kink that was not expected there. The method then has two stages instead of three, and an error is
      measured beside its group instead of the singular values that it perturbs.

    The solver state counts gradients and Hessian-vector products, see `Work`. Derivatives through a solve are not
    available.
    """

    rtol: Float[Array, ""] | float = 1e-2
    krylov_size: int = eqx.field(static=True, default=48)
    at_kinks: bool = eqx.field(static=True, default=False)
    term_structure: ClassVar = dfx.ODETerm
    interpolation_cls: ClassVar[Callable[..., NodeInterpolation]] = NodeInterpolation

    def __check_init__(self) -> None:
        _check.tolerance("rtol", self.rtol)
        _check.whole_number("krylov_size", self.krylov_size)
        if not isinstance(self.at_kinks, bool):
            raise _check.fail("at_kinks", "be True or False", repr(self.at_kinks))

    def order(self, terms: Any) -> int:
        """Four, or three at kinks; the error estimate is that of a method whose order is less by one."""
        del terms
        return 3 if self.at_kinks else 4

    def init(self, terms: Any, t0: Any, t1: Any, y0: ClockState, args: PlateauField) -> Work:
        """No work yet."""
        return Work(jnp.asarray(0), jnp.asarray(0))

    def func(self, terms: Any, t0: Any, y0: ClockState, args: PlateauField) -> ClockState:
        """The vector field."""
        return terms.vf(t0, y0, args)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: ClockState, args: PlateauField, solver_state: Work, made_jump: Any
    ) -> tuple[ClockState, ClockState, dict[str, Any], Work, Any]:
        """One step from `t0` to `t1`."""
        del terms, made_jump
        field, layout, size = args, args.layout, t1 - t0
        before, rate = layout.split(y0.vector), field.rate(y0)
        moving = layout.split(rate)
        here, shapes = before.coordinates, layout.shapes
        tau = moving.time * jnp.exp(field.log_time_unit)
        theta = shapes.join(here.arrays())
        rtol = jnp.asarray(self.rtol, theta.dtype)
        share = jnp.maximum(y0.memory.share, smallest_share(rtol))
        arrays = shapes.split(theta)
        relative = relative_to_leaves(arrays) if self.at_kinks else relative_to_singular_values(arrays, rtol)

        def velocity(theta: Array) -> Array:
            slopes = jax.grad(lambda arrays: field.objective.loss(field.parameters.with_arrays(arrays)))
            return -tau * shapes.join(slopes(shapes.split(theta)))

        def norm(error: Array) -> Array:
            return relative(shapes.split(error)) / share

        stages, share_left = (2, KRYLOV_SHARE_AT_KINKS) if self.at_kinks else (3, KRYLOV_SHARE)
        solver = ExponentialRosenbrock(share_left * rtol, self.krylov_size, lambda _: norm, stages)
        step = solver.increments(velocity, theta, size, INNER_NODES)
        ends = shapes.split(theta + step.end)
        vector = layout.join(before._replace(coordinates=to_coordinates(ends)))
        # Inside the step the units stay as they are, and the clock runs at the pace that it has at the start.
        inner = [here.shift(change) for change in step.inner]
        vectors = jnp.stack([*[layout.join(before._replace(coordinates=at)) for at in inner], vector])
        later = jax.lax.map(field.motion, vectors)
        rate_end = later[-1]
        pairs = zip([y0.vector, *vectors], [rate, *later], strict=True)
        rates = jnp.stack([_frozen(field, *pair, here, moving.time) for pair in pairs])
        states = y0.vector + size * jnp.matmul(jnp.asarray(INTEGRATION, rates.dtype), rates, precision="highest")
        within = jnp.stack([here.joined, *[at.joined for at in inner], here.shift(step.end).joined])
        states = states.at[:, : shapes.size].set(within)
        passed = layout.split(states[-1])
        vector = layout.join(passed._replace(coordinates=to_coordinates(ends)))

        log_decay = decay_seen(y0.memory, step.fastest, log_pace(field, rate))
        growing = step.largest * before.time > GROWING * moving.time
        speed, response = jax.jvp(velocity, (theta + step.end,), (theta + step.end,))
        rests = ~growing & _is_rounding(speed, response, shapes, ROUNDING_AT_KINKS if self.at_kinks else 1.0)
        rests = rests | (layout.split(rate_end).time == 0)
        # A step that ends at rest may be very long, and but for its beginning all of it is at rest.
        moves, n = jnp.where(rests, 0, 1).astype(theta.dtype), shapes.size
        states = states.at[:, :n].set(states[-1, :n] + moves * (states[:, :n] - states[-1, :n]))
        rates = rates.at[:, :n].multiply(moves)
        price, stability = EXPLICIT_AT_KINKS if self.at_kinks else EXPLICIT
        explicit = price * jnp.maximum(size * step.fastest / stability, 1)
        cost = PRODUCT_COST * step.work.products + 2 * len(NODES)
        unsuited = jnp.maximum(y0.memory.unsuited + jnp.where(explicit < WORTH_CHANGING * cost, 1, -1), 0)
        memory = remember(y0.memory, field, vector, rate_end, unsuited, log_decay)
        memory = memory._replace(at_rest=jnp.where(rests, 1, 0).astype(vector.dtype))
        y1 = ClockState(vector, rate_end, memory, jnp.zeros_like(y0.error))
        wrong = eqx.tree_at(lambda y: y.error, jax.tree.map(jnp.zeros_like, y1), relative(shapes.split(step.estimate)))
        work = (step.work.vector_fields + len(NODES) - 1, step.work.products + 1)
        spent = Work(*(past + new for past, new in zip(solver_state, work, strict=True)))
        dense = {"states": states, "rates": rates, "memory": memory}
        return y1, wrong, dense, spent, dfx.RESULTS.successful


def _frozen(
    field: PlateauField, vector: Array, rate: Array, units: Coordinates, time: Float[Array, ""]
) -> Float[Array, " state"]:
    """A rate in fixed units, while the time runs at a given pace."""
    here, moving = field.layout.split(vector), field.layout.split(rate)
    pace = time / jnp.where(moving.time > 0, moving.time, 1)
    velocity = here.coordinates.velocity(moving.coordinates)
    velocity = units.shapes.map(lambda u, v: jnp.exp(u) * v, here.coordinates.log_units - units.log_units, velocity)
    fixed = Coordinates(pace * velocity, jnp.zeros_like(units.log_units), units.shapes)
    return field.layout.join(Parts(fixed, time, moving.loss, pace * moving.energy, pace * moving.drift))


def relative_to_singular_values(
    arrays: tuple[Array, ...], rtol: Float[Array, ""]
) -> Callable[[tuple[Array, ...]], Float[Array, ""]]:
    """An error relative to the part of a group that it perturbs; the largest over the groups.

    With `W = U diag(σ) Vᵀ` it is the norm of `(UᵀEV)_{ij}/√(σ_i σ_j)`: the modes still to be learned live in the small
    singular values, and an error small beside the group but not beside them would change when they are. Singular values
    of which a part `rtol` would be less than half of the rounding of the group are taken for ones that are not. Groups with
    more than two axes are matrices `(shape[0], rest)`; vectors and numbers have one singular value, their norm.
    """
    factors = [_factors(_as_matrix(a), rtol) for a in arrays]

    def norm(error: tuple[Array, ...]) -> Array:
        return jnp.max(jnp.stack([_graded(_as_matrix(e), *f) for e, f in zip(error, factors, strict=True)]))

    return norm


def _as_matrix(array: Array) -> Float[Array, "rows columns"]:
    return array.reshape(array.shape[0] if array.ndim > 1 else -1, -1 if array.ndim > 1 else 1)


def _factors(matrix: Array, rtol: Array) -> tuple[Array, Array, Array]:
    """`U/√σ`, the largest `σ` and `Vᵀ/√σ`."""
    left, sizes, right = jnp.linalg.svd(matrix, full_matrices=False)
    largest, eps = sizes[0], jnp.finfo(matrix.dtype).eps
    least = largest * jnp.maximum(0.5 * eps / rtol, max(matrix.shape) * eps)
    sizes = jnp.maximum(sizes, jnp.where(largest > 0, least, 1))
    return left / jnp.sqrt(sizes), largest, right / jnp.sqrt(sizes)[:, None]


def _graded(error: Array, left: Array, largest: Array, right: Array) -> Array:
    inside = jnp.matmul(jnp.matmul(left.T, error, precision="highest"), right.T, precision="highest")
    return jnp.maximum(safe_norm(inside), safe_norm(error) / jnp.where(largest > 0, largest, 1))


def _is_rounding(velocity: Array, response: Array, shapes: GroupShapes, power: float) -> Bool[Array, ""]:
    """Whether a velocity is no more than what rounding of the parameters, to a power, makes of it by its response to them."""
    eps = jnp.finfo(velocity.dtype).eps ** power
    groups = zip(shapes.split(velocity), shapes.split(response), strict=True)
    return jnp.all(jnp.stack([safe_norm(v) <= ROUNDING * eps * safe_norm(r) for v, r in groups]))
