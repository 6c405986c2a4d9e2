"""The main job: escape times of a real problem over activations, bottlenecks, scales and seeds."""

import threading
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check
from .._host.threads import side_by_side
from ..curvature.sharpness import sharpness
from ..flow import Flow, Save, Status, gradient_flow
from ..networks.activations import Activation, resolve_activation
from ..networks.mlp import MLP
from ..tasks.task import Task

if TYPE_CHECKING:
    import xarray as xr

MEASURES = {
    "log_escape_time": "natural logarithm of the escape time, in units of dθ/dt = −∇𝓛",
    "exponent": "local exponent −d log τ / d log ε, by differentiating the flow",
    "gradient_evaluations": "gradients spent on the flow",
    "hessian_vector_products": "Hessian-vector products spent on the flow",
    "log_descent_steps": "natural logarithm of the steps of gradient descent at learning rate 2/λ at the escape",
    "loss_drop": "share of the initial loss lost at the escape",
    "imbalance_error": "largest relative violation of the imbalance identity: the numerical error",
}

NOT_COMPUTED = "not computed"


def escape_scan(
    task: Task,
    *,
    width: int = 24,
    depth: int = 4,
    activation: Sequence[str | Activation] = ("tanh", "relu"),
    bottleneck: Sequence[int] = (2, 3, 4),
    scale: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    seed: Sequence[int] = (0, 1, 2),
    on_lane: "Callable[[xr.Dataset], object]" = lambda results: None,
) -> "xr.Dataset":
    """Escape times, and their local exponents, of He-normal networks with a bottleneck of small layers.

    Each network has `depth` weight matrices and hidden layers of one `width`; the first `r` layers (`bottleneck`) are
    multiplied by the init scale `ε`. The escape is the steepest point of the first descent. One compilation serves
    all scales, bottlenecks and seeds of an activation; lanes run side by side, one a core. Runs on the host: not under
    `jax.jit`, `jax.vmap` or `jax.grad`.

    **Arguments:** `task`; the grid; `on_lane`, called before the first network and after each one with the results so
    far, where the `status` of networks yet to compute is "not computed": for a progress bar, or to keep them.

    **Returns:** a dataset with dimensions `activation`, `bottleneck`, `scale`, `seed`; variables as in
    `MEASURES` (`from saddlejax.sweeps.scan import MEASURES`), and `status` in words. Numbers of networks that did not escape are NaN.

    **Raises:** `ValueError` for an empty grid, bottlenecks beyond the depth, scales that are not positive,
    traced arguments.
    """
    _check.not_traced("escape_scan", task=task, scale=scale, seed=seed)
    _check.whole_number("width", width)
    _check.whole_number("depth", depth, least=2)
    for name, values in (("activation", activation), ("bottleneck", bottleneck), ("scale", scale), ("seed", seed)):
        if isinstance(values, str) or len(values) == 0:
            raise _check.fail(name, "be a list of at least one value", repr(values))
    for layers in bottleneck:
        _check.whole_number("bottleneck", layers)
        if layers > depth:
            raise _check.fail("bottleneck", f"be at most the depth, {depth}", layers)
    _check.positive_number("scale", scale)
    functions = [resolve_activation(name) for name in activation]

    sizes = (task.in_size, *[width] * (depth - 1), task.out_size)
    grid = list(product(range(len(functions)), range(len(bottleneck)), range(len(scale)), range(len(seed))))
    shape = (len(functions), len(bottleneck), len(scale), len(seed))
    measures = {name: np.full(shape, np.nan) for name in MEASURES}
    status = np.full(shape, NOT_COMPUTED, dtype=object)
    one_at_a_time = threading.Lock()

    names = [name if isinstance(name, str) else getattr(name, "__name__", str(name)) for name in activation]
    dims = ("activation", "bottleneck", "scale", "seed")
    coordinates = dict(zip(dims, (names, list(bottleneck), list(scale), list(seed)), strict=True))
    import xarray as xr  # here, since it takes long

    def results() -> xr.Dataset:
        data = {name: (dims, measures[name].copy(), {"long_name": meaning}) for name, meaning in MEASURES.items()}
        return xr.Dataset(
            {**data, "status": (dims, status.astype(str))},
            coords={**coordinates, "depth": depth, "width": width},
            attrs={"task": str(task), "escape": "steepest point of the first descent", "jax": jax.__version__},
        )

    def lane(index: tuple[int, int, int, int]) -> None:
        a, r, e, k = index
        mask = jnp.asarray(np.arange(depth) < bottleneck[r], task.x.dtype)
        log_scale = jnp.log(jnp.asarray(scale[e], task.x.dtype))
        measured, outcome = _measure(task, sizes, functions[a], jax.random.key(seed[k]), log_scale, mask)
        numbers = {name: float(measured[name]) for name in MEASURES}
        with one_at_a_time:
            for name in MEASURES:
                measures[name][index] = numbers[name]
            status[index] = Status[outcome]
            on_lane(results())

    on_lane(results())
    # Activations take turns, so that two of them compile side by side.
    order = sorted(grid, key=lambda index: (index[1:], index[0]))
    side_by_side(lane, order)

    return results()


@eqx.filter_jit
def _measure(
    task: Task, sizes: tuple[int, ...], activation: Activation, key: Array, log_scale: Float[Array, ""], mask: Array
) -> tuple[dict[str, Array], Status]:
    net = MLP(sizes, activation, key=key, dtype=task.x.dtype)

    def escape(log_scale: Array) -> tuple[Array, Flow]:
        scaled = net.with_weights([w * jnp.exp(log_scale * m) for w, m in zip(net.weights, mask, strict=True)])
        flow = gradient_flow(scaled, task, save=Save(steps=False, singular_values=False))
        return flow.log_escape_time, flow

    log_time, slope, flow = jax.jvp(escape, (log_scale,), (jnp.ones_like(log_scale),), has_aux=True)
    escaped = flow.status == Status.escaped
    measured = {
        "log_escape_time": log_time,
        "exponent": -slope,
        "gradient_evaluations": flow.stats["gradient_evaluations"],
        "hessian_vector_products": flow.stats["hessian_vector_products"],
        "log_descent_steps": log_time + jnp.log(sharpness(flow.net, task) / 2),
        "loss_drop": 1 - flow.losses[1] / flow.losses[0],
        "imbalance_error": flow.imbalance_error,
    }
    return {name: jnp.where(escaped, value, jnp.nan) for name, value in measured.items()}, flow.status
