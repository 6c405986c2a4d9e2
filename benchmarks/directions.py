"""What escape directions cost, and a search for a problem where a fourth layer helps.

    python benchmarks/directions.py [--starts 12] [--problems 12] [--json directions.json]

1. Work: gradient evaluations to a plain residual of 1e-3 on the digits (width 24), from the same random starts, for this
   library's ascent, SciPy's L-BFGS-B and optax's Adam, all on `−log s`. A start that does not get there counts as the limit.
2. Search: random small problems; is the speed found with four layers larger than with three?
3. Memory: temporary memory of one gradient as the samples grow.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

import saddlejax as sj
from saddlejax.saddle.ascent import climb, random_starts, unit_layers
from saddlejax.saddle.origin import Origin, energy, tangent

jax.config.update("jax_enable_x64", True)

TARGET = 1e-3
LIMIT = 2000
ADAM_RATES = {"Adam 1e-2": 1e-2, "Adam 3e-2 falling to 0 in 600": optax.cosine_decay_schedule(3e-2, 600)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=12, help="random starts for each depth")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--problems", type=int, default=12, help="random problems in the search")
    parser.add_argument("--samples", type=int, default=8000, help="samples in the memory test")
    parser.add_argument("--full", action="store_true", help="memory test at 60,000 × 784, width 1,000 (minutes)")
    parser.add_argument("--json", help="file to write all numbers to")
    options = parser.parse_args()
    results = {
        "work": work(options.depths, options.starts),
        "search": search(options.problems),
        "memory": memory(60_000, 784, 1000, (1,)) if options.full else memory(options.samples, 200, 250, (0.25, 1, 4)),
    }
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


def work(depths: list[int], starts: int) -> list[dict]:
    """Medians over starts of the gradient evaluations to the target residual, and of the whole library call."""
    task = sj.tasks.digits()
    origin = Origin(task, tangent("relu"))
    table = Table(title=f"Gradient evaluations to a plain residual of {TARGET:g} (digits, width 24)")
    columns = ("L", "saddlejax", "SciPy L-BFGS", *ADAM_RATES, "whole call", "its Clarke residual")
    for column in columns:
        table.add_column(column, justify="right")
    rows = []
    for depth in depths:
        sizes = (task.in_size, *[24] * (depth - 1), task.out_size)
        first = random_starts(sizes, starts, jax.random.key(depth), task.x.dtype)
        ours = climb(first, origin, jnp.asarray(TARGET), jnp.asarray(LIMIT))
        counts = {"saddlejax": reached(ours.residual, ours.evaluations)}
        counts["SciPy L-BFGS"] = [scipy_evaluations(lane(first, i), origin) for i in range(starts)]
        for name, rate in ADAM_RATES.items():
            counts[name] = [adam_evaluations(lane(first, i), origin, rate) for i in range(starts)]
        best = sj.escape_direction(task, sizes, "relu", starts=starts, key=jax.random.key(depth))
        random = np.asarray(best.start_kinds) == 0
        counts["whole call"] = np.asarray(best.gradient_evaluations)[random].tolist()
        medians = {name: float(np.median(values)) for name, values in counts.items()}
        worst = float(np.max(np.asarray(best.residuals)))
        rows.append({"depth": depth, "medians": medians, "evaluations": counts, "worst_residual": worst})
        table.add_row(str(depth), *(f"{medians[name]:g}" for name in columns[1:-1]), f"{worst:.0e}")
    Console(width=130).print(table)
    return rows


def lane(weights, i):
    return tuple(w[i] for w in weights)


def reached(residuals, evaluations) -> list[int]:
    return [int(e) if r <= TARGET else LIMIT for r, e in zip(residuals, evaluations, strict=True)]


def cost_and_residual(restore, origin):
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


def scipy_evaluations(start, origin) -> int:
    point, restore = positive(start, origin)
    evaluate, count = cost_and_residual(restore, origin), 0

    def counted(x):
        nonlocal count
        count += 1
        value, slope, residual = evaluate(jnp.asarray(x))
        if residual <= TARGET:
            raise Done
        return float(value), np.asarray(slope)

    try:
        minimize(
            counted,
            np.asarray(point),
            jac=True,
            method="L-BFGS-B",
            options={"maxcor": 16, "maxfun": LIMIT, "maxiter": LIMIT, "ftol": 0, "gtol": 0},
        )
    except Done:
        return count
    return LIMIT


def adam_evaluations(start, origin, rate) -> int:
    point, restore = positive(start, origin)
    evaluate, optimiser = cost_and_residual(restore, origin), optax.adam(rate)

    @jax.jit
    def run(point):
        def going(carry):
            _, _, residual, count = carry
            return (residual > TARGET) & (count < LIMIT)

        def turn(carry):
            point, state, _, count = carry
            _, slope, residual = evaluate(point)
            update, state = optimiser.update(slope, state)
            return point + update, state, residual, count + 1

        return jax.lax.while_loop(going, turn, (point, optimiser.init(point), jnp.inf, 0))[3]

    return int(run(point))


def search(problems: int) -> list[dict]:
    """Speeds with three and with four layers on random problems."""
    table = Table(title="Is a fourth layer faster than three?")
    for column in ("problem", "rank one", "s3", "s4", "s4/s3 − 1", "Clarke residual"):
        table.add_column(column, justify="right")
    rows = []
    for number in range(problems):
        name, task = problem(number)
        three, four = (
            sj.escape_direction(task, [task.in_size, *[8] * (depth - 1), 1], starts=16, key=jax.random.key(number))
            for depth in (3, 4)
        )
        row = {
            "problem": name,
            "rank_one": float(three.rank_one_speed),
            "s3": float(three.speed),
            "s4": float(four.speed),
            "gain": float(four.speed / three.speed - 1),
            "residual": float(max(three.residual, four.residual)),
        }
        rows.append(row)
        table.add_row(
            row["problem"],
            *(f"{row[k]:.8f}" for k in ("rank_one", "s3", "s4")),
            f"{row['gain']:.1e}",
            f"{row['residual']:.0e}",
        )
    Console(width=130).print(table)
    return rows


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


def memory(samples: int, inputs: int, width: int, factors: tuple[float, ...]) -> list[dict]:
    """Temporary memory and time of one gradient of the speed, depth 6, in single precision."""
    table = Table(title=f"One gradient: {inputs} inputs, width {width}, depth 6, float32")
    for column in ("samples", "temporary memory (MB)", "inputs (MB)", "seconds"):
        table.add_column(column, justify="right")
    sizes = (inputs, *[width] * 5, 10)
    weights = lane(random_starts(sizes, 1, jax.random.key(0), jnp.dtype("float32")), 0)
    rows = []
    for count in (round(factor * samples) for factor in factors):
        rng = np.random.default_rng(0)
        x, y = (jnp.asarray(rng.normal(size=(count, n)), "float32") for n in (inputs, 10))
        origin = Origin(sj.Task(x, y), tangent("relu"))
        compiled = jax.jit(jax.value_and_grad(energy)).lower(weights, origin).compile()
        compiled(weights, origin)
        begin = time.perf_counter()
        jax.block_until_ready(compiled(weights, origin))
        seconds = time.perf_counter() - begin
        megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
        rows.append({"samples": count, "temporary_megabytes": megabytes, "seconds": seconds})
        table.add_row(str(count), f"{megabytes:.0f}", f"{x.nbytes / 1e6:.0f}", f"{seconds:.2f}")
    Console(width=130).print(table)
    return rows


if __name__ == "__main__":
    main()
