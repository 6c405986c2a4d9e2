"""One block a layer: Rawal & DeWeese's system of `L` layer scales, and its balanced scalar equation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check
from .._numerics import Numbers
from ..networks.activations import Activation
from ..networks.block_mlp import BlockMLP
from ..objective import task_loss
from ..saddle.origin import origin_matrix
from ..tasks.task import Task

QUADRATURE_NODES = 80
PANELS_PER_UNIT = 4
PANEL_NODES = 8
UNDERFLOW_MARGIN = 1e4  # between the least normal number and the least speed computed

Teacher = Callable[[Array], Array]


def chain(
    scales: Numbers,
    task_or_teacher: Task | Teacher,
    activation: str | Activation,
    width: int,
) -> tuple[BlockMLP, Task]:
    """A wide network of identical neurons, reduced to one unit a layer.

    On the permutation-symmetric submanifold a network of constant width `N` is
    `f(x) = √N u σ(X_{L−1} σ(… σ(a·x/√N)))` with `‖a‖ = X_1`, `‖u‖ = X_L` and the layer norms `X_l` in between. For a
    teacher of one direction and Gaussian inputs only the projection `g ~ N(0, 1)` on that direction counts: the flow
    closes on the `L` numbers `X_l`. The mean over `g` is a Gauss-Hermite quadrature with 80 nodes
    (Rawal & DeWeese, arXiv:2605.01288).

    **Arguments:**

    - `scales`: the `L` layer norms at the start.
    - `task_or_teacher`: the target as a function of `g`; or a [`saddlejax.Task`][], for which `a` and `u` start along
      the top singular vectors of `M = −E[∇c(0, y) xᵀ]`.
    - `activation`: a name or a function.
    - `width`: `N`.

    **Returns:** a network and a task, ready for [`saddlejax.gradient_flow`][] or `saddlejax.scale_layers`.

    **Raises:** `ValueError` for fewer than two scales, and for scales that are not positive or underflow in the task's
    precision.
    """
    _check.whole_number("width", width)
    if np.ndim(scales) != 1 or np.size(scales) < 2:
        raise _check.fail("scales", "hold at least two layer norms", f"of shape {np.shape(scales)}")
    _check.positive_number("scales", scales)
    task = _gaussian_task(task_or_teacher)
    norms = jnp.asarray(scales, dtype=task.x.dtype)
    if _check.is_concrete(norms) and np.any(np.abs(np.asarray(norms)) < jnp.finfo(norms.dtype).tiny):
        raise _check.fail("scales", f"be large enough for {norms.dtype}", scales, "Use double precision.")
    one = jnp.ones((1, 1), norms.dtype)
    directions = [one] * norms.size
    if isinstance(task_or_teacher, Task):
        out, _, into = jnp.linalg.svd(origin_matrix(task), full_matrices=False)
        directions[0], directions[-1] = into[:1], out[:, :1]
    net = BlockMLP(
        weights=tuple(norm * direction for norm, direction in zip(norms, directions, strict=True)),
        labels=((0,) * width,) * (norms.size - 1),
        activation=activation,
    )
    return net, task


def _gaussian_task(task_or_teacher: Task | Teacher) -> Task:
    if isinstance(task_or_teacher, Task):
        return task_or_teacher
    if not callable(task_or_teacher):
        raise _check.fail("task_or_teacher", "be a Task, or a function of the projected input g", repr(task_or_teacher))
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
    g = jnp.asarray(nodes)[:, None]
    return Task(g, task_or_teacher(g), sample_weights=weights / weights.sum())


def balanced_log_times(
    norms: Numbers,
    teacher: Teacher,
    activation: str | Activation,
    width: int,
    depth: int,
) -> Float[Array, " rows"]:
    """When the balanced chain, `X_1 = … = X_L = y`, reaches each of the norms `y`, starting from the first of them.

    The scalar equation is `dy/dt = −(1/L) d𝓛(y, …, y)/dy`, to leading order `dy/dt = K y^{L−1}` with `K = α^{L−1}` times
    the overlap of teacher and inputs. In the plateau clock, `s = log y` and `dt/ds = y/(dy/dt)`: a quadrature, here
    Gauss-Legendre on panels of a quarter in `s` (Rawal & DeWeese, arXiv:2605.01288).

    **Arguments:** `norms`, increasing; `teacher`, `activation` and `width` as for [`saddlejax.manifold.chain`][];
    `depth`, `L`.

    **Returns:** `log t`, `−inf` for the first; NaN from where `y` stops growing on the way.

    **Raises:** `ValueError` for fewer than two norms, for norms that do not increase, for norms so small that the speed
    underflows in the working precision, and under `jit`, `vmap` or `grad`: it runs on the host.
    """
    _check.not_traced("manifold.balanced_log_times", norms=norms)
    _check.whole_number("depth", depth, least=2)
    _check.positive_number("norms", norms)
    values = np.asarray(norms, dtype=float)
    if values.ndim != 1 or values.size < 2 or not np.all(np.diff(values) > 0):
        raise _check.fail("norms", "be at least two increasing numbers", norms)
    net, task = chain([1.0] * depth, teacher, activation, width)
    least = float(jnp.finfo(task.x.dtype).tiny) * UNDERFLOW_MARGIN
    if (depth - 1) * np.log(values[0]) < np.log(least):
        raise _check.fail(
            "norms",
            f"be above {least ** (1 / (depth - 1)):.1e}, since dy/dt = K y^{depth - 1} underflows in {task.x.dtype} below",
            norms,
            "There saddlejax.law.log_escape_time gives the time to leading order, which is all of it.",
        )

    def loss(y: Array) -> Array:
        return task_loss(net.with_weights([y * w for w in net.weights]), task)

    ends = np.log(values)
    panels = int(np.ceil(PANELS_PER_UNIT * np.max(np.diff(ends))))
    nodes, node_weights = np.polynomial.legendre.leggauss(PANEL_NODES)
    # Per interval between two norms: panels × nodes points in s.
    shares = (np.arange(panels)[:, None] + 0.5 + 0.5 * nodes).ravel() / panels
    points = ends[:-1, None] + np.diff(ends)[:, None] * shares
    y = jnp.exp(jnp.asarray(points))
    speed = -jax.vmap(jax.vmap(jax.grad(loss)))(y) / depth
    log_rate = jnp.log(jnp.where(speed > 0, y / speed, jnp.nan))
    panel_weights = jnp.asarray(np.tile(node_weights, panels) / (2 * panels))
    spans = jax.nn.logsumexp(log_rate, axis=1, b=panel_weights) + jnp.log(jnp.diff(jnp.asarray(ends)))
    sums = jax.lax.associative_scan(jnp.logaddexp, spans)
    return jnp.concatenate([jnp.full(1, -jnp.inf), sums])
