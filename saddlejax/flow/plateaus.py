"""The saddles that a flow visits: plateaus, and the ranks of the network on them."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Float, PyTree

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._numerics import power_of_ten
from ..curvature.stationary import StationaryPoint, nearby_stationary_point
from ..networks.activation_class import slope_jumps
from ..parameters import Parameters
from ..tasks.task import Task
from .rounding import log_gradient_rounding, log_sensitivity
from .sliding_solver import ROUNDING_OF_SLOPES
from .status import Status

if TYPE_CHECKING:
    from .result import Flow
else:
    Flow = Any  # the module that defines it imports this one

RANK_TOLERANCE = 0.1
E_FOLD = 1.0
SAME_LOSS = 1e-7


class Plateau(eqx.Module):
    """A stretch of the flow near a saddle.

    - `log_start`, `log_end`: natural logarithms of the times `t` of the escape before it (`−inf` for the first plateau)
      and of the escape from it (`inf` where the flow ended before); `start`, `end` are the times themselves.
    - `log_time`, `row`: when, and in which row of the flow, the gradient was smallest.
    - `loss`, `gradient_norm`: `𝓛` and `‖∇𝓛‖` there.
    - `prominence`: by how many e-folds `‖∇𝓛‖²` rises from there, on the side where it rises less.
    - `ranks`: the number of singular values above the tolerance, one for every matrix of the model: the layers of a
      perceptron, the groups named in [`saddlejax.staircase.Plateaus`][] of any other model.
    - `stable_ranks`: `‖W_l‖_F²/‖W_l‖_op²` of every matrix.
    - `bottleneck_rank`: an interval for the bottleneck rank of the network, from `max_x rank Jf(x)` to `min_l rank W_l`
      for a perceptron, to the smaller of the numbers of inputs and outputs for any other model; None where there is no
      task.
    - `saddle`: the stationary point close by, where asked for.
    - `log_end_error`: by how much another flow, at another tolerance, is later to lose half of what is lost from this
      plateau to the next one, in `log t`; None where not asked for, NaN where that flow does not come so far.
    """

    log_start: float = eqx.field(static=True)
    log_end: float = eqx.field(static=True)
    log_time: float = eqx.field(static=True)
    row: int = eqx.field(static=True)
    loss: float = eqx.field(static=True)
    gradient_norm: float = eqx.field(static=True)
    prominence: float = eqx.field(static=True)
    ranks: tuple[int, ...] = eqx.field(static=True)
    stable_ranks: tuple[float, ...] = eqx.field(static=True)
    bottleneck_rank: tuple[int, int] | None = eqx.field(static=True)
    saddle: StationaryPoint | None
    log_end_error: float | None = eqx.field(static=True)

    @property
    def start(self) -> float:
        """The time `t` of the escape before it, 0 for the first plateau."""
        return float(np.exp(self.log_start))

    @property
    def end(self) -> float:
        """The time `t` of the escape from it; infinite where the flow ended before, or where it overflows."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.log_end))


