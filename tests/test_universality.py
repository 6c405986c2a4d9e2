"""The scalar chain against wide networks and closed forms; the collapse of all activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import HALF, SMALL

import saddlejax as sj


def wide(norms, width, activation):
    """A network of identical neurons with these layer norms; one input, one output."""
    first = jnp.full((width, 1), norms[0] / np.sqrt(width))
    hidden = [jnp.full((width, width), x / width) for x in norms[1:-1]]
    last = jnp.full((1, width), norms[-1] / np.sqrt(width))
    return sj.MLP.from_weights([first, *hidden, last], activation)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_chain_is_the_wide_network_of_identical_neurons(activation):
    norms, width = [0.03, 0.05, 0.07, 0.09], 7
    net, task = sj.manifold.chain(norms, jnp.sin, activation, width)
    full = wide(norms, width, activation)
    np.testing.assert_allclose(jax.vmap(full)(task.x), jax.vmap(net)(task.x), rtol=1e-12)
    reduced = sj.gradient_flow(net, task, HALF, rtol=1e-8, save=SMALL)
    flow = sj.gradient_flow(full, task, HALF, rtol=1e-8, save=SMALL)
    assert float(reduced.log_escape_time) == pytest.approx(float(flow.log_escape_time), abs=1e-6)
    np.testing.assert_allclose(reduced.layer_norms[-1], flow.layer_norms[-1], rtol=1e-5)
    np.testing.assert_allclose(reduced.imbalance[0], flow.imbalance[0], rtol=1e-10)
    assert float(reduced.imbalance_error) < 1e-6


@pytest.mark.parametrize(
    ("activation", "depth", "scale", "expected"),
    [
        ("tanh", 3, 1e-1, 0.8775),
        ("tanh", 3, 1e-3, 0.9988),
        ("tanh", 4, 1e-1, 0.9892),
        ("gelu", 3, 1e-2, 0.9917),
        ("erf", 4, 1e-1, 0.9867),
        ("silu", 6, 1e-1, 0.9999),
    ],
)
def test_escape_times_approach_the_law_with_its_prefactor(activation, depth, scale, expected):
    # τ K (L−2) ε^{L−2} → 1 with K = α^{L−1}; the values on the way were computed independently, to four digits.
    net, task = sj.manifold.chain([scale] * depth, lambda g: g, activation, 50)
    flow = sj.gradient_flow(net, task, HALF, rtol=1e-7, save=SMALL)
    gain = sj.classify_activation(activation).gain
    ratio = float(flow.escape_time) * gain ** (depth - 1) * (depth - 2) * scale ** (depth - 2)
    assert ratio == pytest.approx(expected, abs=6e-5)


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
    with pytest.raises(ValueError, match="scales must hold at least two layer norms"):
        sj.manifold.chain([0.1], jnp.sin, "tanh", 5)


def test_error_of_conserved_imbalances_falls_with_the_tolerance():
    task = sj.tasks.linear_teacher([2.0, 1.0], in_size=3)
    net = sj.scale_layers(sj.MLP([3, 5, 5, 2], "identity", key=jax.random.key(2)), 0.3)
    tolerances = np.array([1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
    errors = [float(sj.gradient_flow(net, task, sj.Loss(0.2), rtol=rtol).imbalance_error) for rtol in tolerances]
    # The error of each step is kept at the tolerance, so the drift is proportional to it.
    assert np.polyfit(np.log(tolerances), np.log(errors), 1)[0] == pytest.approx(1, abs=0.2)
