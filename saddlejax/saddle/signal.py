"""How strong the linear signal is that a task gives to a network near the origin."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _check
from ..objective import output_slopes
from ..tasks.task import Task


def signal_strength(task: Task) -> Float[Array, ""]:
    """`Γ = ‖E[y xᵀ]‖`, the spectral norm of the covariance of targets and inputs, which sets the pace of an escape.

    For other losses than squared error it is that of `M = −E[∇c(0, y) xᵀ]`, the slopes at outputs of zero; samples that
    are no vectors are flattened. A network of `r` small layers escapes after a time proportional to `1/Γ`,
    `τ ≍ Γ^{−1} ε^{−(r−2)}` (Rawal & DeWeese, arXiv:2605.01288v3). In this norm `α^{L−1} Γ` is the optimal escape speed of
    a smooth activation of gain `α`, [`saddlejax.escape_direction`][]. It coincides with the Frobenius norm where there is
    one output. Where it vanishes, as for parities, the origin is a saddle of another order.

    **Raises:** `ValueError` for what is no task.

    **Example:**

    ```python
    sj.signal_strength(sj.tasks.linear_teacher([4.0, 2.0], in_size=6))  # 4.0
    ```
    """
    if not isinstance(task, Task):
        raise _check.fail("task", "be a saddlejax.Task", type(task).__name__)
    inputs = task.x.reshape(task.samples, -1)
    return jnp.linalg.norm(jnp.matmul(output_slopes(task).T, inputs, precision="highest"), ord=2)
