"""The optimal escape direction of the saddle at the origin."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .. import _check
from ..activations import Activation, activation_name, resolve_activation
from ..networks import MLP, Weights
from ..tasks.task import Task
from .ascent import Climb, climb, random_starts
from .bounds import SpeedBound, speed_bound
from .low_rank import singular_values
from .optima import Optimum, distinct
from .origin import Origin, energy, origin_matrix, tangent
from .rank_one import chain_tangent
from .settle import RANDOM, Search, settle

_TOLERANCE = 1e-2  # plain residual at which the ascent hands over to the polish
_EVALUATIONS = 300
_FEWEST_RANK_ONE_STARTS = 64


class EscapeDirection(eqx.Module):
    """The best escape direction found, with its certificates; `L` layers of unit Frobenius norm.

    - `weights`: the direction `ρ`, one matrix a layer.
    - `speed`: `s = −𝓛_0(ρ)`; differentiable in the task (the direction does not move to first order).
    - `residual`: how far `ρ` is from stationary, the norm of `−∇𝓛_0(ρ) − s ρ` over `s`: the least one over the Clarke
      subdifferential where `kinks > 0`. `plain_residual` takes the slope from below at the kinks instead.
      `residual_kind` says which of the two `residual` is. The residuals are `nan` where the speed is zero.
    - `kinks`: the number of pairs of a sample and a neuron lying on the kink of the activation.
    - `upper_bound`, `proven_bound`: bounds on the speed of every network of this depth, of any width; see
      [`saddlejax.saddle.speed_bound`][]. The tighter `upper_bound` holds if the search for its one maximum, over unit
      vectors in the input space, found the largest; `proven_bound` holds without that.
    - `rank_one_speed`, `rank_one_speeds`: the best speed with all layers of rank one, and that of each of its starts.
    - `speeds`, `residuals`, `gradient_evaluations`, `start_kinds`: of every start, best first. The kinds are
      0 for a random start of full rank, 1 for the best rank-one direction, 2 for the best direction of a network of
      three layers made deeper (for `L > 3`); the evaluations of the latter two are of those smaller networks.
    - `polish_evaluations`: gradients and Hessians of the merged network, of a few neurons, that the polish took.

    Many starts are no proof that the best direction was found; `relative_gap` says how much better one could be.
    """

    weights: Weights
    speed: Float[Array, ""]
    residual: Float[Array, ""]
    plain_residual: Float[Array, ""]
    kinks: Int[Array, ""]
    upper_bound: Float[Array, ""]
    proven_bound: Float[Array, ""]
    rank_one_speed: Float[Array, ""]
    rank_one_speeds: Float[Array, " narrow_starts"]
    speeds: Float[Array, " starts"]
    residuals: Float[Array, " starts"]
    gradient_evaluations: Int[Array, " starts"]
    polish_evaluations: Int[Array, " starts"]
    start_kinds: Int[Array, " starts"]
    activation: Activation = eqx.field(static=True)

    @property
    def depth(self) -> int:
        """Number `L` of layers."""
        return len(self.weights)

    @property
    def net(self) -> MLP:
        """The direction as a network."""
        return MLP.from_weights(self.weights, self.activation)

    @property
    def singular_values(self) -> tuple[Float[Array, " _"], ...]:
        """The singular values of every layer, largest first."""
        return singular_values(self.weights)

    @property
    def relative_gap(self) -> Float[Array, ""]:
        """`upper_bound / speed − 1`: no direction is faster by more than this share (infinite at speed zero)."""
        return jnp.where(self.speed > 0, self.upper_bound / jnp.where(self.speed > 0, self.speed, 1) - 1, jnp.inf)

    @property
    def residual_kind(self) -> str:
        """`"Clarke"` where the direction lies on kinks, `"plain"` elsewhere."""
        return "Clarke" if int(self.kinks) > 0 else "plain"

    @property
    def optima(self) -> tuple[Optimum, ...]:
        """The distinct local optima of all full-rank starts, best first, with the number of starts that ended there."""
        return distinct(self.speeds, self.residuals)

    @property
    def rank_one_optima(self) -> tuple[Optimum, ...]:
        """The distinct local optima of the rank-one problem, best first, with their number of starts."""
        return distinct(self.rank_one_speeds, jnp.zeros_like(self.rank_one_speeds))

    def __str__(self) -> str:
        sizes = "-".join(str(n) for n in (self.weights[0].shape[1], *(w.shape[0] for w in self.weights)))
        random = np.asarray(self.gradient_evaluations)[np.asarray(self.start_kinds) == RANDOM]
        work = f", median {int(np.median(random))} gradient evaluations a random start" if random.size else ", closed form"
        optima = ", ".join(f"{one.speed:.9g} ({one.count})" for one in self.optima[:4])
        more = len(self.optima) - 4
        ratios = " ".join(f"{float(v[1] / v[0]):.2g}" if v.size > 1 else "0" for v in self.singular_values)
        return "\n".join(
            [
                f"EscapeDirection {sizes}, {activation_name(self.activation)}, {self.speed.dtype}",
                f"  speed             {float(self.speed):.9g}",
                f"  residual          {float(self.residual):.1e} ({self.residual_kind}, {int(self.kinks)} on a kink)",
                f"  upper bound       {float(self.upper_bound):.6g} (gap {float(self.relative_gap):.1%}; "
                f"proven without a search {float(self.proven_bound):.6g})",
                f"  rank-one speed    {float(self.rank_one_speed):.9g}",
                f"  σ2/σ1 by layer    {ratios}",
                f"  starts            {len(self.speeds)}{work}",
                f"  optima (starts)   {optima}{f' and {more} more' if more > 0 else ''}",
            ]
        )


def escape_direction(
    task: Task,
    sizes: Sequence[int],
    activation: str | Activation = "relu",
    *,
    starts: int = 16,
    key: PRNGKeyArray,
) -> EscapeDirection:
    """The fastest direction out of the saddle at zero weights.

    Near the origin the loss is `C(0) + 𝓛_0(θ)` with `𝓛_0 = E⟨∇c(0, y), f(x)⟩` of degree one in each layer. An escape
    direction has `‖ρ‖² = L` and `−∇𝓛_0(ρ) = s ρ` with speed `s > 0`, which forces `‖W_l‖_F = 1`; the optimal one maximises
    `s = −𝓛_0(ρ)` (Bantzis, Simon & Jacot, arXiv:2505.21722).

    Networks that are linear to leading order (smooth activations of gain `α`, `α = 1` for the identity) have a closed
    form: `s* = |α|^{L−1} ‖M‖_op`, `M = −E[∇c(0, y) xᵀ]`, every layer of rank one. Others are searched from many starts by
    L-BFGS on `log s`, then brought to stationarity by an active-set method on the kinks, in double precision:
    random starts of full rank; the best rank-one direction, itself from at least 64 starts; and for `L > 3` the best
    direction found with three layers, made deeper, so that the speed does not fall with depth.

    **Arguments:**

    - `task`: any task with a differentiable loss.
    - `sizes`: `[in_size, width, …, out_size]`, the sizes of the layers.
    - `activation`: a name or an elementwise JAX function with `σ(0) = 0`; what counts is its slopes on either side of zero.
    - `starts`: how many random starts of full rank.
    - `key`: a JAX random key.

    **Returns:** an [`saddlejax.saddle.EscapeDirection`][].

    **Raises:** `ValueError` for sizes that do not fit the task, and for activations with `σ(0) ≠ 0` or without a
    non-zero slope at zero, for which the origin is no saddle of this kind.
    """
    sizes = _check.layer_sizes("sizes", sizes)
    if (sizes[0], sizes[-1]) != (task.in_size, task.out_size):
        raise _check.fail(
            "sizes", f"begin with {task.in_size} and end with {task.out_size}, as the task does", list(sizes)
        )
    _check.whole_number("starts", starts)
    sigma = resolve_activation(activation)
    slopes = tangent(sigma)
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
        activation=sigma,
        **found,
    )


_energy = eqx.filter_jit(energy)


def _closed_form(task: Task, sizes: tuple[int, ...], sigma: Activation, gain: float) -> EscapeDirection:
    """The direction of a network that is linear to leading order: the top singular vectors of `M`."""
    hidden = len(sizes) - 2
    left, values, right = jnp.linalg.svd(origin_matrix(task), full_matrices=False)
    weights = [jnp.zeros((rows, columns), values.dtype) for rows, columns in zip(sizes[1:], sizes[:-1], strict=True)]
    if hidden == 0:
        # One layer is not homogeneous beyond the first degree: every matrix along M is its fastest direction.
        weights = [origin_matrix(task) / jnp.linalg.norm(origin_matrix(task))]
        speed = jnp.linalg.norm(origin_matrix(task))
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
        weights=tuple(weights), speed=speed, residual=miss, plain_residual=miss, kinks=jnp.zeros((), int),
        upper_bound=speed, proven_bound=speed, rank_one_speed=speed if hidden else values[0], rank_one_speeds=one,
        speeds=one, residuals=miss[None], gradient_evaluations=none, polish_evaluations=none,
        start_kinds=none + 1, activation=sigma,
    )


def _residual(weights: Weights, speed: Array, task: Task, gain: float) -> Array:
    slopes = jax.grad(energy)(weights, Origin(task, (gain, gain)))
    misses = [slope - speed * w for slope, w in zip(slopes, weights, strict=True)]
    size = jnp.sqrt(sum(jnp.sum(jnp.square(miss)) for miss in misses))
    return jnp.where(speed > 0, size / jnp.where(speed > 0, speed, 1), jnp.nan)


def _search(task: Task, search: Search, starts: int, key: PRNGKeyArray) -> dict[str, Any]:
    """All climbs on the device, then the polish on the host."""
    sizes, dtype = search.sizes, task.x.dtype
    ends = (sizes[0], sizes[-1])
    origin = Origin(task, search.slopes)
    chain, _ = chain_tangent(search.slopes, search.depth)
    keys = [jax.random.fold_in(key, number) for number in (2, 3, search.depth)]
    narrow_starts = max(_FEWEST_RANK_ONE_STARTS, 4 * starts)

    def climbs(sizes: tuple[int, ...], count: int, key: PRNGKeyArray, origin: Origin) -> Climb:
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
        results = settle(search, *arguments)
        return jax.tree.map(lambda result, like: np.asarray(result, like.dtype), results, shapes)

    if _check.is_concrete(arguments):
        return jax.tree.map(jnp.asarray, host(*arguments))
    return jax.pure_callback(host, shapes, *arguments, vmap_method="sequential")
