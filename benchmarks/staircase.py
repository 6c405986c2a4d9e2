"""What does a run from saddle to saddle cost, against the init scale and the width: exponential, explicit, implicit?

    python benchmarks/staircase.py [--scales 1e-1 3e-2 1e-2 1e-3 1e-4] [--widths 10 30 100] [--budget 30]

From small weights to the end of the last plateau. In one run:

- the exponential steps of the library (`stiff=True`, "stiff" below), its explicit ones (`stiff=False`), and its own choice (the
  default, "automatic"), with their tolerances;
- implicit with the Hessian as a matrix: SciPy's BDF and Radau, and diffrax's Kvaerno5, in time t, with absolute tolerances that
  follow the init scale;
- implicit and matrix-free: Rodas4 with conjugate gradients on Hessian-vector products, its errors relative to the singular
  values of a layer (`benchmarks/implicit.py`).

1. Against the init scale: linear teacher of singular values 4, 2, 1, ½, width 10, depths 3 and 4.
2. Against the width, at one scale and depth 3.
3. Width 100, depth 4: the stiff integrator at ε = 1e-3, against the explicit one at a scale thirty times larger.
4. On 200 digits: tanh by both integrators of the library and by its choice; ReLU, where the explicit one does better.
5. Memory of a stiff flow as the width grows.

The error of a run is the worst relative error of the times at which the loss falls to half-way between two plateaus; the
reference is SciPy's LSODA at 1e-10 where the network is small, and elsewhere the stiff integrator at rtol 1e-6, which is compared with
LSODA where both run. A dense Hessian of a network of `n` weights counts as `n` Hessian-vector products. Not run, and left
blank: a method expected to take more than `--budget` seconds, or to hold a Hessian of more than `--dense` rows; its work is
extrapolated by a power law in the figure, dashed.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import implicit
import jax
import jax.numpy as jnp
import numpy as np
from implicit import Passage
from matplotlib.figure import Figure
from rich.progress import track

import saddlejax as sj
from saddlejax.flow.plan import SMOOTH_RTOL, STIFF_RTOL
from saddlejax.flow.plateaus import crossing_log_time

jax.config.update("jax_enable_x64", True)

STRENGTHS = (4.0, 2.0, 1.0, 0.5)
LEVELS = (6.625, 1.625, 0.375, 0.0625)
END = 1e-2
EXPLICIT_STEPS, STIFF_STEPS = 1_000_000, 8192
TIGHT_RTOL = 1e-6
TINY = sj.Save(singular_values=False)
QUICK = {
    "scales": [1e-1],
    "depths": [3],
    "widths": [],
    "narrow": 4,
    "width_scale": 1e-1,
    "memory_widths": [],
    "wide": 0,
    "methods": ["automatic", "stiff", "Rodas4, CG"],
    "data_scales": [],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "staircase")
    parser.add_argument("--scales", type=float, nargs="+", default=[1e-1, 3e-2, 1e-2, 1e-3, 1e-4])
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--narrow", type=int, default=10, help="width of the networks that go over the scales")
    parser.add_argument("--widths", type=int, nargs="*", default=[10, 30, 100])
    parser.add_argument(
        "--width-scale", type=float, default=1e-2, help="init scale of the networks that go over the widths"
    )
    parser.add_argument(
        "--wide", type=int, default=100, help="width at which stiff and explicit run four layers; 0: none"
    )
    parser.add_argument("--memory-widths", type=int, nargs="*", default=[50, 100, 200])
    parser.add_argument(
        "--data-scales", type=float, nargs="*", default=[1e-1, 1e-2, 1e-3], help="of the tanh networks on digits"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budget", type=float, default=30, help="seconds that a run may take")
    parser.add_argument("--dense", type=int, default=3000, help="the largest Hessian to form")
    options = common.parse(parser, arguments, QUICK)
    scale_rows = [row for depth in options.depths for row in against_scale(depth, options)]
    width_rows = against_width(options)
    wide_rows, wide_table = wide(options.wide) if options.wide else ([], None)
    data_rows, data_table = data(options.data_scales)
    memory_rows = memory(options.memory_widths)
    tables = [
        cost_table(f"Depth {d}, width {options.narrow}", "scale", [r for r in scale_rows if r["depth"] == d])
        for d in options.depths
    ]
    if width_rows:
        tables.append(cost_table(f"Depth 3, ε = {options.width_scale:g}", "width", width_rows))
    tables += [wide_table] if wide_table else []
    tables += [data_table] if data_rows else []
    tables += [memory_table(memory_rows)] if memory_rows else []
    checks = [
        row["reference_against_lsoda"] for row in scale_rows + width_rows if row["reference_against_lsoda"] is not None
    ]
    notes = [
        "Gradients + Hessian-vector products or dense Hessians H; seconds, and as a multiple of stiff; worst error."
    ]
    if checks:
        notes.append(
            f"The stiff integrator at rtol 1e-6 agrees with LSODA at 1e-10 to {max(checks):.0e}, where both run."
        )
    found = [row["runs"] for row in scale_rows + width_rows]
    ratios = [against_better(runs) for runs in found if "total" in runs.get("automatic", {})]
    if ratios:
        notes.append(
            f"The automatic choice takes {min(ratios):.2f} to {max(ratios):.2f} times the work of the better of the two."
        )
    numbers = {"scale": scale_rows, "width": width_rows, "wide": wide_rows, "data": data_rows, "memory": memory_rows}
    common.save(options, tables, numbers, figure(scale_rows, width_rows, options), notes)


def network(task: sj.Task, width: int, depth: int, activation: str, scale: float) -> sj.MLP:
    sizes = [task.in_size, *[width] * (depth - 1), task.out_size]
    return sj.scale_layers(sj.MLP(sizes, activation, key=jax.random.key(0)), scale)


@partial(jax.jit, static_argnames=("stiff", "max_steps"))
def follow(net: sj.MLP, task: sj.Task, rtol: jax.Array, stiff: bool, max_steps: int) -> sj.Flow:
    return sj.gradient_flow(net, task, sj.Loss(END), rtol=rtol, stiff=stiff, max_steps=max_steps, save=TINY)


def crossing_times(flow: sj.Flow, levels: tuple[float, ...]) -> np.ndarray:
    return np.array([crossing_log_time(flow, level) for level in levels])


def library(stiff: bool | None) -> Callable[..., Passage]:
    """The library's stiff or explicit integrator, or its choice, with its default tolerance."""

    def run(net: sj.MLP, task: sj.Task, levels: tuple[float, ...], scale: float) -> Passage:
        if stiff is None:  # which lives on the host
            call = partial(sj.gradient_flow, net, task, sj.Loss(END), max_steps=STIFF_STEPS, save=TINY)
        else:
            rtol = jnp.asarray(STIFF_RTOL if stiff else SMOOTH_RTOL)
            call = partial(follow, net, task, rtol, stiff, STIFF_STEPS if stiff else EXPLICIT_STEPS)
        flow, seconds = common.timed(call, repeats=3)
        stats = {name: int(count) for name, count in flow.stats.items()}
        counts = stats["gradient_evaluations"], stats["hessian_vector_products"]
        return Passage(crossing_times(flow, levels), *counts, 0, stats["steps"], seconds)

    return run


