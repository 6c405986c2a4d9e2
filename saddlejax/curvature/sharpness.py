"""Curvature of the loss by Hessian-vector products."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ..networks.mlp import AbstractNetwork
from ..tasks.task import Task, task_loss

KRYLOV_SIZE = 24


Product = Callable[[Float[Array, " n"]], Float[Array, " n"]]


def ritz_values(product: Product, start: Float[Array, " n"], size: int) -> Float[Array, " size"]:
    """Approximate eigenvalues of a symmetric matrix in increasing order, from a Krylov space of at most `size` vectors.

    Lanczos with full reorthogonalisation. The ends of the spectrum are approached first and from within; an eigenvalue
    appears once, however often it occurs. Where the space closes early the places left over are NaN, at the end.
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

    length = jnp.linalg.norm(start)
    basis = jnp.zeros((size, start.size), start.dtype).at[0].set(start / jnp.where(length > 0, length, 1))
    basis, images = jax.lax.scan(step, basis, jnp.arange(size))
    projected = jnp.matmul(basis, images.T, precision="highest")
    used = jnp.any(basis != 0, axis=1)
    # The places of vectors that are missing get values above the spectrum, which are then known by their number.
    beyond = 2 * jnp.max(jnp.sum(jnp.abs(projected), axis=1)) + 1
    projected = jnp.where(used[:, None] & used[None, :], projected, jnp.diag(jnp.where(used, 0, beyond)))
    values = jnp.linalg.eigvalsh(0.5 * (projected + projected.T))
    return jnp.where(jnp.arange(size) < jnp.sum(used), values, jnp.nan)


def extreme_eigenvalues(product: Product, start: Float[Array, " n"], size: int) -> tuple[Array, Array]:
    """The lowest and highest eigenvalue of a symmetric matrix, from a Krylov space of the given size.

    Both values lie within the spectrum.
    """
    values = ritz_values(product, start, size)
    return values[0], jnp.nanmax(values)


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
