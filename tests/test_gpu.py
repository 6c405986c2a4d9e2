"""On a machine with a GPU, what it computes is what the CPU computes. Elsewhere these tests are skipped."""

import contextlib

import jax
import numpy as np
import pytest
from problems import HALF, network, teacher

import saddlejax as sj
from saddlejax.objective import task_loss

GPUS = [device for device in jax.devices() if device.platform == "gpu"]
pytestmark = pytest.mark.skipif(not GPUS, reason="no GPU")

GRID = {"width": 32, "depth": [2, 4, 6], "activation": "tanh", "scale": [1e-1, 1e-3], "seed": range(3), "until": HALF}


def on_cpu():
    return jax.default_device(jax.local_devices(backend="cpu")[0])


@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-8), ("float32", 1e-3)])
def test_lanes_of_a_sweep_agree_with_flows_on_the_cpu(dtype, tolerance, batch):
    results = sj.sweep(teacher().astype(dtype), **GRID, dtype=dtype, batch=batch)
    assert (results.status == "escaped").all()
    save = sj.Save(steps=False, singular_values=False)
    with on_cpu():
        task = teacher().astype(dtype)
        for depth in GRID["depth"]:
            for scale in GRID["scale"]:
                sizes = [10, *[32] * (depth - 1), 1]
                net = sj.scale_layers(sj.MLP(sizes, "tanh", key=jax.random.key(2), dtype=dtype), scale)
                flow = sj.gradient_flow(net, task, HALF, save=save)
                lane = results.sel(depth=depth, scale=scale, seed=2).squeeze()
                np.testing.assert_allclose(lane.log_escape_time, flow.log_escape_time, rtol=tolerance)
                np.testing.assert_allclose(lane.layer_norms[:depth], flow.layer_norms[-1], rtol=10 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_matrix_products_are_not_rounded(dtype, tolerance):
    found = []
    for place in (contextlib.nullcontext(), on_cpu()):
        with place:
            net = network(4, "gelu", 1.0, width=256)
            net = net.with_weights([w.astype(dtype) for w in net.weights])
            task = teacher(1000).astype(dtype)
            slopes = jax.grad(lambda weights, net=net, task=task: task_loss(net.with_weights(weights), task))
            found.append(jax.device_get(slopes(net.weights)))
    for here, there in zip(*found, strict=True):
        assert np.linalg.norm(here - there) <= tolerance * np.linalg.norm(there)


def test_memory_of_a_large_batch_stays_within_bounds():
    results = sj.sweep(teacher(), **{**GRID, "seed": range(500)}, dtype="float32")
    assert (results.status == "escaped").all()
    use = GPUS[0].memory_stats()
    assert use["peak_bytes_in_use"] <= 0.75 * use["bytes_limit"]
