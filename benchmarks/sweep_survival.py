"""What a sweep survives: `python benchmarks/sweep_survival.py --kills 20`, and `--memory` for 10,000 lanes."""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import saddlejax as sj

jax.config.update("jax_enable_x64", True)

HALF = sj.Escape(loss_fraction=0.5)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="peak memory of 10,000 lanes")
    parser.add_argument("--kills", type=int, default=0, help="how many times to kill a sweep")
    parser.add_argument("--store", type=Path, help="used by --kills")
    options = parser.parse_args()
    if options.store:
        killable(options.store)
    if options.kills:
        kills(options.kills)
    if options.memory:
        memory()


def problem() -> sj.Task:
    """A single-index teacher of ten inputs."""
    return sj.tasks.single_index(jnp.tanh, in_size=10, samples=100, key=jax.random.key(1))


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
