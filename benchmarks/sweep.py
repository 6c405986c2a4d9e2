"""What a sweep costs: lanes a second, against bare gradients and against what a user would do instead.

    python benchmarks/sweep.py [--seeds 4] [--samples 100 1000] [--repeats 5]

On one mixed grid (depths 2–6, init scales 1e-1 … 1e-5, tanh, width 32, float64), everything compiled before:

- `sweep`, on all cores; then on one core and so on, with fewer lanes, and how busy the slots of a refilled batch are;
- the bare gradients it spent: as many evaluations of a compiled `jax.grad` of each depth, on as many threads, on data of every size,
  each in turn with the sweep and the fastest of its repeats;
- the machine's matrix-product rate, and the share of it that the gradients of the sweep come to;
- plain `vmap(diffeqsolve)` of `dθ/dt = −∇𝓛`, Tsit5 with rtol 1e-4, atol 1e-6 and an event at the escape, and a Python loop
  over the same;
- PyTorch with torchdiffeq at these tolerances, a loop over lanes, where installed: `pip install torch torchdiffeq`.

The rivals run the lanes of `--rival-seeds` seeds, in physical time and with 4096 steps at most; many do not get to the
escape, which the table says.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import common
import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import saddlejax as sj
from saddlejax.objective import task_loss
from saddlejax.sweeps._sweep import _flows
from saddlejax.sweeps.execute import available_cores
from saddlejax.sweeps.programs import batch_program
from saddlejax.tasks.task import zero_loss

jax.config.update("jax_enable_x64", True)

INPUTS, WIDTH, DEPTHS = 10, 32, (2, 3, 4, 5, 6)
SCALES = tuple(float(f"{s:.3g}") for s in np.geomspace(1e-1, 1e-5, 5))
HALF = sj.Escape(loss_fraction=0.5)
MOST_STEPS = 4096  # the default of diffrax
RTOL, ATOL = 1e-4, 1e-6
GRID = {"width": WIDTH, "depth": DEPTHS, "activation": "tanh", "scale": SCALES, "until": HALF}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, "sweep")
    options.set_defaults(threads=len(common.CORES))
    options.add_argument("--seeds", type=int, default=4, help="25 lanes each")
    options.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[100, 1000],
        help="sizes of the data; the first one for the rivals too",
    )
    options.add_argument("--rival-seeds", type=int, default=1)
    options.add_argument("--repeats", type=int, default=5, help="of the sweep and of the bare gradients, in turns")
    options.add_argument("--cores", type=int, help="time the sweep alone on so many cores, and print lanes a second")
    options = common.parse(options, arguments, {"seeds": 1, "repeats": 1, "samples": [20]})
    if options.cores:
        os.sched_setaffinity(0, set(common.CORES[: options.cores]))
        print(json.dumps(scaling(options.seeds, options.samples[0])))
        return
    tables, numbers, notes = throughput(options)
    common.save(options, tables, numbers, figure(numbers), notes)


def problem(samples: int) -> sj.Task:
    """A single-index teacher of ten inputs."""
    return sj.tasks.single_index(jnp.tanh, in_size=INPUTS, samples=samples, key=jax.random.key(1))


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def throughput(options: argparse.Namespace) -> tuple[list[common.Table], dict[str, Any], list[str]]:
    cores = available_cores()
    products = product_rate(cores)
    found = {samples: against_bare(problem(samples), options, products) for samples in options.samples}
    sizes = {samples: row for samples, (_, row) in found.items()}
    task = problem(options.samples[0])
    results, ours = found[options.samples[0]]
    lanes = results.status.size
    rows = {"sweep": {"lanes": lanes, "seconds": ours["sweep"], "right": int((results.status == "escaped").sum())}}
    rows["bare gradients"] = {"lanes": lanes, "seconds": ours["bare"], "right": None}
    seeds = range(options.rival_seeds)
    for name, rival in (
        ("vmap(diffeqsolve)", batched),
        ("loop over diffeqsolve", looped),
        ("PyTorch, torchdiffeq", pytorch),
    ):
        if (row := rival(task, seeds, results, cores)) is not None:
            rows[name] = row
    table = []
    for name, row in rows.items():
        row["rate"] = row["lanes"] / row["seconds"]
        right = "" if row["right"] is None else f"{row['right']} of {row['lanes']}"
        factor = rows["sweep"]["rate"] / row["rate"]
        table.append((name, str(row["lanes"]), f"{row['seconds']:.2f}", f"{row['rate']:.1f}", f"{factor:.2f}", right))
    busy, on_cores = busy_share(task), {}
    for count in sorted({1, cores}):
        command = [sys.executable, __file__, "--cores", str(count), "--seeds", str(options.seeds)]
        command += ["--samples", str(options.samples[0])]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        on_cores[count] = json.loads(done.stdout.splitlines()[-1])
    notes = [
        f"Matrix products: {products / 1e9:.0f} Gflop/s on {cores} cores. Slots of a refilled batch of 8 that work on a lane: {busy:.0%}."
    ]
    if jax.default_backend() != "cpu":
        faster = rows["sweep"]["rate"] / max(on_cores[cores].values())
        notes.append(f"{jax.devices()[0].device_kind}: {faster:.1f} times the lanes a second of {cores} cores.")
    tables = [
        common.Table(
            f"Flows of depths 2 to 6 on {cores} cores, {options.samples[0]} samples",
            ("", "lanes", "seconds", "lanes a second", "sweep is faster by", "escape times within 1 %"),
            table,
        ),
        common.Table(
            "Against the gradients it spends",
            (
                "samples",
                "first call (s)",
                "sweep (s)",
                "bare gradients (s)",
                "sweep / bare (each repeat)",
                "share of the rate of matrix products",
            ),
            [
                (
                    str(samples),
                    f"{row['first']:.1f}",
                    f"{row['sweep']:.2f}",
                    f"{row['bare']:.2f}",
                    f"{row['ratio']:.2f} ({', '.join(f'{ratio:.2f}' for ratio in row['ratios'])})",
                    f"{row['share']:.0%}",
                )
                for samples, row in sizes.items()
            ],
        ),
        common.Table(
            "Lanes a second of the sweep",
            ("cores", *(f"{count} lanes" for count in on_cores[1])),
            [(str(count), *(f"{rate:.1f}" for rate in rates.values())) for count, rates in on_cores.items()],
        ),
    ]
    numbers = {
        "cores": cores,
        "rows": rows,
        "sizes": sizes,
        "product_rate": products,
        "busy": busy,
        "on_cores": on_cores,
    }
    return tables, numbers, notes


def against_bare(task: sj.Task, options: argparse.Namespace, products: float) -> tuple[xr.Dataset, dict[str, Any]]:
    """A sweep; and how long it and the gradients it spent take at best, in turns. The first call, which compiles, apart."""
    run = lambda: sj.sweep(task, **GRID, seed=range(options.seeds)).steps.values  # noqa: E731
    first = seconds(run)
    results = sj.sweep(task, **GRID, seed=range(options.seeds))
    bare = bare_gradients(task, results)
    times = [(seconds(run), seconds(bare)) for _ in range(options.repeats)]
    ours, gradients = (min(column) for column in zip(*times, strict=True))  # what else the machine does only adds
    ratios = [a / b for a, b in times]
    return results, {
        "first": first,
        "sweep": ours,
        "bare": gradients,
        "ratios": ratios,
        "ratio": ours / gradients,
        "share": flops(task, results) / ours / products,
    }


def scaling(seeds: int, samples: int) -> dict[int, float]:
    """Lanes a second for one seed, and for all of them."""
    task, rates = problem(samples), {}
    for count in sorted({1, seeds}):
        run = lambda count=count: sj.sweep(task, **GRID, seed=range(count)).steps.values  # noqa: E731
        run()
        lanes = len(DEPTHS) * len(SCALES) * count
        rates[lanes] = lanes / float(np.median([seconds(run) for _ in range(3)]))
    return rates


def bare_gradients(task: sj.Task, results: xr.Dataset) -> Callable[[], Any]:
    """Runs the gradients and Hessian-vector products of the sweep, on all cores, without anything else."""

    @jax.jit
    def gradients(weights: tuple, count: jax.Array) -> tuple:
        like = sj.MLP.from_weights(weights, "tanh")

        def step(_: int, w: tuple) -> tuple:
            slope = jax.grad(lambda w: task_loss(like.with_weights(w), task))(w)
            return tuple(a - 1e-6 * b for a, b in zip(w, slope, strict=True))

        return jax.lax.fori_loop(0, count, step, weights)

    jobs = []
    for depth in DEPTHS:
        net = network(jax.random.key(0), 1.0, depth)
        lanes = results.sel(depth=depth)
        # A Hessian-vector product costs two gradients.
        counts = np.ravel(lanes.gradient_evaluations + 2 * lanes.hessian_vector_products)
        jax.block_until_ready(gradients(net.weights, 1))
        jobs += [(net.weights, int(count)) for count in counts]

    def run() -> None:
        with ThreadPoolExecutor(available_cores()) as pool:
            list(pool.map(lambda job: jax.block_until_ready(gradients(*job)), jobs))

    return run


def flops(task: sj.Task, results: xr.Dataset) -> float:
    """Of the matrix products in the gradients of a sweep: three for each layer, two for the first."""
    total = 0.0
    for depth in DEPTHS:
        sizes = [INPUTS, *[WIDTH] * (depth - 1), 1]
        layers = [2 * task.samples * a * b for a, b in zip(sizes[1:], sizes[:-1], strict=True)]
        lanes = results.sel(depth=depth)
        count = float((lanes.gradient_evaluations + 2 * lanes.hessian_vector_products).sum())
        total += count * (3 * sum(layers) - layers[0])
    return total


def product_rate(cores: int) -> float:
    """Floating-point operations a second of large matrix products, one on every core at a time."""
    size = 1024
    a = jnp.ones((size, size)) / size
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    jax.block_until_ready(product(a))

    def run() -> list:
        with ThreadPoolExecutor(cores) as pool:
            return list(pool.map(lambda _: jax.block_until_ready(product(a)), range(4 * cores)))

    return 4 * cores * 2 * size**3 / min(seconds(run) for _ in range(5))


def busy_share(task: sj.Task) -> float:
    """The share of slots and chunks of a refilled batch of 8 that work on a lane, at depth 4."""
    given = {"until": HALF}
    flows = _flows(task, WIDTH, 4, "tanh", None, SCALES, range(13), None, given, 8)
    points = flows.grid.points(tuple(slice(0, n) for n in flows.grid.shape))
    points.sort(key=lambda point: point["scale"])
    structure, common = flows.structure(points[0]), flows.common(points[0])
    lanes = jax.tree.map(lambda *values: np.stack(values), *[flows.values(point, structure) for point in points])
    done = batch_program(structure, 8)(common, lanes, np.asarray(len(points)))
    return float(done.busy / (8 * done.chunks))


def network(key: jax.Array, scale: float | jax.Array, depth: int) -> sj.MLP:
    return sj.scale_layers(sj.MLP([INPUTS, *[WIDTH] * (depth - 1), 1], "tanh", key=key), scale)


def plain(task: sj.Task, depth: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The escape time of a lane by diffrax in physical time."""

    def solve(key: jax.Array, scale: jax.Array) -> jax.Array:
        net = network(key, scale, depth)

        def field(t: jax.Array, w: tuple, args: None) -> tuple:
            return jax.tree.map(jnp.negative, jax.grad(lambda w: task_loss(net.with_weights(w), task))(w))

        def escaped(t: jax.Array, y: tuple, args: None, **_: object) -> jax.Array:
            return task_loss(net.with_weights(y), task) - 0.5 * zero_loss(task)

        solution = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dfx.Tsit5(),
            0.0,
            1e30,
            None,
            net.weights,
            stepsize_controller=dfx.PIDController(rtol=RTOL, atol=ATOL),
            event=dfx.Event(escaped),
            max_steps=MOST_STEPS,
            throw=False,
        )
        return solution.ts[-1]

    return solve


