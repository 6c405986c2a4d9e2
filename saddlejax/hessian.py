"""Curvature of the loss by Hessian-vector products."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .networks import AbstractNetwork
from .tasks.task import Task, task_loss

KRYLOV_SIZE = 24


def extreme_eigenvalues(
    product: Callable[[Float[Array, " n"]], Float[Array, " n"]], start: Float[Array, " n"], size: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The lowest and highest eigenvalue of a symmetric matrix, from a Krylov space of the given size.

    Lanczos with full reorthogonalisation; both values lie within the spectrum, the highest from below.
    """
    size = min(size, start.size)

    def step(basis: Array, k: Array) -> tuple[Array, Array]:
        image = product(basis[k])
        rest = image
        for _ in range(2):
            rest = rest - jnp.matmul(jnp.matmul(basis, rest, precision="highest"), basis, precision="highest")
        norm = jnp.linalg.norm(rest)
        # What is left of a closed space is rounding.
        more = norm > 1e3 * jnp.finfo(rest.dtype).eps * jnp.linalg.norm(image)
        rest = jnp.where(more, rest / jnp.where(more, norm, 1), 0)
        return basis.at[k + 1].set(rest, mode="drop"), image

    basis = jnp.zeros((size, start.size), start.dtype).at[0].set(start / jnp.linalg.norm(start))
    basis, images = jax.lax.scan(step, basis, jnp.arange(size))
    # A space that closes early is padded with zero vectors, whose eigenvalue zero must not be mistaken for one.
    projected = jnp.matmul(basis, images.T, precision="highest")
    used = jnp.any(basis != 0, axis=1)
    projected = jnp.where(used[:, None] & used[None, :], projected, jnp.diag(jnp.where(used, 0, projected[0, 0])))
    values = jnp.linalg.eigvalsh(0.5 * (projected + projected.T))
    return values[0], values[-1]


def sharpness(net: AbstractNetwork, task: Task) -> Float[Array, ""]:
    """The largest eigenvalue `λ` of the Hessian of the loss: gradient descent is stable for learning rates below `2/λ`.

    An estimate from below out of a Krylov space of 24 vectors that starts from the gradient and a fixed perturbation.
    """
    flat, unravel = ravel_pytree(net.weights)
    gradient = jax.grad(lambda w: task_loss(net.with_weights(unravel(w)), task))
    slope, product = jax.linearize(gradient, flat)
    size = jnp.linalg.norm(slope)
    noise = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    start = slope / jnp.where(size > 0, size, 1) + noise / jnp.linalg.norm(noise)
    return extreme_eigenvalues(product, start, KRYLOV_SIZE)[1]
