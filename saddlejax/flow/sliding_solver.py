"""A solver in the plateau clock that slides along the kinks of activations."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import _check
from .._numerics import safe_norm
from ..curvature.lanczos import KrylovProblem, phi
from ..objective import TaskObjective
from ..parameters import GroupShapes
from .coordinates import to_coordinates
from .exponential import relative_to_leaves
from .field import PlateauField
from .memory import remember
from .sides import PASSES, Sides, sides_at
from .sliding import sliding_after, slopes_of_step
from .sliding_problem import Response
from .solvers import PlateauSolver
from .state import ClockState, Memory
from .stiff_solver import KRYLOV_SHARE_AT_KINKS, StiffPlateauSolver
from .units import Frozen, FrozenObjective, KinkedUnits

RESPONSE_SIZE = 16
"""The most vectors in the Krylov space of the response to slopes."""
LEFT_AT_REST = 1e-8
"""What is left of the gradient, beside its largest norm in the flow, where the smooth field of a step is at rest."""
NEXT_TO_NOTHING = 1e-6
"""What is left of it where rounding leaves no step that lowers the loss."""
ROUNDING_OF_SLOPES = 0.75
"""The power of the rounding of numbers that is the rounding of slopes at kinks."""
LARGEST_GAIN = 4.0
"""The most that a response grows over a step; where it would be more the step is too long."""
MOST_UNITS = 256
"""How many units take part in a step by default."""


class SlidingWork(NamedTuple):
    """What a solve has spent on kinks, and what it has met there.

    - `gradients`: for slopes, at ends of steps, and for the forces of units that slide.
    - `products`: with the Hessian, for how units respond to their slopes.
    - `rows`: Jacobians of a single unit on a single sample.
    - `problems`: box problems, each with all its solutions for units that pass through their kinks.
    - `most`: the most units that would have taken part in one.
    - `repelling`: how often a unit left a kink that had come to repel it, from where the flow is not unique.
    """

    gradients: Int[Array, ""]
    products: Int[Array, ""]
    rows: Int[Array, ""]
    problems: Int[Array, ""]
    most: Int[Array, ""]
    repelling: Int[Array, ""]


class SlidingState(NamedTuple):
    """What the solver remembers from step to step: its inner solver's state, the units, and its work."""

    inner: PyTree
    sides: Sides
    work: SlidingWork


