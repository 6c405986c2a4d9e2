"""What a saddle-to-saddle run costs: the stiff integrator against the explicit one.

    python benchmarks/staircase.py [--quick] [--json staircase.json] [--figure staircase_cost.png]

1. Work against the init scale, linear teacher of singular values 4, 2, 1, ½, width 10: both integrators, each crossing
   time against the stiff one at a tight tolerance, and that one against SciPy's LSODA at the largest scale.
2. Nonlinear networks on 200 digits: tanh by both integrators; ReLU, where the explicit one does better.
3. Width 100, depth 4: time and memory of the stiff run, and the time of an explicit one at a larger scale.
"""

import argparse
import json
import resource
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.integrate import solve_ivp

import saddlejax as sj
from saddlejax.staircase import crossing_log_time

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

STRENGTHS = (4.0, 2.0, 1.0, 0.5)
LEVELS = (6.625, 1.625, 0.375, 0.0625)
END = 1e-2
EXPLICIT_STEPS = 300_000
TINY = sj.Save(singular_values=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small scales and width 100 left out")
    parser.add_argument("--json", help="file to write all numbers to")
    parser.add_argument("--figure", help="file to draw work against scale to")
    options = parser.parse_args()
    scales = [1e-1, 3e-2, 1e-2] if options.quick else [1e-1, 3e-2, 1e-2, 1e-3, 1e-4]
    results = {"linear": linear(scales), "data": data()}
    if not options.quick:
        results["wide"] = wide()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    if options.figure:
        figure(results["linear"], options.figure)


def network(task: sj.Task, width: int, depth: int, activation: str, scale: float) -> sj.MLP:
    sizes = [task.in_size, *[width] * (depth - 1), task.out_size]
    return sj.scale_layers(sj.MLP(sizes, activation, key=jax.random.key(0)), scale)


def timed(*arguments, **options) -> tuple[sj.Flow, float]:
    """A flow, and its seconds without compilation."""
    sj.gradient_flow(*arguments, **options)
    begin = time.perf_counter()
    flow = sj.gradient_flow(*arguments, **options)
    jax.block_until_ready(flow.losses)
    return flow, time.perf_counter() - begin


def crossings(flow: sj.Flow, levels) -> np.ndarray:
    return np.array([crossing_log_time(flow, level) for level in levels])


def worst(times: np.ndarray, reference: np.ndarray) -> float:
    """The largest relative error of a time; NaN where a level was not reached."""
    return float(np.max(np.abs(np.expm1(times - reference))))


def work(flow: sj.Flow, seconds: float) -> dict:
    return {name: int(count) for name, count in flow.stats.items()} | {
        "status": sj.Status[flow.status],
        "imbalance_error": float(flow.imbalance_error),
        "seconds": seconds,
    }


def linear(scales: list[float]) -> list[dict]:
    task = sj.tasks.linear_teacher(STRENGTHS, in_size=10)
    table = Table(title="Linear teacher 4, 2, 1, ½, width 10: from the origin to loss 0.01")
    columns = ("L", "ε", "stiff: gradients", "products", "s", "worst error", "explicit: gradients", "s", "worst error")
    for column in columns:
        table.add_column(column, justify="right")
    rows = []
    for depth in (3, 4):
        for scale in scales:
            net = network(task, 10, depth, "identity", scale)
            tight = sj.gradient_flow(net, task, sj.Loss(END), stiff=True, rtol=1e-6, max_steps=8192, save=TINY)
            reference = crossings(tight, LEVELS)
            stiff, seconds = timed(net, task, sj.Loss(END), stiff=True, save=TINY)
            row = {"depth": depth, "scale": scale, "stiff": work(stiff, seconds)}
            row["stiff"]["error"] = worst(crossings(stiff, LEVELS), reference)
            shown = ["", "", ""]
            if scale >= (1e-2 if depth == 3 else 3e-2):
                explicit, seconds = timed(net, task, sj.Loss(END), max_steps=EXPLICIT_STEPS, save=TINY)
                row["explicit"] = work(explicit, seconds)
                row["explicit"]["error"] = worst(crossings(explicit, LEVELS), reference)
                shown = cells(row["explicit"], products=False)
            if scale == scales[0]:
                row["tight_against_lsoda"] = worst(reference, lsoda(net, task, LEVELS))
            rows.append(row)
            table.add_row(str(depth), f"{scale:g}", *cells(row["stiff"], products=True), *shown)
    console = Console(width=130)
    console.print(table)
    checks = ", ".join(f"{r['tight_against_lsoda']:.0e}" for r in rows if "tight_against_lsoda" in r)
    console.print(f"the tight flow against SciPy's LSODA at ε = {scales[0]:g}: {checks}")
    return rows


def cells(row: dict, products: bool) -> list[str]:
    counts = [f"{row['gradient_evaluations']:,}"] + ([f"{row['hessian_vector_products']:,}"] if products else [])
    error = f"{row['error']:.0e}" if row["status"] == "loss reached" else row["status"].split(" before")[0]
    return [*counts, f"{row['seconds']:.2f}", error]


def lsoda(net: sj.MLP, task: sj.Task, levels) -> np.ndarray:
    """`log t` at the levels of a linear network, by NumPy gradients and SciPy."""
    x, y = np.asarray(task.x), np.asarray(task.y)
    shapes = [w.shape for w in net.weights]
    cuts = np.cumsum([a * b for a, b in shapes])[:-1]

    def forward(theta):
        weights = [part.reshape(shape) for part, shape in zip(np.split(theta, cuts), shapes, strict=True)]
        signals = [x]
        for w in weights:
            signals.append(signals[-1] @ w.T)
        return weights, signals

    def velocity(_, theta):
        weights, signals = forward(theta)
        delta, slopes = (signals[-1] - y) / len(x), []
        for w, h in zip(reversed(weights), reversed(signals[:-1]), strict=True):
            slopes.append(delta.T @ h)
            delta = delta @ w
        return -np.concatenate([s.ravel() for s in reversed(slopes)])

    def above(level):
        return lambda _, theta: 0.5 * np.mean(np.sum((forward(theta)[1][-1] - y) ** 2, axis=1)) - level

    events = [above(level) for level in levels]
    events[-1].terminal = True
    theta = np.concatenate([np.asarray(w).ravel() for w in net.weights])
    found = solve_ivp(velocity, (0, 1e9), theta, method="LSODA", rtol=1e-10, atol=1e-12, events=events)
    return np.log([times[0] for times in found.t_events])


def data() -> list[dict]:
    digits = sj.tasks.digits()
    task = sj.Task(digits.x[:200], digits.y[:200])
    table = Table(title="200 digits, width 10, depth 3: through the plateaus, from both integrators")
    columns = ("", "ε", "end at loss", "integrator", "gradients", "products", "s", "plateaus", "ends move at 3 × rtol")
    for column in columns:
        table.add_column(column, justify="right")
    rows = []
    cases = [("tanh", 1e-1, 0.07), ("tanh", 1e-2, 0.07), ("tanh", 1e-3, 0.07), ("relu", 1e-2, 0.2), ("relu", 1e-3, 0.2)]
    for activation, scale, end in cases:
        net = network(task, 10, 3, activation, scale)
        for stiff in (True, False) if activation == "tanh" else (False,):
            rtol = 1e-2 if stiff else 1e-4 if activation == "tanh" else 2e-4
            until, limit = sj.Loss(end), 20_000
            flow, seconds = timed(net, task, until, stiff=stiff, rtol=rtol, max_steps=limit)
            other = sj.gradient_flow(net, task, until, stiff=stiff, rtol=3 * rtol, max_steps=limit)
            found = flow.plateaus(check=other)
            moves = [p.log_end_error for p in found]
            row = {"activation": activation, "scale": scale, "loss": end, "method": flow.method} | work(flow, seconds)
            rows.append(row | {"plateau_losses": [p.loss for p in found], "ends_move": moves})
            counts = (f"{row[name]:,}" for name in ("gradient_evaluations", "hessian_vector_products"))
            name = flow.method.split(" in the")[0].split(" with")[0]
            moved = " ".join(f"{abs(move):.0e}" for move in moves)
            table.add_row(activation, f"{scale:g}", f"{end:g}", name, *counts, f"{seconds:.1f}", str(len(found)), moved)
    Console(width=170).print(table)
    return rows


def wide() -> dict:
    task = sj.tasks.linear_teacher(STRENGTHS, in_size=10)
    net = network(task, 100, 4, "identity", 1e-3)
    flow, seconds = timed(net, task, sj.Loss(END), stiff=True, save=TINY, max_steps=1024)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    explicit_net = network(task, 100, 4, "identity", 3e-2)
    explicit, explicit_seconds = timed(explicit_net, task, sj.Loss(END), save=TINY, max_steps=EXPLICIT_STEPS)
    parameters = sum(w.size for w in net.weights)
    table = Table(title=f"Width 100, depth 4 ({parameters:,} parameters)")
    for column in ("integrator", "ε", "gradients", "products", "seconds", "outcome"):
        table.add_column(column, justify="right")
    rows = {"stiff": work(flow, seconds), "explicit": work(explicit, explicit_seconds)}
    for (name, row), scale in zip(rows.items(), (1e-3, 3e-2), strict=True):
        counts = (f"{row[key]:,}" for key in ("gradient_evaluations", "hessian_vector_products"))
        table.add_row(name, f"{scale:g}", *counts, f"{row['seconds']:.1f}", row["status"])
    console = Console(width=130)
    console.print(table)
    temporary = memory()
    words = ", ".join(f"{n:,} parameters {megabytes:.0f} MB" for n, megabytes in temporary)
    console.print(f"temporary memory of a stiff flow: {words}; peak of this process {peak:.0f} MB")
    plateaus = [float(p.loss) for p in sj.gradient_flow(net, task, sj.Loss(END), stiff=True).plateaus()]
    console.print(f"plateaus of the stiff run: {', '.join(f'{loss:.6g}' for loss in plateaus)}")
    return rows | {"parameters": parameters, "temporary_megabytes": temporary, "plateaus": plateaus}


def memory() -> list[tuple[int, float]]:
    """Temporary memory of a stiff flow as the width grows, as the compiler plans it; the rows are not counted."""
    task = sj.tasks.linear_teacher(STRENGTHS, in_size=10)
    sizes = []
    for width in (50, 100, 200):
        net = network(task, width, 4, "identity", 1e-3)

        def run(weights, net=net):
            flow = sj.gradient_flow(
                net.with_weights(weights), task, sj.Loss(END), stiff=True, save=sj.Save(steps=False)
            )
            return jnp.sum(flow.losses)

        plan = jax.jit(run).lower(net.weights).compile().memory_analysis()
        sizes.append((sum(w.size for w in net.weights), plan.temp_size_in_bytes / 1e6))
    return sizes


def figure(rows: list[dict], path: str) -> None:
    _, ax = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
    for depth, colour in ((3, "#0072B2"), (4, "#D55E00")):
        ours = [r for r in rows if r["depth"] == depth]
        total = [r["stiff"]["gradient_evaluations"] + 2 * r["stiff"]["hessian_vector_products"] for r in ours]
        ax.plot([r["scale"] for r in ours], total, "o-", color=colour, label=f"stiff, depth {depth}")
        theirs = [r for r in ours if r.get("explicit", {}).get("status") == "loss reached"]
        gradients = [r["explicit"]["gradient_evaluations"] for r in theirs]
        ax.plot([r["scale"] for r in theirs], gradients, "s--", color=colour, label=f"explicit, depth {depth}")
    ax.set(xscale="log", yscale="log", xlabel=r"init scale $\varepsilon$", ylabel="gradients (a product counts as two)")
    ax.invert_xaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.legend(frameon=False)
    ax.figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
