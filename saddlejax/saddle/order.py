"""The order of a saddle: the power of the init scale with which a model begins to lower its loss."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._numerics import in_precision, safe_norm
from ..bottleneck import chosen_groups
from ..objective import Problem, TaskObjective, as_problem, outputs
from ..parameters import Trainable
from ..tasks.task import Task
from .relaxed import own_terms, relaxed

Result = TypeVar("Result")

_LARGEST, _SMALLEST, _PER_DECADE = 1, -9, 4  # decades of the scales at which the signal is looked at
_TOGETHER = 4  # neighbouring slopes that must agree on a whole number
_TOLERANCE = 0.1
_ROUNDING = 32  # machine epsilons of the terms of the signal that may be rounding
_MOST_NOISE = 0.02


class SaddleOrder(eqx.Module):
    """The order `r` of the saddle at which some groups of parameters are zero, as the data see it.

    - `order`: `r`; NaN where no whole number was found.
    - `slope`: what was measured, `d log(signal) / d log s`; near `r`.
    - `signal`: `−𝓛_0(θ̂)`, the leading coefficient, with every small group of `θ̂` at unit norm, pointing where it points
      in the model. It may be negative: then a flow from there first turns.
    - `scale`: the `s` at which both were read off.
    - `relaxed`: which groups, all of the model in order, were first brought to their minimum, since the loss has terms of
      first or second order in them alone, such as the bias of a last layer.
    - `names`: the groups of the model; `small`: indices of those that are small.
    """

    order: Float[Array, ""]
    slope: Float[Array, ""]
    signal: Float[Array, ""]
    scale: Float[Array, ""]
    relaxed: Bool[Array, " groups"]
    names: tuple[str, ...] = eqx.field(static=True)
    small: tuple[int, ...] = eqx.field(static=True)

    @property
    def exponent(self) -> Float[Array, ""]:
        """`r − 2`: the escape time grows like `ε^{−(r−2)}`, for `r = 2` like `log(1/ε)`."""
        return self.order - 2

    @property
    def residual(self) -> Float[Array, ""]:
        """How far the measured slope is from the whole number, `|slope − r|`."""
        return jnp.abs(self.slope - self.order)

    def __str__(self) -> str:
        if not _check.is_concrete(self.order):
            return "SaddleOrder (being traced)"
        if jnp.ndim(self.order) > 0:
            return f"SaddleOrder of shape {jnp.shape(self.order)}"
        small = ", ".join(self.names[group] for group in self.small)
        if not np.isfinite(float(self.order)):
            return (
                "Order of the saddle: none found\n"
                "  The signal of the data has no stable whole power of the scale above its rounding: nothing drives these "
                f"parameters, or the model is not smooth enough at zero.\n  small         {small}"
            )
        r = int(self.order)
        law = "log(1/ε)" if r == 2 else f"ε^-{r - 2}" if r > 2 else "1: there is no plateau"
        lines = [
            f"Order of the saddle: r = {r}",
            f"  escape time   ∝ {law}",
            f"  measured      {float(self.slope):.6g} at scale {float(self.scale):.2g}",
            f"  signal        {float(self.signal):.4g}   (every small group at unit norm)",
            f"  small         {small}",
        ]
        names = [name for name, moved in zip(self.names, np.asarray(self.relaxed), strict=True) if moved]
        return "\n".join([*lines, f"  at their minimum: {', '.join(names)}"] if names else lines)


@safe_to_interrupt
def saddle_order(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    where: Callable[[Any], Any] | None = None,
    *,
    layers: Sequence[int] | int | None = None,
    trainable: Trainable | None = None,
) -> SaddleOrder:
    """The order `r` of the saddle at which the small parameters of a model are zero.

    Along the ray `s ↦ sθ`, on which the small groups are scaled and the others stay as they are, the loss is
    `𝓛(0) + s^r 𝓛_0(θ) + …`. The escape time is then `τ ∝ ε^{−(r−2)}` for `r ≥ 3` and `∝ log(1/ε)` for `r = 2`. For a
    perceptron with `r` small layers the order is `r` where `E[∇c(0, y) xᵀ] ≠ 0` (Rawal & DeWeese, arXiv:2605.01288); where
    that mean vanishes, as for the parity of signs, it is higher.

    With a task it is measured on what is linear in the outputs, `E⟨∇c(f_0, y), f(sθ)⟩` with the outputs `f_0` at `s = 0`;
    with a function `loss(model)` on the loss. In both cases by the slope along the ray, which loses no digits to
    `𝓛(0)`, at scales from 10 down to 1e-9 in double precision: the order is the whole number that neighbouring slopes agree on at the smallest
    scales where the signal stands above its rounding. Groups that are zero point in a fixed random direction. Groups of
    which the loss has terms of first or second order by themselves, such as the bias of a last layer, reach their minimum
    in a time of order one; the order is measured with these at their minimum.

    **Arguments:**

    - `model`, `task`: a model with a [`saddlejax.Task`][], or with a function `loss(model) -> scalar`. The scale of the
      small groups does not matter.
    - `where`: the small groups, as a function of the model: `lambda m: [m.conv1.weight, m.conv2.weight]`. All others stay
      at their values and count as being of order one, however small they are: a hidden bias that is small but left out
      changes the order. Name all groups that shrink with the scale.
    - `layers`: the same for a perceptron: indices of layers, counted from 0. By default, the layers that
      [`saddlejax.bottleneck_layers`][] finds in a perceptron, and all groups of any other model.
    - `trainable`: which arrays move, as for [`saddlejax.gradient_flow`][].

    **Returns:** a [`saddlejax.saddle.SaddleOrder`][]; its `order` is NaN where no whole number was found.

    **Raises:** `ValueError` as [`saddlejax.gradient_flow`][] does for models and losses that do not fit.

    **Example:** `saddle_order(eqx.nn.MLP(64, 10, 24, 2, jax.nn.gelu, key=key), task).order` is 3.
    """
    problem = as_problem(model, task, trainable)
    small = chosen_groups(problem, layers, where)
    return in_widest(lambda problem: saddle_point(problem, small)[0], problem)


def in_widest(function: Callable[[Problem], Result], problem: Problem) -> Result:
    """A function of a problem, in double precision where nothing is traced; its result in the problem's own precision."""
    dtype = problem.parameters.arrays[0].dtype
    if not _check.is_concrete(problem):
        return function(problem)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        found = function(in_double(problem))
        return jax.tree.map(lambda a: a.astype(dtype) if getattr(a, "dtype", None) == jnp.float64 else a, found)