METHODS: dict[str, Callable[..., Passage]] = {
    "automatic": library(None),
    "stiff": library(True),
    "explicit": library(False),
    "SciPy BDF, dense": implicit.dense("BDF", 1e-5),
    "SciPy Radau, dense": implicit.dense("Radau", 1e-2),
    "diffrax Kvaerno5, dense": implicit.kvaerno(1e-2),
    "Rodas4, CG": implicit.matrix_free(1e-2, 1e-3),
}


def against_scale(depth: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method at every scale, the largest first."""
    rows: list[dict[str, Any]] = []
    for scale in track(sorted(options.scales, reverse=True), description=f"depth {depth}"):
        rows.append(cross(options.narrow, depth, scale, rows, "scale", options))
    return rows


def against_width(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method at every width."""
    rows: list[dict[str, Any]] = []
    for width in track(sorted(options.widths), description="widths"):
        rows.append(cross(width, 3, options.width_scale, rows, "width", options))
    return rows


def cross(
    width: int, depth: int, scale: float, before: list[dict], over: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One network by every method that is expected to be fast enough, with its reference."""
    task = sj.tasks.linear_teacher(STRENGTHS, in_size=10)
    net = network(task, width, depth, "identity", scale)
    parameters = sum(w.size for w in net.weights)
    row: dict[str, Any] = {"width": width, "depth": depth, "scale": scale, "parameters": parameters, "runs": {}}
    reference = crossing_times(follow(net, task, jnp.asarray(TIGHT_RTOL), True, STIFF_STEPS), LEVELS)
    row["reference_against_lsoda"] = None
    if not before and parameters <= 1000:
        lsoda = implicit.dense("LSODA", 1e-10)(net, task, LEVELS, scale).log_times
        row["reference_against_lsoda"] = worst(reference, lsoda)
    row["reference"] = reference
    for name in options.methods:
        expected = expect(name, row, before, over)
        forms_hessian = "dense" in name
        if forms_hessian and parameters > options.dense:
            row["runs"][name] = {"left_out": f"Hessian of {parameters:,} rows"}
        elif expected is not None and expected["seconds"] > options.budget:
            row["runs"][name] = {"left_out": "would take long"} if "unknown" in expected else expected
        else:
            run = METHODS[name](net, task, LEVELS, scale)
            row["runs"][name] = {
                **run._asdict(),
                "total": total(run, parameters),
                "error": worst(run.log_times, reference),
            }
    return row


def total(run: Passage, parameters: int) -> float | None:
    """Work in gradients, a Hessian-vector product counting as two; None where the method does not tell."""
    if run.gradients is None:
        return None
    return run.gradients + 2 * (run.products + parameters * run.hessians)


def against_better(runs: dict[str, dict[str, Any]]) -> float:
    """The work of the automatic choice over that of the better of both kinds of step."""
    both = [runs[name]["total"] for name in ("stiff", "explicit") if runs.get(name, {}).get("total") is not None]
    return runs["automatic"]["total"] / min(both)


def expect(name: str, row: dict[str, Any], before: list[dict], over: str) -> dict[str, Any] | None:
    """Seconds and work by a power law through the last two runs; after a single one its seconds; None before."""
    known = [r for r in before if "seconds" in r["runs"].get(name, {})]
    if len(known) < 2:
        return {"seconds": known[-1]["runs"][name]["seconds"], "unknown": True} if known else None
    (x0, first), (x1, second) = ((r[over], r["runs"][name]) for r in known[-2:])

    def continued(field: str) -> float | None:
        if first[field] is None or second[field] is None:
            return None
        return common.power_law(x0, x1, row[over], first[field], second[field])

    return {"seconds": continued("seconds"), "total": continued("total"), "extrapolated": True}


def worst(log_times: np.ndarray, reference: np.ndarray) -> float:
    """The largest relative error of a time; NaN where a level was not reached."""
    return float(np.max(np.abs(np.expm1(log_times - reference))))


def cost_table(title: str, over: str, rows: list[dict[str, Any]]) -> common.Table:
    symbol = {"scale": "ε = {:g}", "width": "width {}"}[over]
    names = list(rows[0]["runs"])
    body = [[name, *(cell(row["runs"][name], row["runs"].get("stiff")) for row in rows)] for name in names]
    return common.Table(title, ["method", *(symbol.format(row[over]) for row in rows)], body)


def cell(run: dict[str, Any], ours: dict[str, Any] | None) -> str:
    if "left_out" in run:
        return f"–\n({run['left_out']})"
    ratio = (
        f", ×{common.number(run['seconds'] / ours['seconds'])}"
        if ours and ours is not run and "seconds" in ours
        else ""
    )
    seconds = f"{common.number(run['seconds'])} s{ratio}"
    if "extrapolated" in run:
        return f"–\n({seconds})"
    work = f"{run['steps']:,} steps" if run["gradients"] is None else f"{run['gradients']:,}"
    work += f" + {run['products']:,}" if run["products"] else ""
    work += f" + {run['hessians']:,} H" if run["hessians"] else ""
    error = f"{run['error']:.0e}" if np.isfinite(run["error"]) else "end not reached"
    return f"{work}\n{seconds}\n{error}"


def wide(width: int) -> tuple[list[dict], common.Table]:
    """The stiff integrator at a small scale and the explicit one at a larger one, in four layers of one width."""
    task = sj.tasks.linear_teacher(STRENGTHS, in_size=10)
    rows, cells = [], []
    for name, scale in (("stiff", 1e-3), ("explicit", 3e-2)):
        net = network(task, width, 4, "identity", scale)
        run = METHODS[name](net, task, LEVELS, scale)
        rows.append({"method": name, "scale": scale, "width": width, **run._asdict()})
        ratio = f", ×{common.number(run.seconds / rows[0]['seconds'])}"
        seconds = f"{common.number(run.seconds)}{ratio if name != 'stiff' else ''}"
        cells.append([name, f"{scale:g}", f"{run.gradients:,}", f"{run.products:,}", f"{run.steps:,}", seconds])
    parameters = sum(w.size for w in net.weights)
    columns = ["integrator", "ε", "gradients", "products", "steps", "s"]
    return rows, common.Table(f"Width {width}, depth 4 ({parameters:,} parameters)", columns, cells)


def data(scales: Sequence[float]) -> tuple[list[dict], common.Table]:
    """Both integrators of the library and its choice on digits, and how far ends of plateaus move at another tolerance."""
    digits = sj.tasks.digits()
    task = sj.Task(digits.x[:200], digits.y[:200])
    rows = []
    columns = [
        "activation",
        "ε",
        "end at loss",
        "integrator",
        "gradients",
        "products",
        "s",
        "plateaus",
        "ends move at 3 × rtol",
    ]
    cells = []
    cases = [("tanh", scale, 0.07) for scale in scales] + [("relu", scale, 0.2) for scale in scales if scale < 0.1]
    for activation, scale, end in track(cases, description="digits"):
        net = network(task, 10, 3, activation, scale)
        for stiff in (None, True, False) if activation == "tanh" else (False,):
            rtol = 1e-2 if stiff else 1e-4 if activation == "tanh" else 2e-4
            options = {"stiff": stiff, "max_steps": 20_000}
            until = partial(sj.gradient_flow, net, task, sj.Loss(end), **options)
            flow, seconds = common.timed(partial(until, rtol=rtol), repeats=1)
            other = until(rtol=3 * rtol)
            found = flow.plateaus(check=other)
            moves = [p.log_end_error for p in found]
            stats = {name: int(count) for name, count in flow.stats.items()}
            row = {"activation": activation, "scale": scale, "loss": end, "method": flow.method, "seconds": seconds}
            row |= {"status": sj.Status[flow.status], "imbalance_error": float(flow.imbalance_error)} | stats
            rows.append(row | {"plateau_losses": [p.loss for p in found], "ends_move": moves})
            counts = [f"{stats[name]:,}" for name in ("gradient_evaluations", "hessian_vector_products")]
            moved = " ".join(f"{abs(move):.0e}" for move in moves)
            name = {None: "automatic", True: "stiff", False: "explicit"}[stiff]
            start = [activation, f"{scale:g}", f"{end:g}", name]
            cells.append([*start, *counts, common.number(seconds), str(len(found)), moved])
    return rows, common.Table("200 digits, width 10, depth 3: through the plateaus", columns, cells)


def memory(widths: Sequence[int]) -> list[dict[str, float]]:
    """Temporary memory of a stiff flow as the width grows, as the compiler plans it; the rows are not counted."""
    task = sj.tasks.linear_teacher(STRENGTHS, in_size=10)
    rows = []
    for width in widths:
        net = network(task, width, 4, "identity", 1e-3)

        def run(weights, net=net):
            small = sj.Save(steps=False)
            return jnp.sum(
                sj.gradient_flow(net.with_weights(weights), task, sj.Loss(END), stiff=True, save=small).losses
            )

        plan = jax.jit(run).lower(net.weights).compile().memory_analysis()
        parameters = sum(w.size for w in net.weights)
        rows.append({"width": width, "parameters": parameters, "megabytes": plan.temp_size_in_bytes / 1e6})
    return rows


def memory_table(rows: list[dict[str, float]]) -> common.Table:
    body = [
        [f"{r['width']}", f"{r['parameters']:,}", f"{r['megabytes']:.0f}", f"{8e-6 * r['parameters'] ** 2:,.0f}"]
        for r in rows
    ]
    columns = ["width", "parameters", "temporary memory (MB)", "a dense Hessian (MB)"]
    return common.Table("Memory of a stiff flow, depth 4", columns, body)


def figure(scale_rows: list[dict], width_rows: list[dict], options: argparse.Namespace) -> Figure:
    """Work against the scale for each depth, and seconds against the width."""
    panels = [([r for r in scale_rows if r["depth"] == depth], "scale", "total") for depth in options.depths]
    panels += [(width_rows, "width", "seconds")] if width_rows else []
    result, (grid,) = common.axes(len(panels))
    for ax, (rows, over, field) in zip(grid, panels, strict=True):
        for i, name in enumerate(options.methods):
            style = {**common.style(i), "markersize": 5 if i == 0 else 4, "linewidth": 2.2 if i == 0 else 1.1}
            points = [(row[over], row["runs"][name]) for row in rows if row["runs"][name].get(field) is not None]
            measured = [(x, run[field]) for x, run in points if "extrapolated" not in run]
            ax.loglog(*zip(*measured, strict=True) if measured else ([], []), label=name, **style)
            beyond = measured[-1:] + [(x, run[field]) for x, run in points if "extrapolated" in run]
            if len(beyond) > 1:
                ax.loglog(*zip(*beyond, strict=True), **{**style, "linestyle": "--", "marker": ""})
        if over == "scale":
            ax.invert_xaxis()
            ax.set(xlabel=r"init scale $\varepsilon$", ylabel="work in gradients (a product is two)")
            ax.set_title(f"depth {rows[0]['depth']}, width {options.narrow}")
        else:
            ax.set(xlabel="width", ylabel="seconds after compilation")
            ax.set_xticks(options.widths, [str(w) for w in options.widths])
            ax.minorticks_off()
            ax.set_title(rf"depth 3, $\varepsilon$ = {options.width_scale:g}")
    result.legend(
        *grid[-1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize="small"
    )
    return result


if __name__ == "__main__":
    main()
