"""The optimal escape direction of the saddle at the origin."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._host.stopping import check_stopped
from .._host.threads import one_blas_thread
from .._numerics import safe_norm
from ..networks.activation_class import value_at_zero
from ..networks.activations import Activation, ActivationParts, resolve_activation
from ..networks.network import Weights
from ..objective import Problem, as_problem
from ..parameters import Trainable
from ..tasks.task import Task
from .ascent import Climb, climb, random_starts
from .bounds import speed_bound
from .model_direction import ModelDirection, model_direction
from .origin import Origin, Tangent, energy, has_tangent, origin_matrix, pull, tangent
from .rank_one import chain_tangent
from .result import EscapeDirection
from .settle import RANK_ONE, Search, settle

_TOLERANCE = 1e-2  # plain residual at which the ascent hands over to the polish
_EVALUATIONS = 300
_FEWEST_RANK_ONE_STARTS = 64
_ROUNDING = 16  # machine epsilons, relative to the largest conceivable speed, that count as zero


@safe_to_interrupt
def escape_direction(
    task: Task | Callable[[Any], Array],
    sizes: Sequence[int] | np.ndarray | PyTree,
    activation: str | Activation = "relu",
    *,
    starts: int = 16,
    key: PRNGKeyArray,
    where: Callable[[Any], Any] | None = None,
    trainable: Trainable | None = None,
) -> EscapeDirection | ModelDirection:
    """The fastest direction out of the saddle at zero weights, of a perceptron of given sizes or of any model.

    Near the origin the loss is `C(0) + 𝓛_0(θ)` with `𝓛_0 = E⟨∇c(0, y), f(x)⟩` of degree one in each layer. An escape
    direction has `‖ρ‖² = L` and `−∇𝓛_0(ρ) = s ρ` with speed `s > 0`, which forces `‖W_l‖_F = 1`; the optimal one maximises
    `s = −𝓛_0(ρ)` (Bantzis, Simon & Jacot, arXiv:2505.21722).

    Networks that are linear to leading order (smooth activations of gain `α`, `α = 1` for the identity) have a closed
    form: `s* = |α|^{L−1} ‖M‖_op`, `M = −E[∇c(0, y) xᵀ]`, every layer of rank one. Others are searched from many starts by
    L-BFGS on `log s`, then brought to stationarity by an active-set method on the kinks, in double precision:
    random starts of full rank; the best rank-one direction, itself from at least 64 starts; and for `L > 3` the best
    direction found with three layers, made deeper, so that the speed does not fall with depth.

    For any other model `𝓛_0`, of the order `r` that [`saddlejax.saddle_order`][] finds, is taken from the signal at a small
    scale, and climbed from many starts by L-BFGS on `log(−𝓛_0)` with every group of parameters at unit norm. For these
    perceptrons both are the same: there `‖W_l‖_F = 1` follows.

    **Arguments:**

    - `task`: any task with a differentiable loss; for a model also a function `loss(model) -> scalar`.
    - `sizes`: `[in_size, width, …, out_size]`, the sizes of the layers; or a model, whose own weights do not matter.
      A perceptron is searched by its sizes and activation, where these have a direction at the order of its depth.
    - `activation`: a name or an elementwise JAX function with `σ(0) = 0`; what counts is its slopes on either side of zero.
    - `starts`: how many random starts of full rank. The result counts one or two more, the directions of rank one and,
      for `L > 3`, of three layers, each marked in `start_kinds`.
    - `key`: a JAX random key.
    - `where`, `trainable`: for a model, which groups are small (by default all), and which move, as for
      [`saddlejax.saddle_order`][].

    **Returns:** a [`saddlejax.saddle.ModelDirection`][] for a model that is no such perceptron; otherwise an
    [`saddlejax.saddle.EscapeDirection`][]. Its speed is zero where nothing moves a network of small
    weights to this order of the loss: in closed form where `M = 0`, up to rounding, or after a search that found no
    direction of positive speed. Then there is no escape direction, and the summary says so.

    **Raises:** `ValueError` for sizes that do not fit the task; for activations with `σ(0) ≠ 0` or without a
    non-zero slope at zero, for which the origin is no saddle of this kind; and for a task without signal, whose
    inputs, or whose gradients `∇c(0, y)`, are zero for all samples (unless they are traced: then the speed is zero).
    """
    _check.whole_number("starts", starts)
    if not isinstance(sizes, Sequence | np.ndarray | int):
        model, problem = sizes, as_problem(sizes, task, trainable)
        if not (problem.perceptron and where is None and _has_direction(problem)):
            small = (
                tuple(range(len(problem.parameters.arrays)))
                if where is None
                else tuple(sorted(problem.parameters.indices(where)))
            )
            return model_direction(problem, small, starts, key)
        sizes, activation = model.sizes, model.activation
    if not isinstance(task, Task):
        raise _check.fail("task", "be a saddlejax.Task where sizes are given", type(task).__name__)
    return perceptron_direction(task, _check.layer_sizes("sizes", sizes), activation, starts, key)


def perceptron_direction(
    task: Task, sizes: tuple[int, ...], activation: str | Activation, starts: int, key: PRNGKeyArray
) -> EscapeDirection:
    """The fastest direction of a perceptron of given sizes, at the order of its depth."""
    if (sizes[0], sizes[-1]) != (task.in_size, task.out_size):
        raise _check.fail(
            "sizes", f"begin with {task.in_size} and end with {task.out_size}, as the task does", list(sizes)
        )
    sigma = resolve_activation(activation)
    slopes = tangent(sigma)
    check_signal(task)
    if slopes.linear or len(sizes) == 2:
        return _closed_form(task, sizes, sigma, slopes.plus)
    frozen = jax.lax.stop_gradient(task)
    found = _search(frozen, Search(sizes, slopes), starts, key)
    origin = Origin(frozen, slopes)
    bound = speed_bound(frozen, origin, found["weights"][0], jnp.asarray(len(sizes) - 1))
    speed = jnp.where(found["speeds"][0] > 0, _energy(found["weights"], Origin(task, slopes)), 0)
    return EscapeDirection(
        speed=speed,
        upper_bound=bound.value,
        proven_bound=bound.proven,
        residual=found["residuals"][0],
        plain_residual=found.pop("plain_residuals")[0],
        rank_one_speed=found["rank_one_speeds"][0],
        activation_parts=ActivationParts(sigma),
        **found,
    )


def _has_direction(problem: Problem) -> bool:
    """Whether a perceptron has one at the order of its depth: its task has a matrix `M`, or its activation a kink at zero."""
    task, net = problem.task, problem.model
    if task is None or (value_at_zero(net.activation) == 0 and not has_tangent(net.activation)):
        return False
    slopes = tangent(net.activation)
    matrix = origin_matrix(task)
    if not slopes.linear or not _check.is_concrete(matrix):
        return True
    return bool(safe_norm(matrix) > _ROUNDING * jnp.finfo(matrix.dtype).eps * largest_speed(task))


_energy = eqx.filter_jit(energy)


def check_signal(task: Task) -> None:
    """Refuse a task to which no network of small weights responds; traced ones pass."""
    if not _check.is_concrete(task):
        return
    if not np.any(np.asarray(task.x)):
        raise _check.fail(
            "task", "have inputs that are not all zero", "one with x = 0 for all samples", "Check how x was made."
        )
    with jax.ensure_compile_time_eval():  # the task of a traced function need not be traced itself
        gradients = np.asarray(pull(task))
    if not np.any(gradients):
        raise _check.fail(
            "task",
            "have a loss whose gradient at zero output is not zero for all samples",
            "one with ∇c(0, y) = 0 throughout, as targets that are all zero have under squared error",
            "A network of zero weights is stationary in every direction then. Check how y was made.",
        )


def largest_speed(task: Task) -> Array:
    """`Σ_i ‖r_i‖ ‖x_i‖`, above the speed of every direction if the activation has slopes of at most one."""
    return jnp.sum(jax.vmap(safe_norm)(pull(task)) * jax.vmap(safe_norm)(task.x))


def _closed_form(task: Task, sizes: tuple[int, ...], sigma: Activation, gain: float) -> EscapeDirection:
    """The direction of a network that is linear to leading order: the top singular vectors of `M`."""
    hidden = len(sizes) - 2
    matrix = origin_matrix(task)
    # What is rounding of the sum over samples is no signal.
    largest = largest_speed(jax.lax.stop_gradient(task))
    matrix = jnp.where(safe_norm(matrix) > _ROUNDING * jnp.finfo(matrix.dtype).eps * largest, matrix, 0)
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    weights = [jnp.zeros((rows, columns), values.dtype) for rows, columns in zip(sizes[1:], sizes[:-1], strict=True)]
    if hidden == 0:
        # One layer is not homogeneous beyond the first degree: every matrix along M is its fastest direction.
        speed = safe_norm(matrix)
        weights = [jnp.where(speed > 0, matrix / jnp.where(speed > 0, speed, 1), weights[0].at[0, 0].set(1))]
    else:
        sign = np.sign(gain) ** hidden
        weights[0] = weights[0].at[0].set(right[0])
        for layer in range(1, hidden):
            weights[layer] = weights[layer].at[0, 0].set(1)
        weights[-1] = weights[-1].at[:, 0].set(sign * left[:, 0])
        speed = abs(gain) ** hidden * values[0]
    miss = _residual(tuple(weights), speed, task, gain)
    one, none = speed[None], jnp.zeros(1, int)
    return EscapeDirection(
        weights=tuple(weights),
        speed=speed,
        residual=miss,
        plain_residual=miss,
        kinks=jnp.zeros((), int),
        upper_bound=speed,
        proven_bound=speed,
        rank_one_speed=speed if hidden else values[0],
        rank_one_speeds=one,
        speeds=one,
        residuals=miss[None],
        gradient_evaluations=none,
        polish_evaluations=none,
        start_kinds=none + RANK_ONE,
        activation_parts=ActivationParts(sigma),
    )


def _residual(weights: Weights, speed: Array, task: Task, gain: float) -> Array:
    slopes = jax.grad(energy)(weights, Origin(task, Tangent(gain, gain)))
    misses = [slope - speed * w for slope, w in zip(slopes, weights, strict=True)]
    size = jnp.sqrt(sum(jnp.sum(jnp.square(miss)) for miss in misses))
    return jnp.where(speed > 0, size / jnp.where(speed > 0, speed, 1), jnp.inf)


def _search(task: Task, search: Search, starts: int, key: PRNGKeyArray) -> dict[str, Any]:
    """All climbs on the device, then the polish on the host."""
    sizes, dtype = search.sizes, task.x.dtype
    ends = (sizes[0], sizes[-1])
    origin = Origin(task, search.slopes)
    chain, _ = chain_tangent(search.slopes, search.depth)
    keys = [jax.random.fold_in(key, number) for number in (2, 3, search.depth)]
    narrow_starts = max(_FEWEST_RANK_ONE_STARTS, 4 * starts)

    def climbs(sizes: tuple[int, ...], count: int, key: PRNGKeyArray, origin: Origin) -> Climb:
        check_stopped()
        first = random_starts(sizes, count, key, dtype)
        return climb(first, origin, jnp.asarray(_TOLERANCE, dtype), jnp.asarray(_EVALUATIONS))

    narrow = climbs((ends[0], 1, ends[1]), narrow_starts, keys[0], Origin(task, chain))
    three = (ends[0], sizes[1], sizes[-2], ends[1])
    shallow = climbs(three, starts, keys[1], origin) if search.depth > 3 else None
    arguments = (origin.x, origin.r, narrow, shallow, climbs(sizes, starts, keys[2], origin))
    return _on_host(search, arguments, starts, narrow_starts)


def _on_host(search: Search, arguments: tuple, starts: int, narrow_starts: int) -> dict[str, Any]:
    """Settle the climbs at once, or through a callback where they are traced."""
    dtype, whole = arguments[0].dtype, jnp.zeros(0, int).dtype
    count = starts + 1 + (search.depth > 3)
    number, integer = partial(jax.ShapeDtypeStruct, dtype=dtype), partial(jax.ShapeDtypeStruct, dtype=whole)
    shapes = {
        "weights": tuple(number(shape) for shape in zip(search.sizes[1:], search.sizes[:-1], strict=True)),
        "kinks": integer(()),
        "speeds": number((count,)),
        "residuals": number((count,)),
        "plain_residuals": number((count,)),
        "gradient_evaluations": integer((count,)),
        "polish_evaluations": integer((count,)),
        "start_kinds": integer((count,)),
        "rank_one_speeds": number((narrow_starts,)),
    }

    def host(*arguments: Any) -> dict[str, Any]:
        # The matrices are small: threads of the linear algebra would spend ten times the work in waiting for each other.
        with one_blas_thread():
            results = settle(search, *arguments)
        return jax.tree.map(lambda result, like: np.asarray(result, like.dtype), results, shapes)

    if _check.is_concrete(arguments):
        return jax.tree.map(jnp.asarray, host(*arguments))
    return jax.pure_callback(host, shapes, *arguments, vmap_method="sequential")
