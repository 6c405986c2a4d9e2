"""From a point near a saddle to the saddle itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from .. import _check
from .._host.interrupt import safe_to_interrupt
from ..networks.mlp import AbstractNetwork, safe_norm
from ..tasks.task import Task, check_fits, match_precision, task_loss
from .krylov import KrylovProblem
from .sharpness import extreme_eigenvalues

KRYLOV_SIZE = 48
RELAXED, TIGHTENED = 0.1, 10.0
SOLVED = 1e-3
CONVERGED = 1e-3
ROUNDING = 100


class StationaryPoint(eqx.Module):
    """A point near which `∇𝓛` vanishes.

    - `net`: the network there.
    - `loss`, `gradient_norm`: `𝓛` and what is left of `‖∇𝓛‖`; `converged`: whether that is less than a thousandth of what
      it was where the search began, or within a hundred times its rounding. Where not, there is no stationary point that
      the search could reach.
    - `distance`: how far it is from where the search began, `‖θ − θ_0‖`.
    - `lowest_eigenvalue`, `highest_eigenvalue`: of the Hessian, from a Krylov space of 48 vectors, so that the true ones
      lie further out if anywhere. A strict saddle has a negative one.
    - `iterations`, `hessian_vector_products`: work spent.
    """

    net: AbstractNetwork
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
def nearby_stationary_point(net: AbstractNetwork, task: Task, *, max_iterations: int = 60) -> StationaryPoint:
    """The zero of `∇𝓛` near a network, whatever the signs of the curvature there.

    Levenberg-Marquardt steps `−(H² + μ)^{−1} H ∇𝓛` in Krylov spaces of the Hessian `H` make `‖∇𝓛‖` smaller, never the
    loss, so that saddles attract as minima do. Where the Hessian is singular, as at the saddles of a linear network
    deeper than two, convergence is linear. It ends after `max_iterations`, or where `‖∇𝓛‖` is down to rounding; how far it came
    is in the result.

    **Arguments:** `net`, `task`; `max_iterations`, of at most 48 Hessian-vector products each.

    **Raises:** `ValueError` where the network does not fit the task.
    """
    check_fits(net, task)
    _check.whole_number("max_iterations", max_iterations)
    net, task = match_precision(net, task)
    return _polish(net, task, jnp.asarray(max_iterations))


@eqx.filter_jit
def _polish(net: AbstractNetwork, task: Task, max_iterations: Array) -> StationaryPoint:
    start, unravel = ravel_pytree(net.weights)
    slope = jax.grad(lambda flat: task_loss(net.with_weights(unravel(flat)), task))
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
    end = net.with_weights(unravel(point))
    return StationaryPoint(
        net=end,
        loss=task_loss(end, task),
        gradient_norm=safe_norm(gradient),
        converged=safe_norm(gradient) <= jnp.maximum(CONVERGED * first, ROUNDING * rounding(point, curvature)),
        distance=safe_norm(point - start),
        lowest_eigenvalue=lowest,
        highest_eigenvalue=highest,
        iterations=iterations,
        hessian_vector_products=products + KRYLOV_SIZE,
    )