class Plateaus(eqx.Module):
    """The plateaus of a flow in order; a sequence that prints as a table."""

    plateaus: tuple[Plateau, ...]
    groups: tuple[str, ...] = eqx.field(static=True)
    """The names of the matrices that `ranks` and `stable_ranks` are of."""
    rank_tolerance: float = eqx.field(static=True)
    known_roughly: bool = eqx.field(static=True)
    """Whether kinks make the ends of late plateaus uncertain, and no other flow says by how much."""

    def __len__(self) -> int:
        return len(self.plateaus)

    @overload
    def __getitem__(self, index: int) -> Plateau: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Plateau, ...]: ...

    def __getitem__(self, index: int | slice) -> Plateau | tuple[Plateau, ...]:
        return self.plateaus[index]

    def __iter__(self) -> Iterator[Plateau]:
        return iter(self.plateaus)

    def record(self) -> list[dict]:
        """All numbers as plain Python, one dictionary a plateau; infinities as None."""
        return [_record(plateau) for plateau in self]

    def __str__(self) -> str:
        head = (
            "  start        end          loss         ‖∇L‖     ranks          stable ranks             bottleneck rank"
        )
        of = f" of {', '.join(self.groups)}" if self.groups else ""
        lines = [
            f"{len(self)} plateau{'s' if len(self) != 1 else ''}, ranks{of} at tolerance {self.rank_tolerance:g}",
            head,
        ]
        for p in self:
            stable = " ".join(f"{r:.2f}" for r in p.stable_ranks)
            lines.append(
                f"  {power_of_ten(p.log_start, 4):12s} {power_of_ten(p.log_end, 4):12s} {p.loss:<12.6g} "
                f"{p.gradient_norm:.1e}  {' '.join(map(str, p.ranks)):14s} {stable:24s} {interval(p.bottleneck_rank)}"
            )
            if p.log_end_error is not None:
                moved = (
                    f"moved by {p.log_end_error:+.1e} in log t" if np.isfinite(p.log_end_error) else "is not reached"
                )
                lines.append(f"    half of the descent that follows {moved} at the other tolerance")
            if p.saddle is not None:
                lines.append(f"    {p.saddle}")
        if any(p.bottleneck_rank is None for p in self):
            lines.append(
                "  Bottleneck ranks need the weights of a perceptron: keep them by save=saddlejax.Save(weights=True)."
            )
        if self.known_roughly:
            lines.append(
                "  At kinks late ends are known to some per cent only: pass check=, this flow at another rtol."
            )
        return "\n".join(lines)


def interval(ends: tuple[int, int] | None) -> str:
    """An interval of whole numbers in words."""
    if ends is None:
        return "unknown"
    low, high = ends
    return str(low) if low == high else f"{low} to {high}"


def _record(plateau: Plateau) -> dict:
    fields = {name: value for name, value in vars(plateau).items() if name != "saddle"}
    if plateau.saddle is not None:
        fields |= {f"saddle_{name}": value.item() for name, value in vars(plateau.saddle).items() if name != "net"}
    return {name: None if value in (np.inf, -np.inf) else value for name, value in fields.items()}


