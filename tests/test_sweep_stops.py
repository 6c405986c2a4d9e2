"""Pools of processes, threads of the linear algebra, interruptions: a sweep ends as it should and leaves nothing behind."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import pytest
import xarray as xr
from problems import teacher
from toy_sweep import ToyProblem, run

import saddlejax as sj

TASK = teacher(samples=30)
SMALL = {"width": 3, "depth": 2, "activation": "identity", "until": sj.Time(1.0), "seed": range(3)}


def python(code, **environment):
    """What a program prints."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_pool_of_forked_processes_is_refused_in_words(tmp_path):
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(RuntimeError, match=r"get_context\('spawn'\)"),
    ):
        run(ToyProblem(), tmp_path / "a.zarr", pool)


def test_a_pool_of_spawned_processes_gives_the_same_numbers():
    alone = sj.sweep(TASK, **SMALL)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        shared = sj.sweep(TASK, **SMALL, executor=pool, block=2)
    assert (alone.status == "time reached").all()
    xr.testing.assert_allclose(shared, alone, rtol=1e-10)


OVERLAPPING = """
import threading, scipy.linalg, threadpoolctl
from saddlejax._host.threads import one_blas_thread

def threads():
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

begun, end = threading.Event(), threading.Event()

def first():
    with one_blas_thread():
        begun.set()
        end.wait(30)

thread = threading.Thread(target=first, daemon=True)
print(threads())
thread.start()
begun.wait(30)
with one_blas_thread():
    end.set()
    thread.join()
    print(threads())
print(threads())
"""


def test_overlapping_limits_of_the_linear_algebra_leave_no_trace():
    """The second of two calls begins before the first ends, and ends after it and after its thread."""
    found = python(OVERLAPPING, OPENBLAS_NUM_THREADS="2")
    assert found.split("\n") == ["{2}", "{1}", "{2}"]


@pytest.mark.parametrize("name", ["sweep", "escape_scan", "collapse"])
def test_what_runs_on_the_host_says_so_under_a_transformation(name):
    def call(scale):
        if name == "collapse":
            return sj.collapse(["tanh"], [scale]).log_escape_time.values
        return getattr(sj, name)(TASK, width=3, depth=2, activation=["tanh"], scale=[scale]).log_escape_time.values

    words = rf"sj\.{name} runs on the host and cannot be used under jax\.jit, jax\.vmap or jax\.grad"
    with pytest.raises(ValueError, match=f"{words}, but scale was traced"):
        jax.vmap(call)(jnp.asarray([0.1]))
    with pytest.raises(ValueError, match=f"{words}, but it was called inside"):
        jax.jit(lambda x: x + call(0.1))(1.0)


INTERRUPTED = """
import gc
import sys
import jax
gc.disable()  # JAX has a callback in the collector, and a signal that comes while that runs is lost
jax.config.update("jax_enable_x64", True)
import saddlejax as sj

task = sj.tasks.linear_teacher([2.0, 1.0], in_size=3)
print("started", flush=True)
show = lambda *progress: print("lane", flush=True)
if sys.argv[1] == "scan":
    sj.escape_scan(task, width=3, depth=2, activation=["identity"], bottleneck=[1], scale=[0.1], seed=range(10**4), on_lane=show)
else:
    kind = {"batch": 2} if sys.argv[1] == "batch" else {}
    sj.sweep(task, width=3, depth=2, activation="identity", until=sj.Time(1.0), seed=range(20_000), block=20, store=sys.argv[2],
             on_progress=lambda progress: progress.done and show(), **kind)
"""


@pytest.mark.parametrize("moment", ["started", "lane"], ids=["while it compiles", "while it runs"])
@pytest.mark.parametrize("kind", ["scan", "sweep", "batch"])
def test_an_interruption_ends_the_program_and_keeps_what_was_computed(tmp_path, kind, moment):
    store = tmp_path / "a.zarr"
    command = [sys.executable, "-c", INTERRUPTED, kind, str(store)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    while moment not in lines:
        lines.append(process.stdout.readline().strip())
        assert lines[-1] != "", process.communicate()
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    rest, errors = process.communicate()
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors, errors
    assert rest.count("lane") < 1000
    if kind != "scan" and moment == "lane":
        with xr.open_zarr(store) as kept:
            assert int((kept.status == "time reached").sum()) >= 20 * (1 + rest.count("lane"))
