"""From a point near a saddle to the saddle itself."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._numerics import safe_norm
from ..objective import Problem, as_problem
from ..parameters import Trainable
from ..tasks.task import Task
from .lanczos import KrylovProblem, extreme_eigenvalues

KRYLOV_SIZE = 48
RELAXED, TIGHTENED = 0.1, 10.0
SOLVED = 1e-3
CONVERGED = 1e-3
ROUNDING = 100


class StationaryPoint(eqx.Module):
    """A point near which `∇𝓛` vanishes.

    - `net`: the model there.
    - `loss`, `gradient_norm`: `𝓛` and what is left of `‖∇𝓛‖`; `converged`: whether that is less than a thousandth of what
      it was where the search began, or within a hundred times its rounding. Where not, there is no stationary point that
      the search could reach.
    - `distance`: how far it is from where the search began, `‖θ − θ_0‖`.
    - `lowest_eigenvalue`, `highest_eigenvalue`: of the Hessian, from a Krylov space of 48 vectors, so that the true ones
      lie further out if anywhere. A strict saddle has a negative one.
    - `iterations`, `hessian_vector_products`: work spent.
    """

    net: PyTree
    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    converged: Bool[Array, ""]
    distance: Float[Array, ""]
    lowest_eigenvalue: Float[Array, ""]
    highest_eigenvalue: Float[Array, ""]
    iterations: Int[Array, ""]
    hessian_vector_products: Int[Array, ""]

    def __str__(self) -> str:
        found = "stationary point" if self.converged else "no stationary point reached: best"
        return (
            f"{found} at distance {float(self.distance):.2e}, loss {float(self.loss):.8g}, ‖∇L‖ "
            f"{float(self.gradient_norm):.1e}, Hessian from {float(self.lowest_eigenvalue):.4g} to "
            f"{float(self.highest_eigenvalue):.4g}"
        )


@safe_to_interrupt
def nearby_stationary_point(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    trainable: Trainable | None = None,
    *,
    max_iterations: int = 60,
) -> StationaryPoint:
    """The zero of `∇𝓛` near a model, whatever the signs of the curvature there.

    Levenberg-Marquardt steps `−(H² + μ)^{−1} H ∇𝓛` in Krylov spaces of the Hessian `H` make `‖∇𝓛‖` smaller, never the
    loss, so that saddles attract as minima do. Where the Hessian is singular, as at the saddles of a linear network
    deeper than two, convergence is linear. It ends after `max_iterations`, or where `‖∇𝓛‖` is down to rounding; how far it came
    is in the result.

    **Arguments:** `model`, `task` (or a function `loss(model) -> scalar`) and `trainable` as for
    [`saddlejax.gradient_flow`][]; `max_iterations`, of at most 48 Hessian-vector products each.

    **Raises:** `ValueError` where the model does not fit the task.
    """
    _check.whole_number("max_iterations", max_iterations)
    return _polish(as_problem(model, task, trainable), jnp.asarray(max_iterations))


@eqx.filter_jit
def _polish(problem: Problem, max_iterations: Array) -> StationaryPoint:
    shapes = problem.parameters.shapes
    start = shapes.join(problem.parameters.arrays)
    slope = jax.grad(lambda joined: problem.loss(shapes.split(joined)))
    first = safe_norm(slope(start))

    def rounding(point: Array, curvature: Array) -> Array:
        """That of the gradient is that of the weights, seen through the Hessian."""
        return jnp.finfo(start.dtype).eps * jnp.where(jnp.isfinite(curvature), curvature * safe_norm(point), 0)

    def unfinished(carry: tuple) -> Array:
        point, gradient, damping, curvature, iterations, _ = carry
        stuck = damping > jnp.square(curvature)
        return (safe_norm(gradient) > rounding(point, curvature)) & ~stuck & (iterations < max_iterations)

    def improve(carry: tuple) -> tuple:
        point, gradient, damping, _, iterations, products = carry
        _, product = jax.linearize(slope, point)
        space = KrylovProblem(
            product,
            gradient,
            lambda z: 1 / (jnp.square(z) + damping),
            safe_norm,
            SOLVED * safe_norm(gradient) / jnp.sqrt(damping),
            KRYLOV_SIZE,
        ).space()
        trial = point - space.apply(lambda z: z / (jnp.square(z) + damping))[0]
        there = slope(trial)
        better = safe_norm(there) < safe_norm(gradient)
        return (
            jnp.where(better, trial, point),
            jnp.where(better, there, gradient),
            damping * jnp.where(better, RELAXED, TIGHTENED),
            jnp.max(jnp.abs(space.values)),
            iterations + 1,
            products + space.used,
        )

    # A step is at first about as long as the weights where the curvature is small.
    size = safe_norm(start)
    damping = jnp.square(first / jnp.where(size > 0, size, 1))
    unknown = jnp.full_like(damping, jnp.inf)
    begin = (start, slope(start), damping, unknown, jnp.asarray(0), jnp.asarray(0))
    point, gradient, _, _, iterations, products = jax.lax.while_loop(unfinished, improve, begin)
    _, product = jax.linearize(slope, point)
    noise = jax.random.normal(jax.random.key(0), point.shape, point.dtype)
    lowest, highest = extreme_eigenvalues(product, noise, KRYLOV_SIZE)
    curvature = jnp.maximum(jnp.abs(lowest), jnp.abs(highest))  # along the gradient it may be much smaller
    end = shapes.split(point)
    return StationaryPoint(
        net=problem.parameters.with_arrays(end),
        loss=problem.loss(end),
        gradient_norm=safe_norm(gradient),
        converged=safe_norm(gradient) <= jnp.maximum(CONVERGED * first, ROUNDING * rounding(point, curvature)),
        distance=safe_norm(point - start),
        lowest_eigenvalue=lowest,
        highest_eigenvalue=highest,
        iterations=iterations,
        hessian_vector_products=products + KRYLOV_SIZE,
    )
