"""How far predicted escapes are from those of the flow, for real networks on the digits.

    python benchmarks/predictions.py [--activations tanh relu gelu] [--width 24] [--seed 1]

Networks of four layers, He-normal but for the layers of the bottleneck, which start at scale `ε`. `predict_escape` follows the
leading order of the loss only; the flow is that of the whole loss. A second table has other models, and perceptrons whose
order is not their number of small layers; all their parameters start at scale `ε`.
"""

from collections.abc import Sequence
from typing import Any

import common
import equinox as eqx
import jax
import jax.numpy as jnp
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


MODEL_SCALES = (1e-2, 1e-3)
MODEL_SAMPLES = 200

QUICK = {"activations": ["tanh"], "width": 4, "samples": 40, "cases": 1, "models": 1}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "predictions")
    parser.add_argument("--activations", nargs="+", default=["tanh", "relu", "gelu"])
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1797, help="digits")
    parser.add_argument("--cases", type=int, default=len(CASES), help="so many of the cases")
    parser.add_argument("--models", type=int, help="so many of the other models")
    options = common.parse(parser, arguments, QUICK)
    digits = sj.tasks.digits()
    task = sj.Task(digits.x[: options.samples], digits.y[: options.samples])
    cases = [(name, *case) for name in options.activations for case in CASES[: options.cases]]
    rows = [compare(task, *case, options.width, options.seed) for case in track(cases, description="escapes")]
    others = list(models().items())[: options.models]
    cases_of_models = [(name, *one, scale) for name, one in others for scale in MODEL_SCALES]
    model_rows = [compare_model(*case) for case in track(cases_of_models, description="other models")]
    common.save(options, [table(rows), model_table(model_rows)], rows + model_rows, figure(rows))


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


