"""Sweeps on several devices and in several processes: the results of one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

SCRIPT = Path(__file__).with_name("device_sweep.py")


def begin(*arguments, devices=1):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd=SCRIPT.parent, stdout=subprocess.PIPE, text=True)


def said(process):
    words, _ = process.communicate()
    assert process.returncode == 0, words
    return words.strip().splitlines()[-1]


def assert_same(a, b, apart=()):
    assert (a.status == b.status).all() and (a.status == "escaped").all()
    for name in set(a.data_vars) - {"status", *apart}:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "one.nc"
    assert said(begin(out, 0)) == "4 blocks on 1 devices"
    return xr.load_dataset(out, engine="scipy")


@pytest.mark.parametrize("batch", [0, 2])
def test_all_devices_of_a_host_are_used(tmp_path, alone, batch):
    assert said(begin(tmp_path / "two.nc", batch, devices=2)).endswith("on 2 devices")
    # A batch takes the last steps of a flow once more, to locate its end.
    counts = ("gradient_evaluations", "hessian_vector_products") if batch else ()
    assert_same(xr.load_dataset(tmp_path / "two.nc", engine="scipy"), alone, counts)


def test_processes_share_the_blocks_of_a_store(tmp_path, alone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = tmp_path / "shared.zarr"
    both = [begin("-", 0, store, port, process) for process in range(2)]
    assert [said(process).split(" on ")[0] for process in both] == ["2 blocks", "2 blocks"]
    with xr.open_zarr(store) as shared:
        assert_same(shared.load(), alone)