def judged(times: np.ndarray, total: float, results: xr.Dataset) -> dict[str, Any]:
    """A row of the table from escape times, with axes depth, scale, seed."""
    logs = results.log_escape_time.isel(activation=0, bottleneck=0, seed=slice(0, times.shape[2]))
    with np.errstate(invalid="ignore", divide="ignore"):
        right = np.abs(np.log(times) - logs.transpose("depth", "scale", "seed").values) < 0.01
    return {"lanes": times.size, "seconds": total, "right": int(right.sum())}


def batched(task: sj.Task, seeds: range, results: xr.Dataset, cores: int) -> dict[str, Any]:
    """One `vmap` over the scales and seeds of a depth; compilation does not count."""
    keys = jnp.stack([jax.random.key(seed) for _ in SCALES for seed in seeds])
    scales = jnp.asarray([scale for scale in SCALES for _ in seeds])
    times, total = [], 0.0
    for depth in DEPTHS:
        run = jax.jit(jax.vmap(plain(task, depth))).lower(keys, scales).compile()
        began = time.perf_counter()
        times.append(np.asarray(run(keys, scales)).reshape(len(SCALES), len(seeds)))
        total += time.perf_counter() - began
    return judged(np.stack(times), total, results)


def looped(task: sj.Task, seeds: range, results: xr.Dataset, cores: int) -> dict[str, Any]:
    """A compiled solve of one lane for each depth, called lane by lane from as many threads as there are cores."""
    lanes = [(scale, seed) for scale in SCALES for seed in seeds]
    times, total = [], 0.0
    for depth in DEPTHS:
        run = jax.jit(plain(task, depth)).lower(jax.random.key(0), jnp.asarray(1.0)).compile()
        jobs = [(jax.random.key(seed), jnp.asarray(scale)) for scale, seed in lanes]
        began = time.perf_counter()
        with ThreadPoolExecutor(cores) as pool:
            found = list(pool.map(lambda job, run=run: float(run(*job)), jobs))
        total += time.perf_counter() - began
        times.append(np.reshape(found, (len(SCALES), len(seeds))))
    return judged(np.stack(times), total, results)


