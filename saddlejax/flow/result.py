"""The record of a flow."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import _check
from .._numerics import power_of_ten as power_of_ten
from ..networks.network import AbstractNetwork
from ..tasks.task import Task
from .plateaus import Plateaus, plateaus
from .status import Status
from .task_reference import TaskReference
from .until import AbstractUntil, in_words

SMALLEST_DROP = 1e-3
"""An escape, measured or predicted, at which less of the loss is lost than this share is reported with a word."""
SAME_TIME = 1e-5
ROUNDING_OF_LOSS = 1e3


class Flow(eqx.Module):
    """What happened along a gradient flow (or along gradient descent), with a check of its own.

    Every field has one more leading axis under `vmap`. `rows` are the moments kept; those not used are NaN (a single
    call outside of `jit` cuts them off); their `steps` are −1.

    - `status`: how it ended, see `saddlejax.Status`.
    - `log_escape_time`: logarithm of the time `t` of the escape; NaN unless the status is `escaped`.
    - `steps`: steps of the integrator, or of the optimiser, taken up to each row, `(rows,)`.
    - `log_times`, `losses`, `gradient_norms`: `log t`, `𝓛` and `‖∇𝓛‖`, `(rows,)`.
    - `names`: of the groups, the arrays of the model that move, such as `layers[0].bias`: for a perceptron its `L` layers.
    - `layer_norms`: Frobenius norms of the groups, `(rows, groups)`.
    - `singular_values`: a tuple with one array `(rows, min(n_l, n_{l−1}))` a group, or None where not kept. A group with more
      than two axes counts as the matrix `(shape[0], rest)`; one with fewer has None in its place.
    - `energy`: `∫ ‖∇𝓛‖² dt`, which for the exact flow is the loss lost, `(rows,)`.
    - `imbalance`: `Δ_l = ‖W_{l+1}‖² − ‖W_l‖²`, `(rows, L − 1)`; None for a model that is no perceptron.
    - `imbalance_residual`: `Δ_l(t) − Δ_l(0) − ∫ (dΔ_l/dt) dt`, relative to `‖W_l‖² + ‖W_{l+1}‖²`, `(rows, L − 1)`. Zero
      for the exact flow (Rawal & DeWeese, arXiv:2605.01288), so that what is left is numerical error. None for a model
      that is no perceptron.
    - `sliding`: how many units, of all samples, slide along their kinks at each row, `(rows,)`; zero where a flow does not
      follow kinks. None for gradient descent.
    - `weights`: a tuple with one array `(rows, *shape)` a group, or None where not kept.
    - `net`: the model at the end.
    - `stats`: the work as whole numbers, by name. Of a flow: `steps` accepted, `rejected_steps`, `gradient_evaluations` and
      `hessian_vector_products`; where it slides along kinks also `unit_jacobians`, gradients of one unit on one sample,
      `box_problems` for the slopes, `repelling_kinks`, how often a unit left a kink that had come to repel it, from where
      the flow is not unique, and `most_units_near_kinks` in a step; of gradient descent: `steps`, `gradient_evaluations` and `escape_step`.
    - `resolved`: False where the flow depends on something that is smaller than rounding, or than the tolerance can be
      made: parts of the weights below the rounding of what has been learned, which have grown all the same after the first
      escape, or a start so near the stable manifold of the saddle that its layers cancel. The numbers after that are those
      of rounding errors.
    - `until`: when it was to end; None for gradient descent, which takes all its steps. `rtol`: the tolerance of its steps.
    - `method`: how it was computed, in words.
    - `task`: the task, where the flow was computed outside of `jit` and `vmap` and not stacked, sliced or pickled since.
    """

    status: Status
    log_escape_time: Float[Array, ""]
    steps: Int[Array, " rows"]
    log_times: Float[Array, " rows"]
    losses: Float[Array, " rows"]
    gradient_norms: Float[Array, " rows"]
    layer_norms: Float[Array, "rows layers"]
    singular_values: tuple[Float[Array, "rows _"] | None, ...] | None
    energy: Float[Array, " rows"] | None
    imbalance: Float[Array, "rows hidden"] | None
    imbalance_residual: Float[Array, "rows hidden"] | None
    sliding: Int[Array, " rows"] | None
    weights: tuple[Float[Array, "rows ..."], ...] | None
    net: PyTree
    stats: dict[str, Int[Array, ""]]
    resolved: Bool[Array, ""]
    until: AbstractUntil | None
    rtol: Float[Array, ""] | None
    method: str = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    reference: TaskReference = eqx.field(default_factory=TaskReference)

    @property
    def task(self) -> Task | None:
        """The task, where it is known."""
        return self.reference.task

    @property
    def target(self) -> str:
        """What was asked for, in words."""
        return "all steps are taken" if self.until is None else self.until.describe()

    @property
    def escape_time(self) -> Float[Array, "*lanes"]:
        """The time `t` of the escape; NaN unless the status is `escaped`, infinite where it overflows."""
        return jnp.exp(self.log_escape_time)

    @property
    def times(self) -> Float[Array, "*lanes rows"]:
        """The times `t` of the rows, in units of `dθ/dt = −∇𝓛`; infinite where they overflow."""
        return jnp.exp(self.log_times)

    @property
    def loss_drop(self) -> Float[Array, "*lanes"]:
        """The share of the loss that is lost between the first and the last row; one number a flow of a batch."""
        last = jnp.maximum(jnp.sum(self.steps >= 0, axis=-1) - 1, 0)
        first = self.losses[..., 0]
        return (first - jnp.take_along_axis(self.losses, last[..., None], axis=-1)[..., 0]) / first

    @property
    def energy_error(self) -> Float[Array, "*lanes"]:
        """`|𝓛(0) − 𝓛(t) − ∫ ‖∇𝓛‖² dt|` at the last row, relative to the loss lost; one number a flow of a batch.

        Zero for the exact flow of any model. A consistency check of the integration, not a bound on the error of the escape
        time. Where the loss lost is below the rounding of the loss it says nothing, and is then small.
        """
        if self.energy is None:
            raise _check.fail("flow", "be a gradient flow", "gradient descent, which has no energy", "See flow.losses.")
        last = jnp.maximum(jnp.sum(self.steps >= 0, axis=-1) - 1, 0)[..., None]
        first = self.losses[..., 0]
        lost = first - jnp.take_along_axis(self.losses, last, axis=-1)[..., 0]
        spent = jnp.take_along_axis(self.energy, last, axis=-1)[..., 0] - self.energy[..., 0]
        least = ROUNDING_OF_LOSS * jnp.finfo(lost.dtype).eps * jnp.abs(first)
        return jnp.abs(lost - spent) / jnp.maximum(jnp.abs(lost), least)

    @property
    def imbalance_error(self) -> Float[Array, "*lanes"]:
        """The largest relative violation of the imbalance identity over rows and layers; of perceptrons only.

        A consistency check of the integration, not a bound on the error of the escape time; it is blind where layers are equal.
        """
        if self.imbalance_residual is None:
            raise _check.fail(
                "flow",
                "be one of a perceptron",
                f"one of a {type(self.net).__name__}",
                "For any model see energy_error.",
            )
        residual = jnp.abs(self.imbalance_residual)
        residual = jnp.where(jnp.isnan(residual) & jnp.isnan(self.losses)[..., None], 0, residual)
        return jnp.max(residual, axis=(-2, -1), initial=0)

    @property
    def clarke_residual(self) -> Float[Array, "*lanes"]:
        """The norm of the least element of the Clarke subdifferential of the loss at the last row; one number a flow of a batch.

        Where no unit is at a kink it is the gradient norm. A flow that slides along kinks comes to rest where it vanishes,
        though the gradients on both sides of the kinks do not: it is the certificate of the outcome `stationary`.
        """
        last = jnp.maximum(jnp.sum(self.steps >= 0, axis=-1) - 1, 0)[..., None]
        return jnp.take_along_axis(self.gradient_norms, last, axis=-1)[..., 0]

    def plateaus(self, task: Task | Callable[[Any], Array] | None = None, **options: Any) -> Plateaus:
        """The saddles visited: `saddlejax.staircase.plateaus(flow, task, polish=…, check=…, rank_tolerance=…)`."""
        return plateaus(self, task, **options)

    def __str__(self) -> str:
        if not _check.is_concrete(self.status):
            return "Flow (being traced)"
        return _summary(self) if self.losses.ndim == 1 else _batch_summary(self)


def _method(flow: Flow) -> str:
    return flow.method if flow.rtol is None else f"{flow.method}, rtol {in_words(flow.rtol)}"


def trim(flow: Flow, rows: int) -> Flow:
    """The flow with its first so many rows."""
    series = lambda f: (  # noqa: E731
        f.steps,
        f.log_times,
        f.losses,
        f.gradient_norms,
        f.layer_norms,
        f.singular_values,
        f.energy,
        f.imbalance,
        f.imbalance_residual,
        f.sliding,
        f.weights,
    )
    # Through NumPy, since slicing a JAX array compiles anew for every length.
    cut = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[:rows]), series(flow))
    return eqx.tree_at(series, flow, cut, is_leaf=lambda leaf: leaf is None)


def _summary(flow: Flow) -> str:
    stats = {name: int(count) for name, count in flow.stats.items()}
    lines = [
        f"Flow of {_subject(flow)}, {flow.losses.dtype}, until {flow.target}",
        f"  outcome          {Status[flow.status]}",
    ]
    if bool(flow.status == Status.escaped):
        log_time = float(flow.log_escape_time)
        lines.append(f"  escape time      {power_of_ten(log_time)}   (log {log_time:.6g})")
        drop = _drop_at_escape(flow)
        if drop < SMALLEST_DROP:
            lines += [
                f"                   Until then the loss fell by {max(drop, 0):.1e} of its value only: hardly anything was learned.",
                "                   Centre and scale the inputs, or ask for until=Escape(loss_fraction=...).",
            ]
    else:
        lines.append(f"  time             {power_of_ten(float(flow.log_times[-1]))}")
    norms = [", ".join(f"{float(x):.3g}" for x in flow.layer_norms[row]) for row in (0, -1)]
    lines += [
        f"  loss             {float(flow.losses[0]):.6g} → {float(flow.losses[-1]):.6g}   (first and last row)",
        f"  layer norms      {norms[0]} → {norms[1]}",
        *_certificates(flow),
        "  work             " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in stats.items()),
        f"  method           {_method(flow)}",
    ]
    if flow.sliding is not None and bool(jnp.any(flow.sliding > 0)):
        lines.append(
            f"  kinks            up to {int(jnp.max(flow.sliding))} units slide along them; least norm of the Clarke "
            f"subdifferential at the end {float(flow.clarke_residual):.2g}"
        )
    if not bool(flow.resolved):
        lines.append("  resolved         no: the flow depends on something smaller than rounding")
    return "\n".join(lines)


def _drop_at_escape(flow: Flow) -> float:
    """The share of the loss that is lost at the escape; infinite without one.

    A flow that escaped ends there. For gradient descent it is at least the share lost at the first row not before it.
    """
    if flow.until is not None:
        return float(flow.loss_drop) if bool(flow.status == Status.escaped) else np.inf
    losses, log_times = np.asarray(flow.losses), np.asarray(flow.log_times)
    rows = np.flatnonzero(log_times >= float(flow.log_escape_time) - SAME_TIME)
    return float((losses[0] - losses[rows[0]]) / losses[0]) if rows.size and losses[0] > 0 else np.inf


def _batch_summary(flow: Flow) -> str:
    (numbers,) = jax.tree.leaves(flow.status)
    found, counts = np.unique(np.asarray(numbers), return_counts=True)
    names = [Status[jax.tree.map(lambda _, n=number: jnp.asarray(n), flow.status)] for number in found]
    times = np.ravel(flow.log_escape_time)
    known = times[np.isfinite(times)]
    lines = [f"{times.size} flows of {_subject(flow)}, {flow.losses.dtype}, until {flow.target}"]
    lines += [f"  {count:6d}  {name}" for name, count in zip(names, counts, strict=True)]
    if known.size:
        low, middle, high = (power_of_ten(float(f(known))) for f in (np.min, np.median, np.max))
        lines.append(f"  escape times     {low} … {high}, median {middle}")
    lines += [
        *_certificates(flow),
        f"  work             {int(jnp.sum(flow.stats['gradient_evaluations']))} gradient evaluations",
        f"  method           {_method(flow)}",
    ]
    unresolved = int(np.sum(~np.asarray(flow.resolved)))
    if unresolved:
        lines.append(f"  resolved         all but {unresolved}, which depend on something smaller than rounding")
    return "\n".join(lines)


def _subject(flow: Flow) -> str:
    """The model in a word: the sizes of a perceptron, the name of any other."""
    if isinstance(flow.net, AbstractNetwork):
        return "-".join(map(str, flow.net.sizes))
    return f"{type(flow.net).__name__} ({len(flow.names)} arrays)"


def _certificates(flow: Flow) -> list[str]:
    """The consistency checks of a flow, or the largest of a batch."""
    lines = []
    for name, there in (("energy", flow.energy), ("imbalance", flow.imbalance_residual)):
        if there is not None:
            label = f"{name} error"
            lines.append(f"  {label:16s} {float(jnp.max(getattr(flow, f'{name}_error'))):.1e}   (a consistency check)")
    return lines
