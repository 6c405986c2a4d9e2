"""What do escape directions cost, against Adam, L-BFGS and Riemannian gradient descent? Does a fourth layer ever help?

    python benchmarks/directions.py [--starts 8] [--samples 1797] [--problems 8]

1. Work: gradient evaluations to a plain residual of 1e-3 on digits (ReLU, width 24), from the same random starts, on `−log s`:
   this library's ascent, SciPy's L-BFGS-B, optax's Adam, and Riemannian gradient descent on the product of spheres with
   Barzilai-Borwein steps and a non-monotone line search, and with fixed steps. Adam and the fixed steps get, at every depth, the best of
   several rates and schedules, found on the first starts (that search is not counted). A start that does not get there counts as
   the limit. Besides, the whole of `escape_direction`, which goes on to a Clarke-stationary point near rounding.
2. Search: random small problems; is the speed found with four layers larger than with three?
3. Memory: temporary memory of one gradient as the samples grow.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from rich.progress import track
from scipy.optimize import minimize

import saddlejax as sj
from saddlejax.saddle.ascent import climb, random_starts, unit_layers
from saddlejax.saddle.origin import Origin, energy, tangent

jax.config.update("jax_enable_x64", True)

TARGET = 1e-3
FOREVER = 1e9
ADAM = [(1e-2, FOREVER), (3e-2, FOREVER), (3e-2, 300.0), (3e-2, 600.0), (1e-1, 300.0)]
FIXED_STEPS = [0.1, 0.3, 1.0]
TUNING_STARTS = 2
MEMORY, DECREASE = 10, 1e-4
QUICK = {
    "starts": 2,
    "depths": [3],
    "problems": 0,
    "samples": 40,
    "width": 4,
    "limit": 300,
    "whole": False,
    "memory_samples": 100,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "directions")
    parser.add_argument("--starts", type=int, default=8, help="random starts for each depth")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--samples", type=int, default=1797, help="digits, of 1797")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument(
        "--whole", action=argparse.BooleanOptionalAction, default=True, help="all of escape_direction too"
    )
    parser.add_argument("--limit", type=int, default=1000, help="most gradient evaluations from a start")
    parser.add_argument("--problems", type=int, default=8, help="random problems in the search")
    parser.add_argument("--memory-samples", type=int, default=8000, help="samples in the memory test")
    parser.add_argument("--full", action="store_true", help="memory test at 60,000 × 784, width 1,000 (minutes)")
    options = common.parse(parser, arguments, QUICK)
    rows = [work(depth, options) for depth in track(options.depths, description="work")]
    found = [both_depths(number) for number in track(range(options.problems), description="search")]
    size = (60_000, 784, 1000, (1,)) if options.full else (options.memory_samples, 200, 250, (0.25, 1, 4))
    sizes = memory(*size)
    tables = [work_table(rows, options), *([search_table(found)] if found else []), memory_table(sizes)]
    notes = ["; ".join(f"L = {row['depth']}: {row['settings']}" for row in rows)]
    common.save(options, tables, {"work": rows, "search": found, "memory": sizes}, figure(rows), notes)


def work(depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """Gradient evaluations to the target residual from every start, and those of the whole library call."""
    digits = sj.tasks.digits()
    task = sj.Task(digits.x[: options.samples], digits.y[: options.samples])
    origin, limit = Origin(task, tangent("relu")), options.limit
    sizes = (task.in_size, *[options.width] * (depth - 1), task.out_size)
    first = random_starts(sizes, options.starts, jax.random.key(depth), task.x.dtype)
    ours = climb(first, origin, jnp.asarray(TARGET), jnp.asarray(limit))
    reached = np.asarray(ours.residual) <= TARGET
    counts = {"saddlejax": np.where(reached, ours.evaluations, limit).tolist()}
    starts = [positive(lane(first, i), origin) for i in range(options.starts)]
    evaluate = cost_and_residual(starts[0][1], origin)
    points = jnp.stack([point for point, _ in starts])
    counts["SciPy L-BFGS"] = [scipy_evaluations(point, evaluate, limit) for point in points]
    on_spheres = riemannian(evaluate, starts[0][1], limit)
    counts["Riemannian, BB steps"] = on_spheres(points, 1.0, True)
    counts["Riemannian, best fixed step"], best = tuned(on_spheres, points, [(step, False) for step in FIXED_STEPS])
    settings = [f"fixed steps of {best[0]:g}"]
    counts["Adam, best rate"], best = tuned(adam(evaluate, limit), points, ADAM)
    settings.append(f"Adam at {best[0]:g}" + (f" falling to zero in {best[1]:g}" if best[1] < FOREVER else ""))
    row = {"depth": depth, "evaluations": counts, "settings": ", ".join(settings), "limit": limit}
    if options.whole:
        best = sj.escape_direction(task, sizes, "relu", starts=options.starts, key=jax.random.key(depth))
        random = np.asarray(best.start_kinds) == 0
        row["whole_call"] = np.asarray(best.gradient_evaluations)[random].tolist()
        row["worst_clarke_residual"] = float(np.max(np.asarray(best.residuals)))
    return row


def tuned(method: Callable[..., list[int]], points: jax.Array, settings: list[tuple]) -> tuple[list[int], tuple]:
    """Evaluations with the settings that need the fewest from the first starts, and these settings."""
    medians = [np.median(method(points[:TUNING_STARTS], *setting)) for setting in settings]
    best = settings[int(np.argmin(medians))]
    return method(points, *best), best


def lane(weights, i):
    return tuple(w[i] for w in weights)


Evaluate = Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def cost_and_residual(restore: Callable, origin: Origin) -> Evaluate:
    """`−log s` with its gradient, and the plain residual at unit norm."""

    def cost(point):
        return -jnp.log(energy(unit_layers(restore(point)), origin))

    @jax.jit
    def evaluate(point):
        value, slope = jax.value_and_grad(cost)(point)
        layers = zip(restore(point), restore(slope), strict=True)
        return value, slope, jnp.sqrt(sum(jnp.sum(w**2) * jnp.sum(g**2) for w, g in layers))

    return evaluate


def positive(start, origin):
    sign = jnp.sign(energy(start, origin))
    return ravel_pytree((*start[:-1], sign * start[-1]))


class Done(Exception):
    """The residual is small enough."""


def scipy_evaluations(point: jax.Array, evaluate: Evaluate, limit: int) -> int:
    count = 0

    def counted(x):
        nonlocal count
        count += 1
        value, slope, residual = evaluate(jnp.asarray(x))
        if residual <= TARGET:
            raise Done
        return float(value), np.asarray(slope)

    try:
        bounds = {"maxcor": 16, "maxfun": limit, "maxiter": limit, "ftol": 0, "gtol": 0}
        minimize(counted, np.asarray(point), jac=True, method="L-BFGS-B", options=bounds)
    except Done:
        return count
    return limit


def adam(evaluate: Evaluate, limit: int) -> Callable[..., list[int]]:
    """Evaluations of Adam from every point, its rate falling to zero as a cosine over the horizon."""
    scaling = optax.scale_by_adam()

    @jax.jit
    def run(point, rate, horizon):
        def turn(carry):
            point, state, _, count = carry
            _, slope, residual = evaluate(point)
            update, state = scaling.update(slope, state)
            now = 0.5 * rate * (1 + jnp.cos(jnp.pi * jnp.minimum(count / horizon, 1)))
            return point - now * update, state, residual, count + 1

        first = (point, scaling.init(point), jnp.inf, 0)
        return jax.lax.while_loop(lambda c: (c[2] > TARGET) & (c[3] < limit), turn, first)[3]

    return lambda points, *settings: [int(run(point, *map(jnp.asarray, settings))) for point in points]


def riemannian(evaluate: Evaluate, restore: Callable, limit: int) -> Callable[..., list[int]]:
    """Evaluations of gradient descent on the product of spheres from every point.

    `adaptive` steps are those of Barzilai and Borwein under the non-monotone line search of Grippo, Lampariello and Lucidi; otherwise
    every step has the same length and is taken.
    """

    @jax.jit
    def run(point, first_step, adaptive):
        start = ravel_pytree(unit_layers(restore(point)))[0]
        value, slope, residual = evaluate(start)  # of unit layers: tangent to the spheres, since the cost has no scale
        past = jnp.full(MEMORY, -jnp.inf).at[0].set(value)

        def turn(carry):
            point, slope, residual, step, past, accepted, count = carry
            trial = ravel_pytree(unit_layers(restore(point - step * slope)))[0]
            value, new_slope, new_residual = evaluate(trial)
            enough = value <= jnp.max(past) - DECREASE * step * jnp.sum(slope**2)
            keep = (enough & jnp.isfinite(value)) | ~adaptive
            moved, change = trial - point, new_slope - slope
            bend = jnp.abs(jnp.dot(moved, change))
            longer = jnp.clip(jnp.sum(moved**2) / jnp.where(bend > 0, bend, 1), 1e-6, 1e3)
            new_step = jnp.where(adaptive, jnp.where(keep, longer, 0.5 * step), step)
            past = jnp.where(keep, past.at[(accepted + 1) % MEMORY].set(value), past)
            point, slope, residual = (
                jnp.where(keep, new, old) for new, old in ((trial, point), (new_slope, slope), (new_residual, residual))
            )
            return point, slope, residual, new_step, past, accepted + keep, count + 1

        first = (start, slope, residual, first_step, past, jnp.asarray(0), jnp.asarray(1))
        return jax.lax.while_loop(lambda c: (c[2] > TARGET) & (c[6] < limit), turn, first)[6]

    return lambda points, *settings: [int(run(point, *map(jnp.asarray, settings))) for point in points]


def work_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> common.Table:
    names = list(rows[0]["evaluations"])
    columns = ["L", *names] + (["all of escape_direction", "its worst Clarke residual"] if options.whole else [])
    body = []
    for row in rows:
        ours = np.median(row["evaluations"]["saddlejax"])
        cells = []
        for name in names:
            median = np.median(row["evaluations"][name])
            words = f"≥ {median:g}" if median >= row["limit"] else f"{median:g}"
            cells.append(words if name == "saddlejax" else f"{words} (×{median / ours:.2g})")
        if options.whole:
            cells += [f"{np.median(row['whole_call']):g}", f"{row['worst_clarke_residual']:.0e}"]
        body.append([str(row["depth"]), *cells])
    title = (
        f"Gradient evaluations to a plain residual of {TARGET:g}, medians of {options.starts} starts "
        f"({options.samples} digits, ReLU, width {options.width})"
    )
    return common.Table(title, columns, body)


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Every start as a point, medians as bars, one group for each depth."""
    result, ((ax,),) = common.axes(1, width=6.6, height=3.8)
    names = list(rows[0]["evaluations"])
    for i, name in enumerate(names):
        style = common.style(i)
        for j, row in enumerate(rows):
            at, values = j + (i - (len(names) - 1) / 2) * 0.16, row["evaluations"][name]
            spread = at + np.linspace(-0.045, 0.045, len(values))
            ax.semilogy(
                spread, values, style["marker"], color=style["color"], markersize=3.5, alpha=0.6, markeredgewidth=0
            )
            ax.semilogy([at - 0.06, at + 0.06], [np.median(values)] * 2, color=style["color"], linewidth=2.2)
        ax.semilogy([], [], color=style["color"], marker=style["marker"], markersize=4, linewidth=2.2, label=name)
    ax.axhline(rows[0]["limit"], color="0.45", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.annotate(
        "limit", (0, rows[0]["limit"]), xycoords=("axes fraction", "data"), va="bottom", color="0.35", fontsize="small"
    )
    ax.set_xticks(range(len(rows)), [f"L = {row['depth']}" for row in rows])
    ax.grid(False, axis="x")
    ax.set_ylabel(f"gradient evaluations to a residual of {TARGET:g}")
    result.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return result


def both_depths(number: int) -> dict[str, Any]:
    """Speeds with three and with four layers on a random problem."""
    name, task = problem(number)
    three, four = (
        sj.escape_direction(task, [task.in_size, *[8] * (depth - 1), 1], starts=16, key=jax.random.key(number))
        for depth in (3, 4)
    )
    return {
        "problem": name,
        "rank_one": float(three.rank_one_speed),
        "s3": float(three.speed),
        "s4": float(four.speed),
        "gain": float(four.speed / three.speed - 1),
        "residual": float(max(three.residual, four.residual)),
    }


def search_table(found: list[dict[str, Any]]) -> common.Table:
    body = [
        [
            row["problem"],
            *(f"{row[k]:.8f}" for k in ("rank_one", "s3", "s4")),
            f"{row['gain']:.1e}",
            f"{row['residual']:.0e}",
        ]
        for row in found
    ]
    columns = ["problem", "rank one", "s3", "s4", "s4/s3 − 1", "Clarke residual"]
    return common.Table("Is a fourth layer faster than three?", columns, body)


def problem(number: int) -> tuple[str, sj.Task]:
    """Perturbed alternating targets on a circle, where rank one is poor, or random signs on a sphere."""
    rng = np.random.default_rng(number)
    if number % 2 == 0:
        frequency = (3, 5, 7, 4)[number // 2 % 4]
        angles = np.arange(2 * frequency) * np.pi / frequency + 0.1 * rng.normal(size=2 * frequency)
        x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        y = np.cos(frequency * angles) + 0.1 * rng.normal(size=len(angles))
        return f"circle, cos {frequency}θ, seed {number}", sj.Task(x, y[:, None])
    inputs, samples = (3, 4)[number // 2 % 2], (12, 20)[number // 4 % 2]
    x = rng.normal(size=(samples, inputs))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = rng.choice([-1.0, 1.0], size=samples)
    y -= x @ np.linalg.lstsq(x, y, rcond=None)[0]  # nothing for a linear network
    return f"{samples} signs in {inputs}-d, seed {number}", sj.Task(x, y[:, None])


def memory(samples: int, inputs: int, width: int, factors: tuple[float, ...]) -> list[dict[str, Any]]:
    """Temporary memory and time of one gradient of the speed, depth 6, in single precision."""
    sizes = (inputs, *[width] * 5, 10)
    weights = lane(random_starts(sizes, 1, jax.random.key(0), jnp.dtype("float32")), 0)
    rows = []
    for count in (round(factor * samples) for factor in factors):
        rng = np.random.default_rng(0)
        x, y = (jnp.asarray(rng.normal(size=(count, n)), "float32") for n in (inputs, 10))
        origin = Origin(sj.Task(x, y), tangent("relu"))
        compiled = jax.jit(jax.value_and_grad(energy)).lower(weights, origin).compile()
        _, seconds = common.timed(lambda run=compiled, origin=origin: run(weights, origin), repeats=3)
        megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
        row = {"samples": count, "inputs": inputs, "width": width, "input_megabytes": x.nbytes / 1e6}
        rows.append(row | {"temporary_megabytes": megabytes, "seconds": seconds})
    return rows


def memory_table(rows: list[dict[str, Any]]) -> common.Table:
    body = [
        [
            f"{row['samples']:,}",
            f"{row['temporary_megabytes']:.0f}",
            f"{row['input_megabytes']:.0f}",
            f"{row['seconds']:.2f}",
        ]
        for row in rows
    ]
    title = f"One gradient: {rows[0]['inputs']} inputs, width {rows[0]['width']}, depth 6, float32"
    return common.Table(title, ["samples", "temporary memory (MB)", "inputs (MB)", "seconds"], body)


if __name__ == "__main__":
    main()