def pytorch(task: sj.Task, seeds: range, results: xr.Dataset, cores: int) -> dict[str, Any] | None:
    """A loop over lanes: `odeint_event` of torchdiffeq with dopri5, as many threads as there are cores.

    It integrates until the event, so only lanes are run that escape before time 1e4; the others count as not reached.
    """
    try:
        import torch
        from torchdiffeq import odeint_event
    except ImportError:
        common.missing("torch torchdiffeq", "PyTorch")
        return None
    torch.set_num_threads(cores)
    x, y = (torch.tensor(np.asarray(a)) for a in (task.x, task.y))
    half = 0.5 * float(zero_loss(task))
    times, total = np.full((len(DEPTHS), len(SCALES), len(seeds)), np.nan), 0.0
    tried = 0

    def loss(weights: list) -> Any:
        h = x
        for w in weights[:-1]:
            h = torch.tanh(h @ w.T)
        return 0.5 * ((h @ weights[-1].T - y) ** 2).sum(1).mean()

    def field(t: Any, weights: tuple) -> tuple:
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in weights]
            return tuple(-slope for slope in torch.autograd.grad(loss(leaves), leaves))

    def run(depth: int, scale: float, seed: int) -> float:
        start = tuple(torch.tensor(np.asarray(w)) for w in network(jax.random.key(seed), scale, depth).weights)
        with torch.no_grad():
            event = lambda t, weights: loss(list(weights)) - half  # noqa: E731
            zero = torch.zeros((), dtype=torch.float64)
            return float(odeint_event(field, start, zero, event_fn=event, rtol=RTOL, atol=ATOL, method="dopri5")[0])

    run(2, SCALES[0], 0)
    logs = results.log_escape_time.isel(activation=0, bottleneck=0)
    for i, depth in enumerate(DEPTHS):
        for j, scale in enumerate(SCALES):
            for k, seed in enumerate(seeds):
                if float(logs.sel(depth=depth, scale=scale, seed=seed)) < np.log(1e4):
                    began = time.perf_counter()
                    times[i, j, k] = run(depth, scale, seed)
                    total += time.perf_counter() - began
                    tried += 1
    return judged(times, total, results) | {"lanes": tried}


def figure(results: dict[str, Any]) -> Figure:
    fig, ((ax,),) = common.axes(1, width=5.4, height=3)
    rows = results["rows"]
    ax.barh(list(rows)[::-1], [row["rate"] for row in rows.values()][::-1], color=sj.plot.COLOURS[0])
    ax.set(xscale="log", xlabel=f"lanes a second on {results['cores']} cores")
    return fig


if __name__ == "__main__":
    main()
