"""The largest curvature of the loss, which bounds stable learning rates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._numerics import safe_norm
from ..objective import as_problem
from ..parameters import Trainable
from ..tasks.task import Task
from .lanczos import extreme_eigenvalues

KRYLOV_SIZE = 24


def sharpness(
    model: PyTree, task: Task | Callable[[Any], Array], trainable: Trainable | None = None
) -> Float[Array, ""]:
    """The largest eigenvalue `λ` of the Hessian of the loss: gradient descent is stable for learning rates below `2/λ`.

    An estimate from below out of a Krylov space of 24 vectors that starts from the gradient and a fixed perturbation.

    **Arguments:** `model`, `task` (or a function `loss(model) -> scalar`), and `trainable` as for
    [`saddlejax.gradient_flow`][].

    **Raises:** `ValueError` where the model does not fit the task.
    """
    problem = as_problem(model, task, trainable)
    shapes = problem.parameters.shapes
    flat = shapes.join(problem.parameters.arrays)
    slope, product = jax.linearize(jax.grad(lambda joined: problem.loss(shapes.split(joined))), flat)
    size = safe_norm(slope)
    noise = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    start = slope / jnp.where(size > 0, size, 1) + noise / (2 * jnp.linalg.norm(noise))
    return extreme_eigenvalues(product, start, KRYLOV_SIZE)[1]
