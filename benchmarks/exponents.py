"""The exponent of the escape-time law from He-normal starts, by differentiating every escape.

    python benchmarks/exponents.py [--activations tanh gelu relu] [--bottlenecks 3 5 8] [--depth 9] [--seeds 3]

`r` layers of a He-normal network, anywhere among its `L`, start at scale `ε`: the law says `τ = Θ(ε^{−(r−2)})` (Rawal &
DeWeese, arXiv:2605.01288). Their simulations, at `ε` between 0.5 and 1e-2, show slopes that are off by 0.24, 0.28
and 0.58 from `r − 2` for `r = 3, 5, 8`. Here the slope `−d log τ/d log ε` is computed at each `ε` by itself, in their range and
three decades further down. Each seed draws its own weights and its own place for the bottleneck.
"""

import argparse
import itertools
import json
from collections.abc import Sequence

import common
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from rich.progress import track

import saddlejax as sj

jax.config.update("jax_enable_x64", True)

PAPER_RANGE = (1e-2, 0.5)
QUICK = {
    "activations": ["tanh"],
    "bottlenecks": [3],
    "scales": [1e-1, 1e-2],
    "depth": 3,
    "width": 4,
    "samples": 10,
    "seeds": 1,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "exponents")
    parser.add_argument("--activations", nargs="+", default=["tanh", "gelu", "relu"])
    parser.add_argument("--bottlenecks", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-5])
    parser.add_argument("--depth", type=int, default=9)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="initialisations and places of the bottleneck")
    options = common.parse(parser, arguments, QUICK)
    results = measure(options)
    numbers = json.loads(results.to_dataframe().reset_index().to_json(orient="records"))
    common.save(options, [table(results)], numbers, figure(results))


def measure(options: argparse.Namespace) -> xr.Dataset:
    """The exponent at every scale, for every activation, bottleneck and seed."""
    task = sj.tasks.single_index(jnp.tanh, in_size=10, samples=options.samples, key=jax.random.key(1))
    sizes = [10, *[options.width] * (options.depth - 1), 1]
    names = ("activation", "bottleneck", "scale", "seed")
    values = (
        options.activations,
        options.bottlenecks,
        sorted(options.scales, reverse=True),
        list(range(options.seeds)),
    )
    shape = tuple(map(len, values))
    exponents, first = np.full(shape, np.nan), np.zeros(shape, int)
    for index in track(list(itertools.product(*map(range, shape))), description="escapes"):
        activation, r, scale, seed = (axis[i] for axis, i in zip(values, index, strict=True))
        first[index] = np.random.default_rng([r, seed]).integers(0, options.depth - r + 1)
        layers = range(first[index], first[index] + r)
        net = sj.scale_layers(sj.MLP(sizes, activation, key=jax.random.key(seed)), scale, layers)
        exponents[index] = sj.critical_exponent(net, task, layers)
    return xr.Dataset(
        {"exponent": (names, exponents), "first_layer": (names, first)},
        coords=dict(zip(names, values, strict=True)),
        attrs={"depth": options.depth, "width": options.width, "samples": options.samples, "jax": jax.__version__},
    )


def table(results: xr.Dataset) -> common.Table:
    """Mean ± standard deviation over seeds, minus the law's r − 2."""
    rows = []
    for activation, r in itertools.product(results.activation.values, results.bottleneck.values):
        errors = results.exponent.sel(activation=activation, bottleneck=r).values - (r - 2)
        cells = [f"{row.mean():+.4f} ± {row.std():.4f}" if np.all(np.isfinite(row)) else "–" for row in errors]
        rows.append([str(activation), str(r), *cells])
    title = "exponent − (r − 2), mean ± deviation over seeds (– did not escape in all of them)"
    return common.Table(title, ["activation", "r", *(f"ε = {scale:g}" for scale in results.scale.values)], rows)


def figure(results: xr.Dataset) -> Figure:
    """Exponent against scale for each activation, the range of the paper's simulations shaded."""
    result, axes = common.axes(results.activation.size, sharey=True)
    for ax, activation in zip(axes[0], results.activation.values, strict=True):
        sj.plot.exponents(results, ax, activation=activation)
        ax.axvspan(*PAPER_RANGE, color="0.93", zorder=0)
        ax.set_title(str(activation))
    axes[0][0].annotate(
        "range of the\npaper's runs", (PAPER_RANGE[0], 0.02), xycoords=("data", "axes fraction"), ha="right", fontsize=8
    )
    axes[0][0].legend(frameon=False, loc="upper right")
    return result


if __name__ == "__main__":
    main()