class SlidingInterpolation(dfx.AbstractLocalInterpolation):
    """The states within a step of the solver inside, and the correction at its end in proportion."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    within: dfx.AbstractLocalInterpolation
    correction: Float[Array, " state"]
    memory: Memory

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> ClockState:
        if t1 is not None:
            return jax.tree.map(lambda a, b: a - b, self.evaluate(t1, left=left), self.evaluate(t0, left=left))
        inside = self.within.evaluate(t0, left=left)
        share = jnp.where(self.memory.at_rest > 0, 1, (t0 - self.t0) / (self.t1 - self.t0))
        return ClockState.unknown(inside.vector + share * self.correction, self.memory)


def _interpolate(
    inner: Callable[..., dfx.AbstractLocalInterpolation],
    *,
    t0: Any,
    t1: Any,
    within: PyTree,
    correction: Array,
    memory: Memory,
) -> SlidingInterpolation:
    inside = inner(t0=t0, t1=t1, **within)
    return SlidingInterpolation(t0=t0, t1=t1, within=inside, correction=correction, memory=memory)


class SlidingSolver(dfx.AbstractAdaptiveSolver):
    """A solver for the plateau clock that follows the kinks of activations, with [`saddlejax.plateau_clock`][].

    Over a step all units that may come to a kink have a fixed slope, the mean of what they have over that step, so that
    the field is smooth there. The slopes solve a box problem with the linearised motion of the units; where the step
    ends elsewhere than the linearisation says, they are corrected, which makes the method second order in these slopes,
    and the size of the correction is an error of the step.

    **Arguments:**

    - `solver`: takes the steps of the smooth field: a [`saddlejax.PlateauSolver`][], or a
      [`saddlejax.StiffPlateauSolver`][] with `at_kinks=True`.
    - `most_units`: how many units may take part in a step, but for small problems no more than an eighth of all, or 128;
      they need a row of the size of the parameters each, and a matrix among themselves. Where more come near their kinks,
      those whose gradients jump most do.

    For models on a [`saddlejax.Task`][] in which kinks are known, see [`saddlejax.kinked`][]. Derivatives through a solve
    are not available. Source of the velocity at kinks: A. F. Filippov, Differential Equations with Discontinuous Righthand
    Sides (1988).
    """

    solver: PlateauSolver | StiffPlateauSolver = PlateauSolver(dfx.Bosh3())
    most_units: int = eqx.field(static=True, default=MOST_UNITS)
    term_structure: ClassVar = dfx.ODETerm

    def __check_init__(self) -> None:
        _check.whole_number("most_units", self.most_units)
        if isinstance(self.solver, StiffPlateauSolver) and not self.solver.at_kinks:
            raise _check.fail(
                "solver",
                "be made for steps along kinks",
                "a StiffPlateauSolver for smooth models",
                "Pass it at_kinks=True.",
            )

    @property
    def interpolation_cls(self) -> Callable[..., SlidingInterpolation]:  # type: ignore[override]
        """The states within a step."""
        return partial(_interpolate, self.solver.interpolation_cls)

    def order(self, terms: Any) -> int | None:
        """The order of the solver inside; where units slide it is two."""
        return self.solver.order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: ClockState, args: PlateauField) -> SlidingState:
        """The units that slide at the start, and no work but for finding them."""
        units, shapes = _units(args), args.layout.shapes
        theta = shapes.join(args.layout.split(y0.vector).coordinates.arrays())
        with jax.default_matmul_precision("highest"):
            _, _, sides = sides_at(units, theta, self.most_units)
        zero = jnp.asarray(0)
        work = SlidingWork(zero + 2 * PASSES + 2, zero, zero, zero + PASSES, zero, zero)
        return SlidingState(self.solver.init(terms, t0, t1, y0, args), sides, work)

    def func(self, terms: Any, t0: Any, y0: ClockState, args: PlateauField) -> ClockState:
        """The vector field."""
        return terms.vf(t0, y0, args)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: ClockState,
        args: PlateauField,
        solver_state: SlidingState,
        made_jump: Any,
    ) -> tuple[ClockState, ClockState, dict[str, Any], SlidingState, Any]:
        """One step from `t0` to `t1`."""
        del made_jump
        with jax.default_matmul_precision("highest"):
            return self._step(terms, t0, t1, y0, args, solver_state)

    def _step(
        self, terms: Any, t0: Any, t1: Any, y0: ClockState, field: PlateauField, past: SlidingState
    ) -> tuple[ClockState, ClockState, dict[str, Any], SlidingState, Any]:
        units, layout, shapes = _units(field), field.layout, field.layout.shapes
        here, rate = layout.split(y0.vector).coordinates, layout.split(field.rate(y0))
        theta = shapes.join(here.arrays())
        tau = rate.time * jnp.exp(field.log_time_unit)
        per_clock = shapes.map(lambda u, v: jnp.exp(u) * v, here.log_units, here.velocity(rate.coordinates))
        velocity = per_clock / jnp.where(tau > 0, tau, 1)
        respond, products = self._response(units, theta, past.sides, velocity, (t1 - t0) * tau)
        slopes, dependent, wanted = slopes_of_step(
            units, theta, past.sides, velocity, (t1 - t0) * tau, respond, self.most_units
        )
        frozen, problem, shares, passes = slopes.frozen, slopes.problem, slopes.shares, slopes.passes
        smooth = eqx.tree_at(lambda f: f.objective, field, FrozenObjective(units.objective, frozen))
        y1, error, within, inner, result = self.solver.step(terms, t0, t1, y0, smooth, past.inner, True)

        # Where the units really are at the end, and what other slopes would have made of that.
        after = layout.split(y1.vector)
        reached = shapes.join(after.coordinates.arrays())
        kinks = past.sides.z - units.distances(past.sides.z)
        found = (units.preactivations(reached) - kinks).reshape(-1)[problem.units]
        mean, sliding = problem.solve(shares, found - problem.end(shares))
        force = jnp.matmul((mean - shares) * problem.signal, problem.jacobian, precision="highest")
        change = -problem.size * respond(force)
        vector = layout.join(after._replace(coordinates=to_coordinates(shapes.split(reached + change))))

        which, held = sliding_after(problem, sliding, dependent)
        loss, gradient, signals, z = units.gradient(shapes.join(layout.split(vector).coordinates.arrays()), held)
        moving = field.motion_along(vector, loss, gradient)
        memory = remember(y0.memory, field, vector, moving, y1.memory.unsuited, y1.memory.log_decay)
        log_gradient = field.log_gradient_norm(vector, moving)
        at_rest = _at_rest(memory, y1.memory, log_gradient - memory.log_highest)
        memory = memory._replace(sliding=jnp.sum(which).astype(vector.dtype), at_rest=at_rest)
        new = ClockState(vector, moving, memory, jnp.zeros_like(y1.error))
        # In the coordinates of the end of the inner step, in which the interpolation is.
        shifted = layout.join(after._replace(coordinates=after.coordinates.shift(change)))
        dense = {"within": within, "correction": shifted - y1.vector, "memory": memory}
        of_kinks = _relative(change, theta, reached, shapes)
        error = eqx.tree_at(lambda y: y.error, error, jnp.maximum(error.error, of_kinks))
        slid = past.sides.which.reshape(-1)[problem.units]
        work = past.work
        spent = SlidingWork(
            gradients=work.gradients + passes + 1 + (0 if isinstance(self.solver, PlateauSolver) else 1),
            products=work.products + products,
            rows=work.rows + passes * jnp.sum(problem.valid),
            problems=work.problems + passes + 1,
            most=jnp.maximum(work.most, wanted),
            repelling=work.repelling + jnp.sum(problem.repelling(shares, slid)),
        )
        return (
            new,
            error,
            dense,
            SlidingState(inner, Sides(which, held.which, held.shares, held.forces, signals, z), spent),
            result,
        )

    def _response(
        self, units: KinkedUnits, theta: Array, sides: Sides, velocity: Array, size: Array
    ) -> tuple[Response, Int[Array, ""]]:
        """How parameters respond to a constant force over a step, and the products that this took.

        `φ_1(hA)` for exponential steps, in the Krylov space of the velocity. For all other directions it is one number, from
        the Rayleigh quotient of `A` along the forces of the units that slide.
        """
        if isinstance(self.solver, PlateauSolver):
            return lambda force: force, jnp.asarray(0)
        slopes = jax.grad(lambda theta: units.loss(theta, sides.frozen))
        product = lambda v: -jax.jvp(slopes, (theta,), (v,))[1]  # noqa: E731
        norm = relative_to_leaves(units.parameters.shapes.split(theta))
        found = KrylovProblem(
            product,
            velocity,
            lambda z: size * size * phi(2, size * z),
            lambda error: norm(units.parameters.shapes.split(error)),
            KRYLOV_SHARE_AT_KINKS * jnp.asarray(self.solver.rtol, theta.dtype),
            RESPONSE_SIZE,
        ).space()
        basis = jnp.matmul(found.vectors.T, found.basis)
        # The forces of all units together, with random signs so that none cancel.
        signs = jax.random.rademacher(jax.random.key(0), sides.z.shape, sides.z.dtype)
        weights = signs * jnp.where(sides.which, sides.signals, 0)
        force = jax.grad(lambda theta: jnp.sum(weights * units.preactivations(theta)))(theta)
        others = force - jnp.matmul(jnp.matmul(force, basis.T), basis)
        square = jnp.dot(others, others)
        value = jnp.where(square > 0, jnp.dot(others, product(others)) / jnp.where(square > 0, square, 1), 0)
        gains = jnp.minimum(phi(1, size * jnp.append(found.values, value)), LARGEST_GAIN)
        inside, outside = gains[:-1] - gains[-1], gains[-1]
        return lambda force: outside * force + jnp.matmul(jnp.matmul(force, basis.T) * inside, basis), found.used + 1


def least_motion(
    field: PlateauField, vector: Float[Array, " state"], slides: Bool[Array, "samples units"]
) -> Float[Array, " state"]:
    """The rate of a state along the element of least norm of the Clarke subdifferential.

    At their kinks are the units that slide, and those that come there within the rounding of the time.
    """
    units, here = _units(field), field.layout.split(vector)
    theta = field.layout.shapes.join(here.coordinates.arrays())
    with jax.default_matmul_precision("highest"):
        nothing = jnp.zeros(slides.shape, theta.dtype)
        smooth = Frozen(jnp.zeros_like(slides), nothing, None, nothing)
        _, slopes, _, z = units.gradient(theta, smooth)
        rounding = jnp.finfo(theta.dtype).eps * here.time * jnp.exp(field.log_time_unit)
        arrives = jnp.abs(units.distances(z)) <= rounding * jnp.abs(units.rates(theta, smooth, slopes))
        loss, slopes, _ = sides_at(units, theta, MOST_UNITS, slides | arrives)
        return field.motion_along(vector, loss, slopes)


def _at_rest(after: Memory, smooth: Memory, log_left: Float[Array, ""]) -> Float[Array, ""]:
    """Whether a flow is at rest: by its gradient, by the smooth field of a step, or up to what rounding makes of slopes.

    `log_left` is the logarithm of what is left of the gradient beside its largest norm: the smooth field may be at rest
    where the units are not yet at their kinks.
    """
    of_step = jnp.where(log_left < math.log(LEFT_AT_REST), smooth.at_rest, 0)
    rounding = ROUNDING_OF_SLOPES * math.log(float(jnp.finfo(log_left.dtype).eps))
    return jnp.maximum(jnp.maximum(after.at_rest, of_step), jnp.where(log_left < rounding, 1, 0))


def _units(field: PlateauField) -> KinkedUnits:
    """The units of the model, or an error where there are none to slide along."""
    objective, name = field.objective, type(field.parameters.model).__name__
    if not isinstance(objective, TaskObjective):
        raise _check.fail(
            "task",
            "be a saddlejax.Task where a flow is to slide along kinks",
            "a loss of the model, whose samples are not known",
            "Take saddlejax.PlateauSolver for it.",
        )
    units = KinkedUnits(field.parameters, objective)
    if not units.places():
        raise _check.fail(
            "model",
            "have activations with kinks where a flow is to slide along them",
            f"a {name} in which none are known",
            "Wrap them by saddlejax.kinked, or take saddlejax.PlateauSolver.",
        )
    return units


def _relative(change: Array, before: Array, after: Array, shapes: GroupShapes) -> Float[Array, ""]:
    """The largest of a change relative to its group, which may end at zero."""
    least = jnp.finfo(change.dtype).tiny
    sizes = (
        jnp.maximum(safe_norm(b), safe_norm(a)) for b, a in zip(shapes.split(before), shapes.split(after), strict=True)
    )
    parts = zip(shapes.split(change), sizes, strict=True)
    return jnp.max(jnp.stack([safe_norm(part) / jnp.maximum(size, least) for part, size in parts]))