@safe_to_interrupt
def plateaus(
    flow: Flow,
    task: Task | Callable[[Any], Array] | None = None,
    *,
    polish: bool = False,
    check: Flow | None = None,
    rank_tolerance: float = RANK_TOLERANCE,
) -> Plateaus:
    """The plateaus of a single flow, from the rows it kept.

    A plateau is a local minimum of `‖∇𝓛‖` along the flow; it lasts from the steepest descent before it to the steepest
    descent after it, which are local maxima of `−d𝓛/d log t = t‖∇𝓛‖²`. Minima count from which `‖∇𝓛‖²` rises by a factor
    e, the unit of the logarithm, before it falls below them again on either side. The end of a flow that is still slowing
    down is no plateau; a flow that has come to rest, whose gradient is nothing but
    rounding, ends on one plateau, the last, without an end. Where the gradient jumps at kinks, or an explicit step is
    bounded by stability, `‖∇𝓛‖` also has minima that mean nothing. So from one plateau to the next the loss must fall by
    more than 1e-7 of itself, and faster, on the whole, than the geometric mean of `‖∇𝓛‖²` on both.

    **Arguments:**

    - `flow`: of [`saddlejax.gradient_flow`][], with a row a step (the default) or at many times.
    - `task`: the task of the flow, or its function `loss(model) -> scalar`; needed where the flow does not know it, see
      [`saddlejax.Flow`][].
    - `polish`: also search for the stationary points nearby. Needs the weights: `save=Save(weights=True)`.
    - `check`: the same flow at another tolerance, to see how far the times can be trusted.
    - `rank_tolerance`: singular values count towards the rank of a matrix where they exceed this part of the largest that
      the matrix ever has along the flow. So the network at the origin has rank zero. The same holds for the Jacobian
      `Jf(x)`, of which the largest at the end of the flow sets the scale; where the weights were not kept, the lower end
      of `bottleneck_rank` is 0.

    **Returns:** [`saddlejax.staircase.Plateaus`][].

    **Raises:** `ValueError` for a batch of flows, where the flow did not keep what is asked for, and under `jit`, `vmap` or
    `grad`: it runs on the host.
    """
    _check.not_traced("staircase.plateaus", flow=flow, task=task, check=check)
    if flow.losses.ndim != 1:
        raise _check.fail(
            "flow",
            "be a single one",
            f"a batch of shape {flow.losses.shape[:-1]}",
            "Take one lane: jax.tree.map(lambda a: a[0], flow).",
        )
    if flow.singular_values is None:
        raise _check.fail("flow", "have kept its singular values", "run with Save(singular_values=False)")
    task = flow.task if task is None else task
    if polish and (flow.weights is None or task is None):
        missing, remedy = (
            ("its weights", "Run it with save=saddlejax.Save(weights=True).")
            if flow.weights is None
            else ("its task", "Pass task=.")
        )
        raise _check.fail("flow", f"know {missing} for polish=True", "without", remedy)
    _check.positive_number("rank_tolerance", rank_tolerance)

    known = np.flatnonzero(np.isfinite(np.asarray(flow.losses)))
    log_times, losses = np.asarray(flow.log_times, float)[known], np.asarray(flow.losses, float)[known]
    perceptron = flow.imbalance is not None
    log_gradients, rounding = _log_gradients(flow, known, perceptron)
    slopes = 2 * np.maximum(log_gradients, rounding)
    matrices = [i for i, values in enumerate(flow.singular_values) if values is not None]
    spectra = [np.asarray(flow.singular_values[i])[known] for i in matrices]
    moved = _moved(flow)
    parameters = Parameters.of(flow.net, moved)

    def at(row: int) -> PyTree:
        assert flow.weights is not None
        return parameters.with_arrays([w[row] for w in flow.weights])

    jacobians = None
    if isinstance(task, Task) and flow.weights is not None:
        jacobians = partial(_jacobian_values, task=task)
        scale = np.asarray(jacobians(at(int(known[-1])))).max()
    bottoms, heights = _bottoms(slopes)
    bottoms, heights = _left_for_good(bottoms, heights, log_times, losses, slopes)
    stretches = itertools.pairwise([*bottoms, len(known)])
    escapes = [_steepest(log_times, slopes, first, last) for first, last in stretches]
    ends = [_end(flow, log_times, slopes, losses, escape) for escape in escapes]
    vanished = np.asarray(flow.gradient_norms)[known] == 0
    at_rest = _rest(flow, vanished | (log_gradients <= rounding))
    if at_rest is not None and (not bottoms or np.isfinite(ends[-1])):
        heights.append(float(np.max(slopes[(bottoms or [0])[-1] :]) - slopes[at_rest]))
        bottoms.append(at_rest)
        ends.append(np.inf)
    levels = _levels(flow, [int(known[bottom]) for bottom in bottoms])
    errors = [
        None if check is None else crossing_log_time(check, level) - crossing_log_time(flow, level) for level in levels
    ]
    found = []
    for i, (bottom, height) in enumerate(zip(bottoms, heights, strict=True)):
        row = int(known[bottom])
        ranks = tuple(int(np.sum(s[bottom] > rank_tolerance * s.max())) for s in spectra)
        bottleneck = (0, min(ranks)) if perceptron else None
        if jacobians is not None:
            values = np.asarray(jacobians(at(row)))
            least = int((values > rank_tolerance * scale).sum(axis=1).max())
            bottleneck = (min(least, *ranks), min(ranks)) if perceptron else (least, values.shape[1])
        found.append(
            Plateau(
                log_start=ends[i - 1] if i else -np.inf,
                log_end=ends[i],
                log_time=float(log_times[bottom]),
                row=row,
                loss=float(flow.losses[row]),
                gradient_norm=float(flow.gradient_norms[row]),
                prominence=height,
                ranks=ranks,
                stable_ranks=tuple(_stable_rank(s[bottom]) for s in spectra),
                bottleneck_rank=bottleneck,
                saddle=nearby_stationary_point(at(row), task, moved) if polish and task is not None else None,
                log_end_error=errors[i],
            )
        )
    kinked = perceptron and flow.net.depth > 1 and slope_jumps(flow.net.activation)
    groups = tuple(flow.names[i] for i in matrices)
    return Plateaus(tuple(found), groups, rank_tolerance, known_roughly=kinked and check is None)


