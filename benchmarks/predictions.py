"""How far predicted escapes are from those of the flow, for real networks on the digits.

    python benchmarks/predictions.py [--activations tanh relu gelu] [--width 24] [--seed 1]

Networks of four layers, He-normal but for the layers of the bottleneck, which start at scale `ε`. `predict_escape` follows the
leading order of the loss only; the flow is that of the whole loss.
"""

from collections.abc import Sequence
from typing import Any

import common
import jax
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

import saddlejax as sj

jax.config.update("jax_enable_x64", True)

CASES = (
    (1e-2, (0, 1, 2, 3)),
    (1e-3, (0, 1, 2, 3)),
    (1e-2, (0, 1, 2)),
    (1e-4, (0, 1, 2)),
    (1e-3, (1, 2, 3)),
    (1e-3, (1, 2)),
)


QUICK = {"activations": ["tanh"], "width": 4, "samples": 40, "cases": 1}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "predictions")
    parser.add_argument("--activations", nargs="+", default=["tanh", "relu", "gelu"])
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1797, help="digits")
    parser.add_argument("--cases", type=int, default=len(CASES), help="so many of the cases")
    options = common.parse(parser, arguments, QUICK)
    digits = sj.tasks.digits()
    task = sj.Task(digits.x[: options.samples], digits.y[: options.samples])
    cases = [(name, *case) for name in options.activations for case in CASES[: options.cases]]
    rows = [compare(task, *case, options.width, options.seed) for case in track(cases, description="escapes")]
    common.save(options, [table(rows)], rows, figure(rows))


def compare(
    task: sj.Task, activation: str, scale: float, layers: tuple[int, ...], width: int, seed: int
) -> dict[str, Any]:
    """Prediction and flow of one network."""
    sizes = [task.in_size, *[width] * 3, task.out_size]
    net = sj.scale_layers(sj.MLP(sizes, activation, key=jax.random.key(seed)), scale, layers)
    prediction = sj.predict_escape(net, task, layers=layers)
    flow = sj.gradient_flow(net, task, save=sj.Save(steps=False, singular_values=False))
    return {
        "activation": activation,
        "scale": scale,
        "layers": layers,
        "log_escape_time": float(flow.log_escape_time),
        "error": float(np.expm1(prediction.log_time - flow.log_escape_time)),
        "gradients": int(prediction.gradient_evaluations),
        "gradients_of_flow": int(flow.stats["gradient_evaluations"]),
    }


def table(rows: list[dict[str, Any]]) -> common.Table:
    """One row for each network."""
    columns = ["activation", "small layers", "ε", "escape time", "error of the prediction", "gradients", "flow's"]
    body = [
        [
            row["activation"],
            small_layers(row),
            f"{row['scale']:g}",
            f"{np.exp(row['log_escape_time']):.4g}",
            f"{row['error']:+.1e}",
            str(row["gradients"]),
            str(row["gradients_of_flow"]),
        ]
        for row in rows
    ]
    return common.Table("Predicted escapes against flows: digits, four layers", columns, body)


def small_layers(row: dict[str, Any]) -> str:
    return f"{row['layers'][0] + 1}–{row['layers'][-1] + 1}"


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Errors of the predictions, a group for each number of small layers and scale."""
    result, ((ax,),) = common.axes(1, width=6.4, height=3.6)
    groups = list(dict.fromkeys(f"layers {small_layers(row)}\nε = {row['scale']:g}" for row in rows))
    for i, name in enumerate(dict.fromkeys(row["activation"] for row in rows)):
        ours = [row for row in rows if row["activation"] == name]
        at = [groups.index(f"layers {small_layers(row)}\nε = {row['scale']:g}") + 0.15 * (i - 1) for row in ours]
        ax.semilogy(at, [abs(row["error"]) for row in ours], linestyle="", markersize=6, label=name, **common.style(i))
    ax.set_xticks(range(len(groups)), groups, fontsize="small")
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.grid(False, axis="x")
    ax.set_ylabel("relative error of the predicted time")
    ax.legend(frameon=False)
    return result


if __name__ == "__main__":
    main()
