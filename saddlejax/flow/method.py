"""How one step of a flow is taken: by an explicit solver, or by the exponential one for stiff flows."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..gradient import gradient
from ..networks.mlp import Weights, safe_norm
from ..tasks.task import task_loss
from .clock import PlateauField
from .coordinates import to_coordinates
from .explicit_step import explicit_step
from .exponential import ExponentialInterpolation, ExponentialRosenbrock
from .state import FlowState

# Gauss-Lobatto quadrature with five nodes on [0, 1], exact for polynomials of degree seven.
INNER_NODES = (0.5 - (3 / 28) ** 0.5, 0.5, 0.5 + (3 / 28) ** 0.5)
ROUNDING, GROWING = 10, 0.01
KRYLOV_SHARE = 0.01
END_WEIGHT, INNER_WEIGHTS = 1 / 20, (49 / 180, 16 / 45, 49 / 180)


class Attempt(NamedTuple):
    """A step that may yet be rejected.

    - `after`, `rate`: the state it leads to and the rate there.
    - `error`: its error relative to every layer, the largest; `time_error`: that of the time, relative to the time.
    - `dense`: what the interpolation needs, where it was asked for.
    - `gradients`, `products`: gradients and Hessian-vector products spent.
    - `settled`: whether nothing but rounding moves the weights any more.
    """

    after: FlowState
    rate: FlowState
    error: Float[Array, ""]
    time_error: Float[Array, ""]
    dense: PyTree
    gradients: Int[Array, ""]
    products: Int[Array, ""]
    settled: Bool[Array, ""]


class Recalled(NamedTuple):
    """The states within the last step, with the gradients and Hessian-vector products it took to see them again."""

    interpolation: dfx.AbstractLocalInterpolation
    gradients: Int[Array, ""]
    products: Int[Array, ""]


class AbstractMethod(eqx.Module):
    """A way to take a step of size `size` in the plateau clock `s`."""

    largest_growth: eqx.AbstractClassVar[float]
    """The most by which a step may be longer than the one before."""

    longest_step: eqx.AbstractClassVar[float]
    """The longest step beyond the first escape, where parts of a layer that decay beside the others must not be lost."""

    differentiable: eqx.AbstractClassVar[bool]
    """Whether derivatives go through a step."""

    knows_rest: eqx.AbstractClassVar[bool]
    """Whether an attempt tells where nothing but rounding moves the weights any more."""

    end_tolerance: eqx.AbstractClassVar[float]
    """How well the end is located within its step, in units of the tolerance."""

    @abc.abstractmethod
    def order(self) -> int:
        """The power of the step size that the error of a step goes with."""

    @abc.abstractmethod
    def attempt(
        self, field: PlateauField, state: FlowState, rate: FlowState, size: Array, share: Array, dense: bool
    ) -> Attempt:
        """A step from a state whose rate is known; the states within it are wanted where `dense`.

        `share` is the part of the weights that the error shall be small beside, one unless they nearly cancel.
        """

    @abc.abstractmethod
    def interpolation(self, size: Array, dense: PyTree) -> dfx.AbstractLocalInterpolation:
        """The states within a step of the given size, a function of `s` counted from its start."""

    @abc.abstractmethod
    def remember(self, attempt: Attempt, state: FlowState, rate: FlowState) -> PyTree:
        """What to carry from step to step so that `recall` can look into the last one."""

    @abc.abstractmethod
    def recall(self, field: PlateauField, size: Array, memory: PyTree) -> Recalled:
        """The states within the step that is remembered."""

    @abc.abstractmethod
    def describe(self) -> str:
        """The method in words."""


class Passed(NamedTuple):
    """What an explicit solver interpolates a step from: the states at its ends and the moves of its stages."""

    before: FlowState
    after: FlowState
    moves: Float[Array, "stages state"]


class Explicit(AbstractMethod):
    """An explicit Runge-Kutta solver of diffrax whose last stage is the first of the next step."""

    solver: dfx.AbstractERK
    largest_growth: ClassVar[float] = 1.5
    longest_step: ClassVar[float] = 0.5
    knows_rest: ClassVar[bool] = False
    end_tolerance: ClassVar[float] = 1e-2
    differentiable: ClassVar[bool] = True

    def order(self) -> int:
        order = self.solver.order(dfx.ODETerm(lambda t, y, args: y))
        assert order is not None
        return order

    def attempt(
        self, field: PlateauField, state: FlowState, rate: FlowState, size: Array, share: Array, dense: bool
    ) -> Attempt:
        del dense
        step = explicit_step(field.net, field, self.solver, state, rate, size)
        count = jnp.asarray(len(step.moves) - 1)
        passed = Passed(state, step.after, step.moves)
        none, unsettled = jnp.asarray(0), jnp.asarray(False)
        return Attempt(step.after, step.rate, step.error / share, step.time_error, passed, count, none, unsettled)

    def interpolation(self, size: Array, dense: PyTree) -> dfx.AbstractLocalInterpolation:
        moves = FlowState(dense.moves, dense.before.shapes)
        return self.solver.interpolation_cls(t0=jnp.zeros_like(size), t1=size, y0=dense.before, y1=dense.after, k=moves)

    def remember(self, attempt: Attempt, state: FlowState, rate: FlowState) -> PyTree:
        return attempt.dense

    def recall(self, field: PlateauField, size: Array, memory: PyTree) -> Recalled:
        return Recalled(self.interpolation(size, memory), jnp.asarray(0), jnp.asarray(0))

    def describe(self) -> str:
        return type(self.solver).__name__


def relative_to_singular_values(weights: Weights, rtol: Float[Array, ""]) -> Callable[[Weights], Float[Array, ""]]:
    """An error relative to the part of a layer that it perturbs; the largest over the layers.

    With `W = U diag(σ) Vᵀ` it is the norm of `(UᵀEV)_{ij}/√(σ_i σ_j)`: the modes still to be learned live in the small
    singular values, and an error small beside the layer but not beside them would change when they are. Singular values
    of which a part `rtol` would be less than half of the rounding of the layer are taken for ones that are not.
    """
    layers = [_factors(w, rtol) for w in weights]

    def norm(error: Weights) -> Array:
        return jnp.max(jnp.stack([_graded(e, *factors) for e, factors in zip(error, layers, strict=True)]))

    return norm


def _factors(weights: Array, rtol: Array) -> tuple[Array, Array, Array]:
    """`U/√σ`, the largest `σ` and `Vᵀ/√σ`."""
    left, sizes, right = jnp.linalg.svd(weights, full_matrices=False)
    largest, eps = sizes[0], jnp.finfo(weights.dtype).eps
    least = largest * jnp.maximum(0.5 * eps / rtol, max(weights.shape) * eps)
    sizes = jnp.maximum(sizes, jnp.where(largest > 0, least, 1))
    return left / jnp.sqrt(sizes), largest, right / jnp.sqrt(sizes)[:, None]


def _graded(error: Array, left: Array, largest: Array, right: Array) -> Array:
    inside = jnp.matmul(jnp.matmul(left.T, error, precision="highest"), right.T, precision="highest")
    return jnp.maximum(safe_norm(inside), safe_norm(error) / jnp.where(largest > 0, largest, 1))


def _is_rounding(velocity: Weights, response: Weights) -> Bool[Array, ""]:
    """Whether a velocity is no more than what rounding of the weights makes of it, by its response to them."""
    eps = jnp.finfo(velocity[0].dtype).eps
    layers = zip(velocity, response, strict=True)
    return jnp.all(jnp.stack([safe_norm(v) <= ROUNDING * eps * safe_norm(r) for v, r in layers]))


class Exponential(AbstractMethod):
    """The exponential Rosenbrock solver, with `τ` frozen over a step.

    With `τ` at its value at the start, a step in `s` is one in `t`, and the Jacobian is `−τ` times the Hessian, which is
    symmetric; with a `τ` that moves along it would not be.
    """

    rtol: Float[Array, ""]
    krylov_size: int = eqx.field(static=True)
    conserves_imbalance: bool = eqx.field(static=True)
    largest_growth: ClassVar[float] = 3.0
    longest_step: ClassVar[float] = math.inf
    knows_rest: ClassVar[bool] = True
    end_tolerance: ClassVar[float] = 1e-4
    differentiable: ClassVar[bool] = False

    def order(self) -> int:
        return 4

    def attempt(
        self, field: PlateauField, state: FlowState, rate: FlowState, size: Array, share: Array, dense: bool
    ) -> Attempt:
        tau = rate.time * jnp.exp(field.log_time_unit)
        weights = field.state_net(state).weights

        def velocity(weights: Weights) -> Weights:
            slopes = jax.grad(lambda w: task_loss(field.net.with_weights(w), field.task))(weights)
            return tuple(-tau * slope for slope in slopes)

        graded = relative_to_singular_values(weights, self.rtol)

        def norm(error: Weights) -> Array:
            return graded(error) / share

        solver = ExponentialRosenbrock(KRYLOV_SHARE * self.rtol, self.krylov_size, lambda _: norm)
        fractions = () if self.conserves_imbalance else INNER_NODES
        flat, unravel = ravel_pytree(weights)
        step = solver.increments(velocity, weights, size, fractions, keep=dense)
        new = unravel(flat + step.end)
        here, time = to_coordinates(new), state.time + rate.time * size
        after = FlowState.of(here, time, state.imbalance_drift, state.loss_integral)
        new_rate = field.rate(after)
        # Whether a direction grows on the scale of the time passed: a saddle, then, that is still to be left.
        growing = step.largest * state.time > GROWING * rate.time
        # The rates in time at both ends, in units of the τ of this step.
        drifts = (
            rate.imbalance_drift,
            new_rate.imbalance_drift * (rate.time / jnp.where(new_rate.time > 0, new_rate.time, 1)),
        )
        if not self.conserves_imbalance:
            rates = [self._drift(field, tau, unravel(flat + inner)) for inner in step.inner]
            gained = END_WEIGHT * (drifts[0] + drifts[1])
            gained = gained + sum(w * r for w, r in zip(INNER_WEIGHTS, rates, strict=True))
            after = FlowState.of(here, time, state.imbalance_drift + size * gained, state.loss_integral)
        within = {"y0": weights, "spaces": step.spaces}
        return Attempt(
            after,
            new_rate,
            norm(unravel(step.estimate)),
            jnp.zeros_like(size),
            {"step": within, "state": state, "rate": rate.time, "drifts": (*drifts, after.imbalance_drift)}
            if dense
            else None,
            step.work.vector_fields + 2 + len(fractions),
            step.work.products + 1,
            ~growing & _is_rounding(*jax.jvp(velocity, (new,), (new,))),
        )

    def _drift(self, field: PlateauField, tau: Array, weights: Weights) -> Array:
        rates = gradient(field.net.with_weights(weights), field.task).neuron_rates
        return tau * jnp.stack([jnp.sum(rate) for rate in rates])

    def interpolation(self, size: Array, dense: PyTree) -> dfx.AbstractLocalInterpolation:
        return StepInterpolation(t0=jnp.zeros_like(size), t1=size, **dense)

    def remember(self, attempt: Attempt, state: FlowState, rate: FlowState) -> PyTree:
        # The Krylov spaces are large and nearly never looked at: the last step is rather taken once more.
        return state, rate

    def recall(self, field: PlateauField, size: Array, memory: PyTree) -> Recalled:
        state, rate = memory
        again = self.attempt(field, state, rate, size, jnp.ones_like(size), dense=True)
        return Recalled(self.interpolation(size, again.dense), again.gradients, again.products)

    def describe(self) -> str:
        return f"exponential Rosenbrock with up to {self.krylov_size} Lanczos vectors"


class StepInterpolation(dfx.AbstractLocalInterpolation):
    """The states within a step of the exponential solver; the drift of the imbalance as a cubic polynomial."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    step: dict[str, Any]
    state: FlowState
    rate: Float[Array, ""]
    drifts: tuple[Array, Array, Array]

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> FlowState:
        del left
        if t1 is not None:
            return jax.tree.map(lambda a, b: a - b, self.evaluate(t1), self.evaluate(t0))
        size, passed = self.t1 - self.t0, t0 - self.t0
        weights = ExponentialInterpolation(jnp.zeros_like(size), size, **self.step).evaluate(passed)
        first, last, end = self.drifts
        x = passed / size
        gained = end - self.state.imbalance_drift
        drift = x**2 * (3 - 2 * x) * gained + size * x * (1 - x) * ((1 - x) * first - x * last)
        return FlowState.of(
            to_coordinates(weights),
            self.state.time + self.rate * passed,
            self.state.imbalance_drift + drift,
            self.state.loss_integral,
        )
