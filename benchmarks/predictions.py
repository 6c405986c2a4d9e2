"""How far predicted escapes are from those of the flow, for real networks on the digits.

    python benchmarks/predictions.py [--activations tanh relu gelu] [--width 24] [--seed 1]

Networks of four layers, He-normal but for the layers of the bottleneck, which start at scale `ε`. `predict_escape` follows the
leading order of the loss only; the flow is that of the whole loss.
"""

import argparse

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", nargs="+", default=["tanh", "relu", "gelu"])
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    task = sj.tasks.digits()
    table = Table(title="Predicted escapes against flows: digits, four layers")
    for column in ("activation", "small layers", "ε", "escape time", "error of the prediction", "gradients", "flow's"):
        table.add_column(column, justify="right")
    cases = [(name, *case) for name in options.activations for case in CASES]
    for name, scale, layers in track(cases, description="escapes"):
        sizes = [task.in_size, *[options.width] * 3, task.out_size]
        net = sj.scale_layers(sj.MLP(sizes, name, key=jax.random.key(options.seed)), scale, layers)
        prediction = sj.predict_escape(net, task, layers=layers)
        flow = sj.gradient_flow(net, task, save=sj.Save(steps=False, singular_values=False))
        error = np.expm1(float(prediction.log_time - flow.log_escape_time))
        work = int(prediction.gradient_evaluations), int(flow.stats["gradient_evaluations"])
        row = (name, str(layers), f"{scale:g}", f"{float(flow.escape_time):.4g}", f"{error:+.1e}", *map(str, work))
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
