"""Do real flows escape along the optimal direction, and with low-rank layers? ReLU networks on the digits.

    python benchmarks/directions_along_flow.py [--depths 3 4 5 6] [--scales 1e-1 1e-2 1e-3] [--seeds 3]

Gradient flow from He-normal weights times a scale to its escape, the steepest point of the first descent, compared
with the best escape direction found. In that direction of a deep network σ1/σ2 ≥ l^{1/4} in every layer l (Bantzis,
Simon & Jacot, arXiv:2505.21722); whether trained networks follow is an empirical question. For every depth and scale,
at escape and over seeds: the smallest (σ1/σ2)/l^{1/4}, the share of layers where it is at least one, the range of
the layers' cosines with the direction, and the range of the speed over the best one.
"""

import argparse
from collections.abc import Iterator, Sequence

import common
import jax
import numpy as np
from matplotlib.figure import Figure

import saddlejax as sj
from saddlejax import saddle

jax.config.update("jax_enable_x64", True)


QUICK = {"depths": [3], "scales": [1e-1], "seeds": 1, "width": 4, "starts": 1, "samples": 40}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "directions_along_flow")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 4, 5, 6])
    parser.add_argument("--scales", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3])
    parser.add_argument("--seeds", type=int, default=3, help="initialisations for each depth and scale")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--samples", type=int, default=1797, help="digits")
    parser.add_argument("--starts", type=int, default=4, help="random starts of the search for the direction")
    options = common.parse(parser, arguments, QUICK)
    runs = list(flows(options))
    common.save(options, [table(runs)], runs, figure(runs))


def flows(options: argparse.Namespace) -> Iterator[dict]:
    """One flow after the other, as plain numbers."""
    digits = sj.tasks.digits()
    task = sj.Task(digits.x[: options.samples], digits.y[: options.samples])
    for depth in options.depths:
        sizes = [task.in_size, *[options.width] * (depth - 1), task.out_size]
        best = sj.escape_direction(task, sizes, starts=options.starts, key=jax.random.key(depth))
        print(f"L = {depth}: best speed {float(best.speed):.9f}, residual {float(best.residual):.0e}", flush=True)
        for scale in options.scales:
            for seed in range(options.seeds):
                net = sj.scale_layers(sj.MLP(sizes, key=jax.random.key(seed)), scale)
                flow = sj.gradient_flow(net, task, save=sj.Save(weights=True))
                along = saddle.along_flow(flow, task, best)
                run = {
                    "depth": depth,
                    "scale": scale,
                    "seed": seed,
                    "escaped": bool(flow.status == sj.Status.escaped),
                    "best_speed": float(best.speed),
                    "log_escape_time": float(flow.log_escape_time),
                    "losses": flow.losses.tolist(),
                    "layer_norms": flow.layer_norms.tolist(),
                    "log_times": along.log_times.tolist(),
                    "layer_cosines": along.layer_cosines.tolist(),
                    "speed_ratio": along.speed_ratio.tolist(),
                    "low_rank_margin": along.low_rank_margin.tolist(),
                }
                summary = ", ".join(f"{c:.3f}" for c in run["layer_cosines"][-1])
                print(
                    f"  ε = {scale:g}, seed {seed}: margin {min(run['low_rank_margin'][-1]):.3g}, "
                    f"speed ratio {run['speed_ratio'][-1]:.4f}, cosines {summary}",
                    flush=True,
                )
                yield run


def groups(runs: list[dict]) -> dict[tuple[int, float], list[dict]]:
    """The flows that escaped, by depth and scale."""
    grouped: dict[tuple[int, float], list[dict]] = {(run["depth"], run["scale"]): [] for run in runs}
    for run in runs:
        if run["escaped"]:
            grouped[run["depth"], run["scale"]].append(run)
    return grouped


def at_escape(group: list[dict], name: str) -> np.ndarray:
    return np.array([run[name][-1] for run in group])


def table(runs: list[dict]) -> common.Table:
    """One row for each depth and scale."""
    columns = ["L", "ε", "escaped", "least (σ1/σ2)/l^¼", "layers ≥ 1", "cosines", "speed / best", "loss / first"]
    rows = []
    counts = {key: sum((run["depth"], run["scale"]) == key for run in runs) for key in groups(runs)}
    for (depth, scale), group in groups(runs).items():
        cells = ["–"] * 5
        if group:
            margins = at_escape(group, "low_rank_margin")
            fallen = np.array([run["losses"][-1] / run["losses"][0] for run in group])
            cells = [
                f"{np.min(margins):.3g}",
                f"{np.mean(margins >= 1):.0%}",
                span(at_escape(group, "layer_cosines")),
                span(at_escape(group, "speed_ratio")),
                span(fallen),
            ]
        rows.append([str(depth), f"{scale:g}", f"{len(group)} of {counts[depth, scale]}", *cells])
    return common.Table("At escape: digits, ReLU (ranges over layers and seeds)", columns, rows)


def span(values: np.ndarray) -> str:
    return f"{np.min(values):.3f} … {np.max(values):.3f}"


def figure(runs: list[dict]) -> Figure:
    """Margins against the scale, cosines by layer at the smallest scale, and the speed along those flows."""
    result, ((left, middle, right),) = common.axes(3)
    escaped = groups(runs)
    depths = sorted({depth for depth, _ in escaped})
    smallest = min(scale for _, scale in escaped)
    for number, depth in enumerate(depths):
        color, marker = common.style(number).values()
        scales = sorted(scale for d, scale in escaped if d == depth and escaped[d, scale])
        least = [np.min(at_escape(escaped[depth, scale], "low_rank_margin")) for scale in scales]
        left.loglog(scales, least, marker=marker, color=color, ms=5, lw=1.2, label=f"$L = {depth}$")
        for run in escaped.get((depth, smallest), []):
            cosines = run["layer_cosines"][-1]
            middle.plot(np.linspace(0, 1, depth), cosines, marker=marker, color=color, ms=4, lw=0.8)
            size = np.exp(np.mean(np.log(run["layer_norms"]), axis=1))
            right.semilogx(size / size[0], run["speed_ratio"], color=color, lw=1.2)
    left.axhline(1, color="#666666", ls="--", lw=1)
    left.set(xlabel="scale $\\epsilon$", ylabel=r"least $(\sigma_1/\sigma_2)\,/\,l^{1/4}$ at escape")
    middle.set(xlabel="layer, first to last", ylabel="cosine at escape", ylim=(-0.55, 1.05), xticks=[0, 1])
    middle.set(xticklabels=["$1$", "$L$"], title=rf"$\epsilon = {smallest:g}$")
    right.axhline(1, color="#666666", ls="--", lw=1)
    right.set(xlabel="growth of the layers (geometric mean)", ylabel="speed / best speed")
    right.set(title=rf"$\epsilon = {smallest:g}$, each line one flow")
    left.legend(frameon=False)
    return result


if __name__ == "__main__":
    main()
