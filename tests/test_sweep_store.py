"""Nothing is lost: stores that are killed, damaged, full or another's; work that is lost and tried again.

What is written and read back are small whole numbers, so that equality to the last bit is what is tested.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from toy_sweep import ToyProblem, run

from saddlejax.sweep.execute import available_cores

SCRIPT = Path(__file__).with_name("toy_sweep.py")


def values(problem):
    return 10.0 * np.arange(problem.rows)[:, None] + np.arange(problem.columns)


def lanes_in(log):
    return Counter(log.read_text().split()) if log.exists() else Counter()


def test_killed_at_random_moments_it_ends_with_the_same_results(tmp_path):
    store, log = tmp_path / "killed.zarr", tmp_path / "log"
    moments, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen([sys.executable, str(SCRIPT), str(store), str(log)], cwd=SCRIPT.parent)
        before = len(lanes_in(log))
        while process.poll() is None and len(lanes_in(log)) <= before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        if process.poll() is not None or kills == 2:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        with xr.open_zarr(store, consolidated=False) as readable:
            known = readable.status.values == "escaped"
            np.testing.assert_array_equal(readable.value.values[known], values(ToyProblem(6, 8))[known])
    assert process.wait() == 0
    assert kills == 2
    results = run(ToyProblem(rows=6, columns=8), store)
    whole = run(ToyProblem(rows=6, columns=8), tmp_path / "whole.zarr")
    xr.testing.assert_equal(results, whole)
    again = sum(lanes_in(log).values()) - results.value.size
    assert again <= kills * 2 * 2 * available_cores()  # two lanes a block, and as many blocks waiting as running


def test_damaged_blocks_are_computed_again_and_no_others(tmp_path):
    path, log = tmp_path / "damaged.zarr", tmp_path / "log"
    problem = ToyProblem(log=str(log))
    first = run(problem, path)
    assert sum(lanes_in(log).values()) == 20
    flipped, cut, gone = (path / name for name in ("value/c/0/0", "powers/c/1/1/0", "value/c/2/2"))
    content = bytearray(flipped.read_bytes())
    content[-6] ^= 0xFF
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:5])
    gone.unlink()
    log.unlink()
    with pytest.warns(UserWarning, match="damaged blocks, 3 in number"):
        again = run(problem, path)
    xr.testing.assert_identical(again, first)
    assert lanes_in(log) == Counter(["0", "1", "12", "13", "24"])


def test_a_store_is_refused_that_holds_another_sweep_or_something_else(tmp_path):
    run(ToyProblem(), tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=r"factor: 10\.0 in the store, 11\.0 asked for"):
        run(ToyProblem(factor=11.0), tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=r"grid\.b: \[0, 1, 2, 3, 4\] in the store, \[0, 1\] asked for"):
        run(ToyProblem(columns=2), tmp_path / "a.zarr")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="new folder or one that a sweep wrote"):
        run(ToyProblem(), tmp_path / "other")
    assert (tmp_path / "other" / "letter.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "a.zarr" / "value")
    with pytest.raises(ValueError, match=r"a\.zarr/value is missing or damaged"):
        run(ToyProblem(), tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"or its zarr\.json is damaged"):
        run(ToyProblem(), tmp_path / "a.zarr")


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="store cannot be created"):
        run(ToyProblem(), tmp_path / "file" / "a.zarr")


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path):
    path, log = tmp_path / "full.zarr", tmp_path / "log"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(progress):
        if progress.done >= 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))

    try:
        with pytest.raises(OSError, match="What was written before is safe"):
            run(ToyProblem(), path, on_progress=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    results = run(ToyProblem(log=str(log)), path)
    np.testing.assert_array_equal(results.value, values(ToyProblem()))
    assert sum(lanes_in(log).values()) <= 20 - 6


class Forgetful(ThreadPoolExecutor):
    """Loses the first so many submissions."""

    def __init__(self, lost):
        super().__init__(1)
        self.lost = lost

    def submit(self, function, /, *arguments):
        if self.lost > 0:
            self.lost -= 1
            return super().submit(self._lose)
        return super().submit(function, *arguments)

    def _lose(self):
        raise ConnectionError("worker lost")


def test_lost_work_is_tried_again_then_recorded_then_tried_by_the_next_call(tmp_path):
    seen = []
    with Forgetful(lost=3) as executor:
        results = run(ToyProblem(), tmp_path / "a.zarr", executor, on_progress=seen.append)
    np.testing.assert_array_equal(results.value, values(ToyProblem()))
    assert (seen[-1].retries, seen[-1].failed) == (3, 0)
    with Forgetful(lost=10**6) as executor:
        results = run(ToyProblem(), tmp_path / "b.zarr", executor, retries=1, on_progress=seen.append)
    assert set(results.status.values.ravel()) == {"failed: ConnectionError: worker lost"}
    assert np.isnan(results.value).all()
    assert seen[-1].failed == 20
    np.testing.assert_array_equal(run(ToyProblem(), tmp_path / "b.zarr").value, values(ToyProblem()))


def test_a_broken_executor_is_an_error_that_says_what_to_do(tmp_path):
    class Broken(ThreadPoolExecutor):
        def submit(self, function, /, *arguments):
            return super().submit(self._break)

        def _break(self):
            raise BrokenExecutor("gone")

    with Broken(1) as executor, pytest.raises(RuntimeError, match="Call the sweep again"):
        run(ToyProblem(), tmp_path / "a.zarr", executor)


def test_a_lane_that_fails_is_recorded_and_harms_no_other(tmp_path):
    results = run(ToyProblem(failing=23), tmp_path / "a.zarr")
    assert str(results.status.sel(a=2, b=3).item()) == "failed: ArithmeticError: this lane fails"
    assert np.isnan(results.value.sel(a=2, b=3)) and np.isnan(results.powers.sel(a=2, b=3)).all()
    assert (results.status == "escaped").sum() == 19
    assert (run(ToyProblem(), tmp_path / "a.zarr").status == "escaped").all()


def test_results_carry_dimensions_meanings_and_provenance(tmp_path):
    results = run(ToyProblem(), tmp_path / "a.zarr")
    assert dict(results.sizes) == {"a": 4, "b": 5, "power": 3}
    assert {"saddlejax", "commit", "jax", "device", "begun"} <= set(results.attrs)
    assert results.value.attrs == {"long_name": "value", "units": "1"}
    assert os.environ.get("CI") is None or results.attrs["commit"] != ""
    with xr.open_zarr(tmp_path / "a.zarr", consolidated=False) as opened:
        np.testing.assert_array_equal(opened.powers, results.powers)


def test_a_store_opens_without_a_warning(tmp_path):
    problem = ToyProblem()
    results = run(problem, tmp_path / "a.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_zarr(tmp_path / "a.zarr") as stored:
            np.testing.assert_array_equal(stored.value, results.value)
