"""Throughput and memory of sweeps: `python benchmarks/sweep.py`, `--memory` for 10,000 lanes, `--kills` for 20 kills.

Throughput compares, in one run, on the same mixed grid (depths 2–6, init scales 1e-1 … 1e-5, tanh, width 32, 100 samples):

- `sweep`, after compilation;
- the bare gradients it spent: as many evaluations of a compiled `jax.grad` of each depth, on as many cores, and
  Hessian-vector products at the cost of forward over forward derivatives of the loss;
- plain `vmap(diffeqsolve)` of `dθ/dt = −∇𝓛` for each depth, Tsit5 with rtol 1e-4, atol 1e-6 and an event at the escape.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import saddlejax as sj
from saddlejax.sweep.execute import available_cores
from saddlejax.tasks.task import task_loss, zero_loss

jax.config.update("jax_enable_x64", True)

WIDTH, DEPTHS, SCALES = 32, (2, 3, 4, 5, 6), tuple(float(f"{s:.3g}") for s in np.geomspace(1e-1, 1e-5, 5))
HALF = sj.Escape(loss_fraction=0.5)
MOST_STEPS = 4096  # the default of diffrax


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--store", type=Path, help="used by --kills")
    options = parser.parse_args()
    if options.store:
        killable(options.store)
    elif options.kills:
        kills(options.kills)
    elif options.memory:
        memory()
    else:
        throughput(options.seeds)


def problem() -> sj.Task:
    """A single-index teacher of ten inputs."""
    return sj.tasks.single_index(jnp.tanh, in_size=10, samples=100, key=jax.random.key(1))


def throughput(seeds: int) -> None:
    """Lanes a second of a sweep, of plain integration, and of bare gradients."""
    task = problem()
    grid = {"width": WIDTH, "depth": DEPTHS, "activation": "tanh", "scale": SCALES, "until": HALF}
    began = time.perf_counter()
    sj.sweep(task, **grid, seed=range(seeds))
    first = time.perf_counter() - began
    began = time.perf_counter()
    results = sj.sweep(task, **grid, seed=range(seeds, 2 * seeds))
    ours = time.perf_counter() - began
    lanes = results.status.size
    escaped = int((results.status == "escaped").sum())
    bare = bare_gradients(task, results)
    print(f"{lanes} lanes on {available_cores()} cores, {escaped} escaped")
    print(
        f"sweep              {ours:8.2f} s   {lanes / ours:8.1f} lanes/s   (first call, with compilation: {first:.1f} s)"
    )
    print(f"bare gradients     {bare:8.2f} s   sweep / gradients = {ours / bare:.2f}")
    theirs, right = plain(task, range(seeds, 2 * seeds), results)
    print(
        f"vmap(diffeqsolve)  {theirs:8.2f} s   {lanes / theirs:8.1f} lanes/s   {right} of {lanes} escape times within 1 %"
    )
    print(f"sweep / vmap(diffeqsolve) = {theirs / ours:.1f} times the lanes a second")


def bare_gradients(task: sj.Task, results: xr.Dataset) -> float:
    """Seconds for the gradients and Hessian-vector products of the sweep, on all cores, without anything else."""

    @jax.jit
    def gradients(weights: tuple, count: jax.Array) -> tuple:
        like = sj.MLP.from_weights(weights, "tanh")

        def step(_: int, w: tuple) -> tuple:
            slope = jax.grad(lambda w: task_loss(like.with_weights(w), task))(w)
            return tuple(a - 1e-6 * b for a, b in zip(w, slope, strict=True))

        return jax.lax.fori_loop(0, count, step, weights)

    jobs = []
    for depth in DEPTHS:
        net = sj.MLP([10, *[WIDTH] * (depth - 1), 1], "tanh", key=jax.random.key(0))
        lanes = results.sel(depth=depth)
        # A Hessian-vector product costs two gradients.
        counts = np.ravel(lanes.gradient_evaluations + 2 * lanes.hessian_vector_products)
        jax.block_until_ready(gradients(net.weights, 1))
        jobs += [(net.weights, int(count)) for count in counts]
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        with ThreadPoolExecutor(available_cores()) as pool:
            list(pool.map(lambda job: jax.block_until_ready(gradients(*job)), jobs))
        best = min(best, time.perf_counter() - began)
    return best


def plain(task: sj.Task, seeds: range, results: xr.Dataset) -> tuple[float, int]:
    """Seconds of `vmap(diffeqsolve)` in physical time, and how many escape times agree with the sweep's to 1 %."""
    total, right = 0.0, 0
    for depth in DEPTHS:

        def solve(key: jax.Array, scale: jax.Array, depth: int = depth) -> jax.Array:
            net = sj.scale_layers(sj.MLP([10, *[WIDTH] * (depth - 1), 1], "tanh", key=key), scale)

            def field(t: jax.Array, w: tuple, args: None) -> tuple:
                return jax.tree.map(jnp.negative, jax.grad(lambda w: task_loss(net.with_weights(w), task))(w))

            def escaped(t: jax.Array, y: tuple, args: None, **_: object) -> jax.Array:
                return task_loss(net.with_weights(y), task) - 0.5 * zero_loss(task)

            event = dfx.Event(escaped)
            solution = dfx.diffeqsolve(
                dfx.ODETerm(field),
                dfx.Tsit5(),
                0.0,
                1e30,
                None,
                net.weights,
                stepsize_controller=dfx.PIDController(rtol=1e-4, atol=1e-6),
                event=event,
                max_steps=MOST_STEPS,
                throw=False,
            )
            return solution.ts[-1]

        keys = jnp.stack([jax.random.key(seed) for _ in SCALES for seed in seeds])
        scales = jnp.asarray([scale for scale in SCALES for _ in seeds])
        run = jax.jit(jax.vmap(solve)).lower(keys, scales).compile()
        began = time.perf_counter()
        times = np.asarray(run(keys, scales)).reshape(len(SCALES), len(seeds))
        total += time.perf_counter() - began
        logs = results.log_escape_time.sel(depth=depth).isel(activation=0, bottleneck=0).transpose("scale", "seed")
        with np.errstate(invalid="ignore", divide="ignore"):
            right += int((np.abs(np.log(times) - logs.values) < 0.01).sum())
    return total, right


