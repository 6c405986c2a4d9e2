"""Nothing is lost: stores that are killed, damaged, full or another's; work that is lost and tried again.

What is written and read back are small whole numbers, so that equality to the last bit is what is tested.
"""

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
import zarr
from toy_sweep import ToyProblem, run

from saddlejax._host.threads import available_cores

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
    assert {"saddlejax", "jax", "device", "begun"} <= set(results.attrs)
    assert results.value.attrs == {"long_name": "value", "units": "1"}
    assert "unknown" not in results.attrs.values()
    with xr.open_zarr(tmp_path / "a.zarr", consolidated=False) as opened:
        np.testing.assert_array_equal(opened.powers, results.powers)


def test_a_store_opens_without_a_warning(tmp_path):
    problem = ToyProblem()
    results = run(problem, tmp_path / "a.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_zarr(tmp_path / "a.zarr") as stored:
            np.testing.assert_array_equal(stored.value, results.value)


def test_a_store_is_extended_by_longer_lists_and_computes_only_what_is_new(tmp_path):
    path, log = tmp_path / "a.zarr", tmp_path / "log"
    run(ToyProblem(rows=2, columns=4), path)
    larger = ToyProblem(rows=3, columns=6, log=str(log))
    extended = run(larger, path)
    xr.testing.assert_equal(extended, run(ToyProblem(rows=3, columns=6), tmp_path / "whole.zarr"))
    new = {f"{10 * a + b}" for a in range(3) for b in range(6) if a == 2 or b >= 4}
    assert lanes_in(log) == Counter(new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_zarr(path) as stored:
            np.testing.assert_array_equal(stored.value, values(larger))
            assert stored.b.values.tolist() == list(range(6))
    run(larger, path)
    assert sum(lanes_in(log).values()) == len(new)
    with pytest.raises(ValueError, match="can be extended by values at the ends of its lists"):
        run(ToyProblem(rows=3, columns=5), path)


def test_an_extension_that_is_interrupted_is_finished_by_the_next_call(tmp_path, monkeypatch):
    path, larger = tmp_path / "a.zarr", ToyProblem(columns=7)
    run(ToyProblem(), path)
    resize, calls = zarr.Array.resize, []

    def fail_at_the_third(array, shape):
        calls.append(shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        resize(array, shape)

    monkeypatch.setattr(zarr.Array, "resize", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(larger, path)
    monkeypatch.undo()
    np.testing.assert_array_equal(run(larger, path).value, values(larger))


class FourPowers(ToyProblem):
    """The toy with one power more."""

    @property
    def outputs(self):
        outputs = super().outputs
        return {**outputs, "powers": outputs["powers"]._replace(shape=(4,))}


def test_a_store_is_not_extended_where_measurements_would_change_their_shape(tmp_path):
    run(ToyProblem(), tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="only where the measurements of a lane keep their shapes"):
        run(FourPowers(columns=6), tmp_path / "a.zarr")


def test_what_was_computed_is_kept_when_a_sweep_is_interrupted(tmp_path):
    """An interruption while the first results are written: blocks that run are stopped, those that are done are kept."""
    path, log = tmp_path / "a.zarr", tmp_path / "log"

    def interrupt(progress):
        if progress.done > 0:
            raise KeyboardInterrupt

    problem = ToyProblem(rows=20, columns=2, seconds=0.01, log=str(log))
    with pytest.raises(KeyboardInterrupt):
        run(problem, path, on_progress=interrupt)
    computed = sum(lanes_in(log).values())
    assert computed <= 2 * 3 * available_cores()
    with xr.open_zarr(path) as stored:
        kept = int((stored.status == "escaped").sum())
    assert kept >= 2
    np.testing.assert_array_equal(run(problem, path).value, values(problem))
    assert sum(lanes_in(log).values()) <= 40 + computed - kept
