"""Which solver and tolerance give an escape time of some accuracy for the least work? Are the defaults well chosen?

    python benchmarks/work_precision.py [--activations tanh relu] [--samples 100 1000] [--depths 4] [--scales 1e-3] [--seeds 3]

Networks of width 32 on a single-index teacher of 10 inputs leave the plateau of small weights, down to the loss at the steepest
point of their first descent. Compared, each at many tolerances:

- `gradient_flow(solver=…)` with Bosh3, Tsit5, Dopri5 and Dopri8, in the plateau clock; the defaults are marked;
- plain diffrax in time t with Bosh3, Tsit5 and Dopri8 and an absolute tolerance of `rtol ε`, without which it is wrong.

The reference is independent of the library's integrator: the classical Runge-Kutta method with fixed steps in a clock of its own,
`dθ/ds = −‖θ‖∇𝓛/‖∇𝓛‖`, which no step control can mislead at kinks. What halving its step changes is stated as its error.
Work and error are medians over networks (depths, scales and seeds); a run that finds no escape with 5,000 gradients, as where the step
control chatters at kinks, counts as an infinite error.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import common
import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from matplotlib.figure import Figure
from rich.progress import track
from scipy.interpolate import CubicHermiteSpline

import saddlejax as sj
from saddlejax.flow.plan import KINKED_RTOL, SMOOTH_RTOL
from saddlejax.objective import task_loss
from saddlejax.tasks.task import zero_loss

jax.config.update("jax_enable_x64", True)

SMALL = sj.Save(steps=False, singular_values=False)
MOST_GRADIENTS = 5_000
MOST_REFERENCE_STEPS = 200_000
TARGETS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TOLERANCES = {
    "tanh": (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6, 1e-7, 1e-8),
    "relu": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 5e-4, 2e-4, 1e-4, 3e-5, 1e-5),
}
REFERENCE_STEP = {"tanh": 5e-3, "relu": 5e-4}
MANY_SAMPLES = 500  # which smooth the kinks: twice the step will do
DEFAULT = {"tanh": ("Tsit5", SMOOTH_RTOL), "relu": ("Bosh3", KINKED_RTOL)}
PLATEAU_SOLVERS = {"Bosh3": dfx.Bosh3(), "Tsit5": dfx.Tsit5(), "Dopri5": dfx.Dopri5(), "Dopri8": dfx.Dopri8()}
TIME_SOLVERS = ("Bosh3", "Tsit5", "Dopri8")
CLOCK, TIME = "plateau clock", "time t"
QUICK = {
    "activations": ["tanh"],
    "samples": [20],
    "depths": [3],
    "scales": [1e-2],
    "seeds": 1,
    "width": 4,
    "solvers": ["Tsit5"],
}

Key = tuple[str, str]
"""A method: its solver and its clock."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "work_precision")
    parser.add_argument("--activations", nargs="+", choices=("tanh", "relu"), default=["tanh", "relu"])
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--depths", type=int, nargs="+", default=[4])
    parser.add_argument("--scales", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--solvers", nargs="+", choices=PLATEAU_SOLVERS, default=list(PLATEAU_SOLVERS))
    options = common.parse(parser, arguments, QUICK)
    panels = [panel(activation, samples, options) for activation in options.activations for samples in options.samples]
    tables = [targets_table(p) for p in panels] + [defaults_table(panels)]
    common.save(options, tables, panels, figure(panels, options))


def panel(activation: str, samples: int, options: argparse.Namespace) -> dict[str, Any]:
    """All methods at all tolerances on one kind of problem; medians, and every single run."""
    task = sj.tasks.single_index(jnp.tanh, in_size=10, samples=samples, key=jax.random.key(1))
    methods = {(name, CLOCK): plateau(PLATEAU_SOLVERS[name], task) for name in options.solvers}
    methods |= {(name, TIME): physical(PLATEAU_SOLVERS[name], task) for name in options.solvers if name in TIME_SOLVERS}
    runs: dict[Key, list[list[tuple[float, float]]]] = {key: [] for key in methods}
    reference_errors = []
    cases = list(itertools.product(options.depths, options.scales, range(options.seeds)))
    for depth, scale, seed in track(cases, description=f"{activation}, {samples} samples"):
        sizes = [10, *[options.width] * (depth - 1), 1]
        net = sj.scale_layers(sj.MLP(sizes, activation, key=jax.random.key(seed)), scale)
        step = REFERENCE_STEP[activation] * (2 if samples > MANY_SAMPLES and activation == "relu" else 1)
        level = float(sj.gradient_flow(net, task, save=SMALL).losses[-1])
        coarse, log_time = (reference(net, task, level, h) for h in (2 * step, step))
        if not np.isfinite(log_time):
            print(f"left out: no escape of {activation}, depth {depth}, scale {scale:g}, seed {seed}")
            continue
        reference_errors.append(abs(np.expm1(coarse - log_time)))
        for key, method in methods.items():
            found = [method(net, level, jnp.asarray(rtol), scale, log_time) for rtol in TOLERANCES[activation]]
            runs[key].append(
                [(work, float(np.nan_to_num(abs(np.expm1(log - log_time)), nan=np.inf))) for work, log in found]
            )
    lines = []
    for (solver, clock), single in runs.items():
        work, error = np.median(np.asarray(single), axis=0).T
        lines.append({"solver": solver, "clock": clock, "gradients": work, "error": error, "runs": single})
    return {
        "activation": activation,
        "samples": samples,
        "rtol": TOLERANCES[activation],
        "reference_errors": reference_errors,
        "lines": lines,
    }


Method = Callable[[sj.MLP, float, jax.Array, float, float], tuple[float, float]]
"""Gradient evaluations and `log t` where the loss falls to a level, given the tolerance, the init scale and the `log t` to expect."""


def plateau(solver: dfx.AbstractERK, task: sj.Task) -> Method:
    """By the library."""
    most = MOST_GRADIENTS // (solver.tableau.num_stages - 1)
    height = float(zero_loss(task))

    @jax.jit
    def escape(net, fraction, rtol):
        until = sj.Escape(loss_fraction=fraction)
        flow = sj.gradient_flow(net, task, until, rtol=rtol, solver=solver, save=SMALL, max_steps=most)
        return flow.stats["gradient_evaluations"], flow.log_escape_time

    def method(net, level, rtol, scale, log_time):
        gradients, found = escape(net, level / height, rtol)
        return float(gradients), float(found)

    return method


def physical(solver: dfx.AbstractERK, task: sj.Task) -> Method:
    """By diffrax in time t; it is told not to go beyond twice the escape time."""
    stages = solver.tableau.num_stages - 1  # the last stage of a step is the first of the next

    @jax.jit
    def escape(net, level, rtol, atol, end):
        def velocity(t, weights, args):
            return jax.tree.map(jnp.negative, jax.grad(lambda w: task_loss(net.with_weights(w), task))(weights))

        def above(t, y, args, **_):
            return task_loss(net.with_weights(y), task) - level

        solution = dfx.diffeqsolve(
            dfx.ODETerm(velocity),
            solver,
            0.0,
            end,
            None,
            net.weights,
            stepsize_controller=dfx.PIDController(rtol=rtol, atol=atol),
            event=dfx.Event(above, root_finder=optimistix.Newton(rtol=1e-10, atol=1e-10 * end)),
            max_steps=MOST_GRADIENTS // stages,
            throw=False,
        )
        happened = solution.result == dfx.RESULTS.event_occurred
        return 1 + stages * solution.stats["num_steps"], jnp.where(happened, jnp.log(solution.ts[-1]), jnp.nan)

    def method(net, level, rtol, scale, log_time):
        gradients, found = escape(net, level, rtol, rtol * scale, 2 * np.exp(log_time))
        return float(gradients), float(found)

    return method


def reference(net: sj.MLP, task: sj.Task, level: float, step: float) -> float:
    """`log t` of the escape by the classical Runge-Kutta method with fixed steps; a cubic polynomial in the last one."""
    (before, after), count = fixed_steps(net, task, level, jnp.asarray(step))
    if int(count) >= MOST_REFERENCE_STEPS:
        return float("nan")
    ends = np.array([0, step])
    losses, loss_slopes, times, time_slopes = (
        np.array([float(a), float(b)]) for a, b in zip(before, after, strict=True)
    )
    roots = CubicHermiteSpline(ends, losses - level, loss_slopes).roots(extrapolate=False)
    at = next(root for root in roots if 0 <= root <= step)
    return float(np.log(CubicHermiteSpline(ends, times, time_slopes)(at)))


@jax.jit
def fixed_steps(net: sj.MLP, task: sj.Task, level: float, step: jax.Array) -> tuple:
    """Loss, time and their slopes in the clock before and after the step that ends the plateau, and the steps taken."""

    def rates(weights):
        loss, slopes = jax.value_and_grad(lambda w: task_loss(net.with_weights(w), task))(weights)
        square = sum(jnp.sum(g**2) for g in slopes)
        tau = jnp.sqrt(sum(jnp.sum(w**2) for w in weights) / square)
        return tuple(-tau * g for g in slopes), tau, loss, -tau * square

    def moved(weights, velocity, size):
        return tuple(w + size * v for w, v in zip(weights, velocity, strict=True))

    def take(carry):
        weights, time, _, now, count = carry
        first, tau, loss, loss_slope = rates(weights)
        stages, taus = [first], [tau]
        for share in (0.5, 0.5, 1.0):
            velocity, tau, *_ = rates(moved(weights, stages[-1], share * step))
            stages.append(velocity)
            taus.append(tau)
        mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, *stages)
        gained = step * (taus[0] + 2 * taus[1] + 2 * taus[2] + taus[3]) / 6
        return moved(weights, mean, step), time + gained, now, (loss, loss_slope, time, taus[0]), count + 1

    def going(carry):
        return (carry[3][0] > level) & (carry[4] < MOST_REFERENCE_STEPS)

    unknown = (jnp.asarray(jnp.inf), *3 * (jnp.zeros(()),))
    _, _, before, after, count = jax.lax.while_loop(going, take, (net.weights, jnp.zeros(()), unknown, unknown, 0))
    return (before, after), count