def memory() -> None:
    """Peak host memory of 10,000 lanes of depth 3, width 32, against that of a hundredth of them."""
    task = problem()
    for lanes in (100, 10_000):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            grid = {"width": 32, "depth": 3, "activation": "tanh", "scale": 1e-2, "seed": range(lanes)}
            results = sj.sweep(task, **grid, until=sj.Time(10.0), store=Path(folder) / "memory.zarr")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - began
        print(f"{results.status.size:6d} lanes: peak {peak:.0f} MiB, {seconds:.1f} s, {np.unique(results.status)[0]}")


def killable(store: Path) -> None:
    """The sweep that is killed: 240 flows in blocks of four."""
    grid = {"width": 16, "depth": [2, 4], "activation": "tanh", "scale": [1e-2, 1e-4], "seed": range(60)}
    sj.sweep(problem(), **grid, until=HALF, store=store, block=4)


def kills(count: int) -> None:
    """SIGKILL at random moments, a restart each time, and a comparison with an uninterrupted sweep."""
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment = {**os.environ, **cache}

        blocks = "status/c/*/*/*/*/*"

        def written() -> int:
            return len(list(killed.glob(blocks)))

        def begin(store: Path) -> subprocess.Popen:
            return subprocess.Popen([sys.executable, __file__, "--store", str(store)], env=environment)

        whole, killed = Path(folder) / "whole.zarr", Path(folder) / "killed.zarr"
        begin(whole).wait()
        began = time.perf_counter()
        begin(Path(folder) / "timed.zarr").wait()
        whole_time = time.perf_counter() - began
        done = 0
        while done < count:
            before = written()
            process = begin(killed)
            if done % 2 == 0:  # at any moment of its life
                time.sleep(moments.uniform(0, whole_time))
            else:  # while it writes
                while process.poll() is None and written() == before:
                    time.sleep(0.01)
                time.sleep(moments.uniform(0, 0.5))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                done += 1
            process.wait()
            print(f"kill {done}: {before} blocks of 60 before, {written()} after", flush=True)
            if written() == 60 and done < count:
                # Everything is there: begin once more from half of it.
                for file in sorted(killed.glob(blocks))[::2]:
                    file.unlink()
        begin(killed).wait()
        same = [xr.open_zarr(path, consolidated=False).load() for path in (whole, killed)]
        xr.testing.assert_equal(*same)
        print(f"identical after {done} kills ({whole_time:.1f} s for an uninterrupted run with a warm cache)")


if __name__ == "__main__":
    main()