def in_double(problem: Problem) -> Problem:
    """The problem in double precision, which has to be switched on; unchanged where its loss refuses that."""
    double = in_precision(problem, jnp.float64)
    try:
        eqx.filter_eval_shape(double.loss, double.parameters.arrays)
    except Exception:  # a function `loss(model)` may mix the model with arrays of its own precision
        return problem
    return double


@eqx.filter_jit
def saddle_point(problem: Problem, small: tuple[int, ...]) -> tuple[SaddleOrder, tuple[Array, ...]]:
    """The saddle at which the small groups are zero: its order, and all groups there."""
    arrays = problem.parameters.arrays
    dtype = arrays[0].dtype
    units = {group: unit_group(arrays[group], group) for group in small}
    moving = own_terms(problem, units)
    base, error = relaxed(problem, units, moving)
    still = {group: unit * (1 - moving[group]) for group, unit in units.items()}

    def at(s: Array) -> tuple[Array, ...]:
        return tuple(array + s * still[group] if group in small else array for group, array in enumerate(base))

    terms = signal_terms(problem, base)
    exponents = np.arange(_LARGEST * _PER_DECADE, _SMALLEST * _PER_DECADE - 1, -1) / _PER_DECADE
    scales = jnp.asarray(10.0**exponents, dtype)

    def look(s: Array) -> tuple[Array, Array]:
        rates = s * jax.jvp(lambda s: terms(at(s)), (s,), (jnp.ones_like(s),))[1]
        return jnp.sum(rates), jnp.sum(jnp.abs(rates))

    values, sizes = jax.lax.map(look, scales)
    values, sizes = -values, jnp.where(jnp.isfinite(sizes), sizes, 0)
    noise = (_ROUNDING * jnp.finfo(dtype).eps + error) * sizes / jnp.abs(values)
    seen = (noise < _MOST_NOISE) & (jnp.abs(values) > jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps)
    logs = jnp.log(jnp.where(seen, jnp.abs(values), 1))
    slopes = (logs[:-1] - logs[1:]) * _PER_DECADE / np.log(10)
    slopes = jnp.where(seen[:-1] & seen[1:], slopes, jnp.nan)
    whole = jnp.round(slopes)
    near = (jnp.abs(slopes - whole) < _TOLERANCE) & (whole > 0)
    run = [jnp.roll(near, -k) & (jnp.roll(whole, -k) == whole) for k in range(_TOGETHER)]
    stable = jnp.all(jnp.stack(run), axis=0).at[1 - _TOGETHER :].set(False)
    found = jnp.any(stable)
    last = stable.size - 1 - jnp.argmax(stable[::-1]) + _TOGETHER - 1
    order = whole[last]
    # Of all scales that agree, the one at which the slope changes least and the rounding is smallest.
    doubt = jnp.abs(slopes - jnp.roll(slopes, 1)).at[0].set(jnp.inf) + noise[1:]
    doubt = jnp.where(near & (whole == order), doubt, jnp.inf)
    best = jnp.argmin(jnp.where(jnp.isnan(doubt), jnp.inf, doubt))
    nan = lambda value: jnp.where(found, value, jnp.nan).astype(dtype)  # noqa: E731
    measured = SaddleOrder(
        order=nan(order),
        slope=nan(slopes[best]),
        signal=nan(values[best + 1] * jnp.exp(-order * jnp.log(scales[best + 1])) / order),
        scale=nan(scales[best + 1]),
        relaxed=moving > 0,
        names=problem.parameters.names,
        small=small,
    )
    return measured, base


def unit_group(array: Array, group: int) -> Array:
    """The array over its norm; a fixed random direction where it is zero."""
    noise = jax.random.normal(jax.random.key(group), array.shape, array.dtype)
    direction = jnp.where(safe_norm(array) > 0, array, noise)
    return direction / safe_norm(direction)


def signal_terms(problem: Problem, base: tuple[Array, ...]) -> Callable[[tuple[Array, ...]], Array]:
    """What the saddle at `base` is measured by, as numbers to be summed: `⟨∂𝓛/∂f(x_i), f(x_i)⟩` there, or the loss itself."""
    objective = problem.objective
    if not isinstance(objective, TaskObjective):
        return problem.loss
    task = objective.task
    at_base = outputs(problem.parameters.with_arrays(base), task.x)
    slopes = jax.grad(task.mean_loss)(at_base)
    return lambda arrays: slopes * outputs(problem.parameters.with_arrays(arrays), task.x)