def fewest(line: dict[str, Any], target: float) -> float:
    """The least median work with a median error of at most the target."""
    good = [work for work, error in zip(line["gradients"], line["error"], strict=True) if error <= target]
    return min(good, default=np.nan)


def targets_table(p: dict[str, Any]) -> common.Table:
    worst = max(p["reference_errors"])
    title = f"{p['activation']}, {p['samples']} samples: fewest gradients to an error (reference good to {worst:.0e})"
    targets = [t for t in TARGETS if t > worst]
    best = {t: np.nanmin([fewest(line, t) for line in p["lines"]] + [np.inf]) for t in targets}

    def cell(line: dict[str, Any], target: float) -> str:
        work = fewest(line, target)
        return "–" if np.isnan(work) else f"{work:,.0f}{' *' if work == best[target] else ''}"

    rows = [[f"{line['solver']}, {line['clock']}", *(cell(line, t) for t in targets)] for line in p["lines"]]
    return common.Table(title, ["solver (* the fewest)", *(f"{t:g}" for t in targets)], rows)


def defaults_table(panels: list[dict[str, Any]]) -> common.Table:
    """The library's defaults, and the cheapest method that is as good."""
    columns = [
        "problem",
        "default",
        "gradients",
        "median error",
        "cheapest as good: solver, rtol",
        "its gradients",
        "its error",
    ]
    rows = []
    for p in panels:
        line, at = of_default(p)
        if line is None:
            continue
        error = line["error"][at]
        rivals = [
            (work, other["error"][i], f"{other['solver']}, {other['clock']}, {p['rtol'][i]:g}")
            for other in p["lines"]
            for i, work in enumerate(other["gradients"])
            if other["error"][i] <= max(error, max(p["reference_errors"]))
        ]
        work, best_error, name = min(rivals)
        rows.append(
            [
                f"{p['activation']}, {p['samples']} samples",
                f"{line['solver']}, {p['rtol'][at]:g}",
                f"{line['gradients'][at]:,.0f}",
                f"{error:.0e}",
                name,
                f"{work:,.0f}",
                f"{best_error:.0e}",
            ]
        )
    return common.Table("The defaults", columns, rows)