def _moved(flow: Flow) -> PyTree[bool]:
    """Which leaves of the model moved along the flow."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path).lstrip(".") in flow.names, flow.net
    )


def _log_gradients(flow: Flow, rows: np.ndarray, perceptron: bool) -> tuple[np.ndarray, np.ndarray]:
    """`log ‖∇𝓛‖` row by row, and what may be nothing but rounding of it."""
    gradients, norms = np.asarray(flow.gradient_norms)[rows], np.asarray(flow.layer_norms)[rows]
    logs = np.log(np.maximum(gradients, np.finfo(gradients.dtype).tiny))
    sensitivity = np.zeros_like(logs)
    if perceptron:
        with np.errstate(divide="ignore"):  # layers may be zero
            sensitivity = log_sensitivity(np.log(norms))
    rounding = log_gradient_rounding(np.max(logs - sensitivity), sensitivity)
    if "box_problems" in flow.stats:  # slopes at kinks are rounded too
        rounding = np.maximum(rounding, np.max(logs) + ROUNDING_OF_SLOPES * np.log(np.finfo(gradients.dtype).eps))
    return logs, rounding


def _rest(flow: Flow, is_rounding: np.ndarray) -> int | None:
    """The row from which on the flow is at rest; None where it is not at its end."""
    if is_rounding[-1]:
        return int(np.flatnonzero(~is_rounding)[-1]) + 1 if not is_rounding.all() else 0
    rests = flow.status in (Status.stationary, Status.below_rounding)
    return len(is_rounding) - 1 if rests else None


def _stable_rank(values: np.ndarray) -> float:
    """`‖W‖_F²/‖W‖_op²` from the singular values, largest first; 0 for a layer that is zero."""
    return float(np.sum((values / values[0]) ** 2)) if values[0] > 0 else 0.0


def _bottoms(slopes: np.ndarray) -> tuple[list[int], list[float]]:
    """The rows of the minima that count, and their prominences. Before the flow began there was nothing lower."""
    bottoms, found = scipy.signal.find_peaks([-np.inf, *-slopes], prominence=E_FOLD)
    return (bottoms - 1).tolist(), found["prominences"].tolist()


def _left_for_good(
    bottoms: list[int], heights: list[float], log_times: np.ndarray, losses: np.ndarray, slopes: np.ndarray
) -> tuple[list[int], list[float]]:
    """The minima between which the loss falls faster, on the whole, than the gradients at both say."""
    while len(bottoms) > 0:
        ends = [*bottoms[1:], _steepest(log_times, slopes, bottoms[-1], len(losses))]
        with np.errstate(divide="ignore", invalid="ignore"):
            fall = np.log(np.maximum(losses[bottoms] - losses[ends], 0))
            # log(t_1 − t_0), where the times themselves may overflow.
            length = log_times[ends] + np.log1p(-np.exp(log_times[bottoms] - log_times[ends]))
        there = 0.5 * (slopes[bottoms] + slopes[[*bottoms[1:], bottoms[-1]]])
        # Rather for ever at one loss than from plateau to plateau.
        gain = np.where(
            losses[bottoms] - losses[ends] > SAME_LOSS * np.abs(losses[bottoms]), fall - length - there, -np.inf
        )
        worst = int(np.argmin(gain))
        if gain[worst] > 0:
            break
        last = worst == len(bottoms) - 1
        drop = worst if last or slopes[bottoms[worst]] > slopes[bottoms[worst + 1]] else worst + 1
        del bottoms[drop], heights[drop]
    return bottoms, heights


def _steepest(log_times: np.ndarray, slopes: np.ndarray, first: int, last: int) -> int:
    """The row of the largest `t‖∇𝓛‖²` between two bottoms."""
    return first + int(np.argmax((log_times + slopes)[first:last]))


def _levels(flow: Flow, rows: list[int]) -> list[float]:
    """The losses halfway between plateaus, and between the last one and the end."""
    losses = [float(flow.losses[row]) for row in rows] + [float(np.nanmin(flow.losses))]
    return [0.5 * (above + below) for above, below in itertools.pairwise(losses)]


def crossing_log_time(flow: Flow, level: float) -> float:
    """`log t` where the loss first falls to a level, by a cubic polynomial within a step (`d𝓛/dt = −‖∇𝓛‖²`)."""
    losses = np.asarray(flow.losses)
    below = np.flatnonzero(losses <= level)
    if len(below) == 0:
        return np.nan
    rows = [max(int(below[0]) - 1, 0), int(below[0])]
    # In units of the later time, since times and squares of gradients may overflow and underflow.
    unit = float(flow.log_times[rows[1]])
    times = np.exp(np.asarray(flow.log_times, float)[rows] - unit)
    with np.errstate(divide="ignore"):
        slopes = -np.exp(2 * np.log(np.asarray(flow.gradient_norms, float)[rows]) + unit)
    if not times[1] > times[0]:
        return unit
    curve = scipy.interpolate.CubicHermiteSpline(times, losses[rows].astype(float) - level, slopes)
    roots = [time for time in curve.roots(extrapolate=False) if times[0] <= time <= times[1]]
    return unit + float(np.log(roots[0] if roots else times[1]))


def _end(flow: Flow, log_times: np.ndarray, slopes: np.ndarray, losses: np.ndarray, escape: int) -> float:
    """When a plateau ended; infinite where the flow was still speeding up at its end."""
    if escape == len(log_times) - 1:
        return float(log_times[escape]) if bool(flow.status == Status.escaped) else np.inf
    return _log_time_of_steepest(log_times, slopes, losses, escape)


def _log_time_of_steepest(log_times: np.ndarray, slopes: np.ndarray, losses: np.ndarray, row: int) -> float:
    """`log t` of the largest `t‖∇𝓛‖²` next to a row.

    Between two rows `‖∇𝓛‖²` is taken for the quadratic polynomial in `t` with its values there and the integral that is the
    loss lost, since `d𝓛/dt = −‖∇𝓛‖²`.
    """
    x = np.linspace(0, 1, 401)
    best, found = log_times[row] + slopes[row], log_times[row]
    for first in (max(row - 1, 0), row):
        unit = log_times[first + 1]  # of time, which may overflow
        begin = np.exp(log_times[first] - unit)
        t = begin + (1 - begin) * x
        ends = np.exp(slopes[first : first + 2] + unit)
        bend = 6 * ((losses[first] - losses[first + 1]) / (1 - begin) - ends.mean()) if begin < 1 else 0.0
        heights = t * (ends[0] * (1 - x) + ends[1] * x + bend * x * (1 - x))
        top = int(np.argmax(heights))
        if heights[top] > np.exp(best):
            best, found = np.log(heights[top]), unit + np.log(t[top])
    return float(found)


@eqx.filter_jit
def _jacobian_values(model: PyTree, task: Task) -> Float[Array, "samples values"]:
    """The singular values of `Jf(x)` for every sample, largest first."""
    with jax.default_matmul_precision("highest"):
        jacobians = jax.vmap(jax.jacrev(model))(task.x)
    return jnp.linalg.svd(jacobians.reshape(*jacobians.shape[:2], -1), compute_uv=False)