class Convolutions(eqx.Module):
    """Two convolutions and a linear layer, on images of 8 × 8."""

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    head: eqx.nn.Linear
    activation: Any = eqx.field(static=True)

    def __init__(self, activation: Any, use_bias: bool = False):
        keys = jax.random.split(jax.random.key(0), 3)
        self.activation = activation
        self.conv1 = eqx.nn.Conv2d(1, 6, 3, padding=1, use_bias=use_bias, key=keys[0])
        self.conv2 = eqx.nn.Conv2d(6, 6, 3, stride=2, padding=1, use_bias=use_bias, key=keys[1])
        self.head = eqx.nn.Linear(96, 10, use_bias=use_bias, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.activation(self.conv1(x.reshape(1, 8, 8)))
        return self.head(self.activation(self.conv2(h)).ravel())


class Residual(eqx.Module):
    """An embedding, four blocks `h + W tanh(h)`, and a linear layer."""

    embedding: jax.Array
    blocks: list[jax.Array]
    head: jax.Array

    def __init__(self, width: int = 16):
        keys = jax.random.split(jax.random.key(2), 6)
        self.embedding = jax.random.normal(keys[0], (width, 64)) / 8
        self.blocks = [jax.random.normal(key, (width, width)) / np.sqrt(width) for key in keys[1:5]]
        self.head = jax.random.normal(keys[5], (10, width)) / np.sqrt(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.embedding @ x
        for block in self.blocks:
            h = h + block @ jnp.tanh(h)
        return self.head @ h


class Attention(eqx.Module):
    """Four heads of linear attention, `Σ v (K β)(Q x)`, for tokens `(x, y)` whose last `y` is asked for."""

    v: jax.Array
    k: jax.Array
    q: jax.Array

    def __init__(self, heads: int = 4, size: int = 4):
        keys = jax.random.split(jax.random.key(3), 3)
        self.v = jax.random.normal(keys[0], (heads,))
        self.k, self.q = (jax.random.normal(key, (heads, size)) for key in keys[1:])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x, y = tokens[:, :-1], tokens[:-1, -1]
        beta = jnp.mean(y[:, None] * x[:-1], axis=0)
        return jnp.sum(self.v * (self.k @ beta) * (self.q @ x[-1]))[None]


class Diagonal(eqx.Module):
    """Regression by `u³ − v³`."""

    u: jax.Array
    v: jax.Array

    def __init__(self, size: int = 30):
        keys = jax.random.split(jax.random.key(4))
        self.u, self.v = (jnp.abs(jax.random.normal(key, (size,))) for key in keys)

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x @ (self.u**3 - self.v**3))[None]


def squared_relu(z: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(z))


def models() -> dict[str, tuple[Any, sj.Task]]:
    """Models at scale one with their tasks."""
    digits = sj.tasks.digits()
    x, y = digits.x[:MODEL_SAMPLES], digits.y[:MODEL_SAMPLES]
    digits = sj.Task(x, y - y.mean(axis=0))
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1).T
    parity = sj.Task(signs, signs.prod(axis=1, keepdims=True))
    keys = jax.random.split(jax.random.key(5), 3)
    tokens = jax.random.normal(keys[0], (300, 32, 4)) * jnp.sqrt(jnp.array([4.0, 2.0, 1.0, 0.5]))
    answers = jnp.einsum("bnd,bd->bn", tokens, jax.random.normal(keys[1], (300, 4)))
    in_context = sj.Task(jnp.concatenate([tokens, answers[..., None]], axis=2), answers[:, -1:])
    inputs = jax.random.normal(keys[2], (20, 30))
    sparse = sj.Task(inputs, (3 * inputs[:, 1] - 2 * inputs[:, 5] + inputs[:, 9])[:, None])

    def perceptron(depth: int, activation: Any, task: sj.Task) -> tuple[sj.MLP, sj.Task]:
        sizes = [task.in_size, *[16] * (depth - 1), task.out_size]
        return sj.MLP(sizes, activation, key=jax.random.key(0)), task

    return {
        "tanh, 2 layers, parity": perceptron(2, "tanh", parity),
        "tanh, 3 layers, parity": perceptron(3, "tanh", parity),
        "GELU, 3 layers, parity": perceptron(3, "gelu", parity),
        "squared ReLU, 2 layers, digits": perceptron(2, squared_relu, digits),
        "squared ReLU, 3 layers, digits": perceptron(3, squared_relu, digits),
        "convolutions, tanh, digits": (Convolutions(jnp.tanh), digits),
        "convolutions, ReLU, digits": (Convolutions(jax.nn.relu), digits),
        "convolutions with biases, tanh, digits": (Convolutions(jnp.tanh, True), digits),
        "eqx.nn.MLP with biases, tanh, digits": (eqx.nn.MLP(64, 10, 24, 2, jnp.tanh, key=jax.random.key(1)), digits),
        "linear attention, in context": (Attention(), in_context),
        "u³ − v³, sparse regression": (Diagonal(), sparse),
        "residual, tanh, four blocks, digits": (Residual(), digits),
    }


def compare_model(name: str, model: Any, task: sj.Task, scale: float) -> dict[str, Any]:
    """Order, prediction and flow of one model with all its parameters at a scale."""
    small = sj.scale_layers(model, scale)
    prediction = sj.predict_escape(small, task)
    flow = sj.gradient_flow(small, task, save=sj.Save(steps=False, singular_values=False))
    return {
        "model": name,
        "scale": scale,
        "order": float(prediction.order),
        "log_escape_time": float(flow.log_escape_time),
        "loss_drop": float(flow.loss_drop),
        "error": float(np.expm1(prediction.log_time - flow.log_escape_time)),
        "gradients": int(prediction.gradient_evaluations),
        "gradients_of_flow": int(flow.stats["gradient_evaluations"]),
    }


def model_table(rows: list[dict[str, Any]]) -> common.Table:
    """One row for each model: order, local slope of the escape time between the two scales, errors."""
    columns = ["model", "order r", "slope", *(f"error, ε = {scale:g}" for scale in MODEL_SCALES)]
    body = []
    for name in dict.fromkeys(row["model"] for row in rows):
        ours = [row for row in rows if row["model"] == name]
        times = [row["log_escape_time"] for row in ours]
        slope = (times[1] - times[0]) / np.log(MODEL_SCALES[0] / MODEL_SCALES[1])
        errors = [f"{row['error']:+.1e}" for row in ours]
        body.append([name, f"{ours[0]['order']:.0f}", f"{slope:.4f}", *errors])
    return common.Table("Other models: order, slope of log τ, and errors of the predictions", columns, body)


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