def of_default(p: dict[str, Any]) -> tuple[dict[str, Any] | None, int]:
    """The line of the library's default solver, None where that was not asked for, and the place of its tolerance."""
    solver, rtol = DEFAULT[p["activation"]]
    line = next((line for line in p["lines"] if (line["solver"], line["clock"]) == (solver, CLOCK)), None)
    return line, p["rtol"].index(rtol)


def figure(panels: list[dict[str, Any]], options: argparse.Namespace) -> Figure:
    """Error against work, a panel for each activation and number of samples."""
    result, grid = common.axes(len(options.samples), len(options.activations), sharey="row")
    names = list(PLATEAU_SOLVERS)
    for ax, p in zip(grid.flat, panels, strict=True):
        for line in p["lines"]:
            kept = np.isfinite(line["error"])
            clock = line["clock"] == CLOCK
            style = common.style(names.index(line["solver"])) | {"linewidth": 1.4 if clock else 0.9, "markersize": 4}
            style |= {} if clock else {"linestyle": "--", "markerfacecolor": "white"}
            error = np.maximum(line["error"], 1e-12)
            ax.loglog(line["gradients"][kept], error[kept], label=f"{line['solver']}, {line['clock']}", **style)
        line, at = of_default(p)
        star = {"marker": "*", "markersize": 15, "color": "black", "linestyle": "", "zorder": 5, "fillstyle": "none"}
        if line is not None:
            ax.loglog(line["gradients"][at], line["error"][at], label="the default", **star)
        worst = float(np.median(p["reference_errors"]))
        ax.axhspan(1e-12, max(worst, 1e-12), color="0.9", linewidth=0, zorder=0, label="error of the reference")
        ax.set_title(f"{p['activation']}, {p['samples']} samples")
        ax.set_ylim(bottom=max(0.3 * worst, 1e-11))
    for ax in grid[-1]:
        ax.set_xlabel("gradient evaluations to the escape")
    for ax in grid[:, 0]:
        ax.set_ylabel("relative error of the escape time")
    handles, labels = grid[0][0].get_legend_handles_labels()
    result.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3 if len(options.samples) > 1 else 2,
        frameon=False,
        fontsize="small",
    )
    return result


if __name__ == "__main__":
    main()
