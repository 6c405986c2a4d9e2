"""The collapse of all activations, and the order of the imbalance certificate."""

import jax
import numpy as np
import pytest

import saddlejax as sj


def test_all_smooth_activations_collapse():
    results = sj.collapse(scale=[1e-1, 1e-3])
    assert results.activation.size >= 10
    assert bool((results.status == "escaped").all())
    collapsed = np.exp(results.log_collapsed_time.sel(scale=1e-3).values)
    raw = np.exp(results.log_escape_time.sel(scale=1e-3).values)
    assert np.ptp(collapsed) / np.mean(collapsed) < 0.01
    assert np.ptp(raw) / np.mean(raw) > 1
    # The closed form the curves collapse to: (ε^{2−L} − …)/((L−2)), L = 4.
    np.testing.assert_allclose(collapsed, 0.5e6, rtol=0.01)
    axes = sj.plot.collapse(results)
    assert [len(ax.lines) for ax in axes] == [results.activation.size] * 2


def test_activations_without_the_law_are_refused():
    for name in ("relu", "sigmoid", "squared_relu"):
        with pytest.raises(ValueError, match="activation must be zero at zero with one non-zero slope"):
            sj.collapse([name], [1e-2])


def test_error_of_conserved_imbalances_falls_with_the_tolerance():
    task = sj.tasks.linear_teacher([2.0, 1.0], in_size=3)
    net = sj.scale_layers(sj.MLP([3, 5, 5, 2], "identity", key=jax.random.key(2)), 0.3)
    tolerances = np.array([1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
    errors = [float(sj.gradient_flow(net, task, sj.Loss(0.2), rtol=rtol).imbalance_error) for rtol in tolerances]
    # The error of each step is kept at the tolerance, so the drift is proportional to it.
    assert np.polyfit(np.log(tolerances), np.log(errors), 1)[0] == pytest.approx(1, abs=0.2)
