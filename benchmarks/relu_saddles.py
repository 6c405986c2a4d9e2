"""Which saddles do deep ReLU networks visit after the first, and does the bottleneck rank rise from one to the next?

    python benchmarks/relu_saddles.py [--depths 2 3 4 5 6] [--scales 1e-1 1e-2 1e-3 1e-4] [--seeds 5]

Gradient flow on the digits from He-normal weights times a scale, which slides along the kinks until the loss falls to a target, the
flow comes to rest, or it has taken its steps. On every plateau: the loss, and the interval from the largest rank of a
Jacobian of the network to the smallest rank of a layer, which holds its bottleneck rank (Bantzis, Simon & Jacot,
arXiv:2505.21722, conjecture that it rises from saddle to saddle). Singular values count above a tenth of the largest.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import common
import jax
import numpy as np
from matplotlib.figure import Figure

import saddlejax as sj

jax.config.update("jax_enable_x64", True)

QUICK = {"depths": [3], "scales": [1e-1], "seeds": 1, "width": 4, "samples": 30, "steps": 60}
PROMINENCE = 2.0
"""By how many e-folds the square of the gradient norm rises after a plateau that counts; kinks make smaller ones."""
SHOWN = 5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "relu_saddles")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--scales", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3, 1e-4])
    parser.add_argument("--seeds", type=int, default=5, help="initialisations for each depth and scale")
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--samples", type=int, default=100, help="digits")
    parser.add_argument("--target", type=float, default=0.5, help="part of the initial loss to reach")
    parser.add_argument("--rtol", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=400, help="the most steps of a flow")
    options = common.parse(parser, arguments, QUICK)
    runs = list(flows(options))
    common.save(options, [ranks(runs), ends(runs)], runs, figure(runs), notes(runs))


def flows(options: argparse.Namespace) -> Iterator[dict]:
    """All flows as plain numbers, one process for each thread."""
    cases = [
        {**vars(options), "depth": depth, "scale": scale, "seed": seed, "question": None}
        for depth, scale, seed in itertools.product(options.depths, options.scales, range(options.seeds))
    ]
    context = multiprocessing.get_context("spawn")
    cores: multiprocessing.Queue = context.Queue()
    for core in common.CORES[: options.threads]:
        cores.put(core)
    with ProcessPoolExecutor(options.threads, context, _on_one_core, (cores,)) as pool:
        for run in pool.map(one_flow, cases):
            seen = ", ".join(f"{p['loss']:.3f} ({p['rank'][0]}–{p['rank'][1]})" for p in run["plateaus"])
            print(f"L = {run['depth']}, ε = {run['scale']:g}, seed {run['seed']}: {run['outcome']}; {seen}", flush=True)
            yield run


def _on_one_core(cores: multiprocessing.Queue) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


def one_flow(case: dict) -> dict:
    """A flow and its plateaus."""
    digits = sj.tasks.digits()
    x, y = digits.x[: case["samples"]], digits.y[: case["samples"]]
    task = sj.Task(x - np.mean(x, axis=0), y - np.mean(y, axis=0))
    sizes = [task.in_size, *[case["width"]] * (case["depth"] - 1), task.out_size]
    net = sj.scale_layers(sj.MLP(sizes, "relu", key=jax.random.key(case["seed"])), case["scale"])
    until = sj.Loss(case["target"] * float(task.mean_loss(np.zeros(task.y.shape))))
    options = {"rtol": case["rtol"], "max_steps": case["steps"], "save": sj.Save(weights=True)}
    flow = sj.gradient_flow(net, task, until, **options)
    stats = {name: int(count) for name, count in flow.stats.items()}
    products, rows = stats["hessian_vector_products"], stats["unit_jacobians"]
    plateaus = [p for p in flow.plateaus() if p.prominence >= PROMINENCE]
    return {
        "depth": case["depth"],
        "scale": case["scale"],
        "seed": case["seed"],
        "outcome": sj.Status[flow.status].partition(":")[0],
        "clarke_residual": float(flow.clarke_residual),
        "work": stats["gradient_evaluations"] + 1.8 * products + rows / case["samples"],
        "log_times": flow.log_times.tolist(),
        "losses": flow.losses.tolist(),
        "plateaus": [
            {
                "loss": p.loss,
                "log_start": p.log_start,
                "log_end": p.log_end,
                "rank": p.bottleneck_rank,
                "ranks": p.ranks,
            }
            for p in plateaus
        ],
    }


def groups(runs: list[dict]) -> dict[tuple[int, float], list[dict]]:
    """The flows by depth and scale."""
    grouped: dict[tuple[int, float], list[dict]] = {}
    for run in runs:
        grouped.setdefault((run["depth"], run["scale"]), []).append(run)
    return grouped


def bounds(run: dict, upper: bool) -> list[int]:
    """The lower or the upper bounds of the bottleneck rank, plateau by plateau."""
    return [plateau["rank"][int(upper)] for plateau in run["plateaus"]]


def ranks(runs: list[dict]) -> common.Table:
    """The bounds of the rank on the first plateaus, over seeds."""
    columns = ["L", "ε", *[f"plateau {k}" for k in range(SHOWN)], "upper bound never falls", "rises by one each time"]
    rows = []
    for (depth, scale), group in groups(runs).items():
        cells = []
        for k in range(SHOWN):
            there = [run for run in group if len(run["plateaus"]) > k]
            low, high = ([bounds(run, upper)[k] for run in there] for upper in (False, True))
            cells.append(f"{span(low)} to {span(high)} ({len(there)})" if there else "–")
        steps = [np.diff(bounds(run, True)) for run in group]
        never = sum(bool(np.all(step >= 0)) for step in steps)
        each = sum(bool(np.all(step == 1)) for step in steps)
        rows.append([str(depth), f"{scale:g}", *cells, f"{never} of {len(group)}", f"{each} of {len(group)}"])
    return common.Table(
        "Bounds of the bottleneck rank, lower to upper, over seeds (flows that got there)", columns, rows
    )


def span(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}–{max(values)}"


def ends(runs: list[dict]) -> common.Table:
    """How many plateaus there are, how long those after the first escape are beside it, and how flows end."""
    columns = ["L", "ε", "plateaus", "first ends at log t", "longest later one / first", "outcomes", "median work"]
    rows = []
    for (depth, scale), group in groups(runs).items():
        outcomes = [run["outcome"] for run in group]
        counted = ", ".join(f"{outcomes.count(o)} {o.replace('_', ' ')}" for o in sorted(set(outcomes)))
        first = [run["plateaus"][0]["log_end"] for run in group if run["plateaus"]]
        longest = [longest_later(run) for run in group if run["plateaus"]]
        rows.append(
            [
                str(depth),
                f"{scale:g}",
                f"{np.median([len(run['plateaus']) for run in group]):.0f}",
                f"{np.median(first):.2f}" if first else "–",
                common.number(float(np.median(longest))) if longest else "–",
                counted,
                common.number(float(np.median([run["work"] for run in group]))),
            ]
        )
    return common.Table("Plateaus and ends (medians over seeds)", columns, rows)


def longest_later(run: dict) -> float:
    """The longest plateau that ends after the first, beside the first."""
    first, *later = run["plateaus"]
    lengths = [np.exp(p["log_end"]) - np.exp(p["log_start"]) for p in later if np.isfinite(p["log_end"])]
    return float(max(lengths, default=0.0) / np.exp(first["log_end"]))


def notes(runs: list[dict]) -> list[str]:
    """How the bounds change from one plateau to the next, at each scale."""
    found = []
    for scale in dict.fromkeys(run["scale"] for run in runs):
        group = [run for run in runs if run["scale"] == scale]
        plateaus = [plateau for run in group for plateau in run["plateaus"]]
        known = sum(plateau["rank"][0] == plateau["rank"][1] for plateau in plateaus)
        steps = np.array([step for run in group for step in np.diff(bounds(run, True))])
        found.append(
            f"ε = {scale:g}: the bounds agree on {known} of {len(plateaus)} plateaus; of {len(steps)} passages to the next one the "
            f"upper bound rises by one in {np.sum(steps == 1)}, by more in {np.sum(steps > 1)}, stays in {np.sum(steps == 0)} and "
            f"falls in {np.sum(steps < 0)}."
        )
    return found


def figure(runs: list[dict]) -> Figure:
    """Losses after the first escape, at the scale with the most plateaus; upper bounds by loss."""
    result, ((left, right),) = common.axes(2)
    counts = {
        scale: sum(len(r["plateaus"]) for r in runs if r["scale"] == scale) for scale in {r["scale"] for r in runs}
    }
    most = max(counts, key=lambda scale: (counts[scale], -scale))
    for number, depth in enumerate(sorted({run["depth"] for run in runs})):
        color, marker = common.style(number).values()
        for run in (run for run in runs if run["depth"] == depth and run["plateaus"]):
            if run["scale"] == most:
                after = np.exp(run["log_times"]) - np.exp(run["plateaus"][0]["log_end"])
                left.semilogx(after[after > 0], np.array(run["losses"])[after > 0], color=color, lw=0.9)
            losses = [p["loss"] / run["losses"][0] for p in run["plateaus"]]
            right.plot(losses, bounds(run, True), ls="none", marker=marker, color=color, ms=4, alpha=0.6)
        right.plot([], [], ls="none", marker=marker, color=color, label=f"$L = {depth}$")
    left.set(xlabel="time after the first escape", ylabel="loss", xlim=(1, None))
    left.set(title=rf"$\epsilon = {most:g}$, each line one flow")
    right.set(xlabel="loss / initial loss, on plateaus", ylabel="smallest rank of a layer")
    right.invert_xaxis()
    right.legend(frameon=False)
    return result


if __name__ == "__main__":
    main()
