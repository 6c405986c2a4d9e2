import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saddle_problems import gaussian

import saddlejax as sj
from saddlejax import saddle

SIZES = [4, 5, 5, 2]


@pytest.fixture(scope="module")
def problem():
    task = gaussian(0)
    best = sj.escape_direction(task, SIZES, starts=2, key=jax.random.key(0))
    net = sj.scale_layers(sj.MLP(SIZES, key=jax.random.key(1)), 1e-2)
    return task, best, sj.gradient_flow(net, task, save=sj.Save(weights=True))


def test_rows_are_the_measures_of_the_saved_weights(problem):
    task, best, flow = problem
    along = saddle.along_flow(flow, task, best)
    rows = len(flow.losses)
    assert along.layer_cosines.shape == along.low_rank_margin.shape == (rows, 3)
    np.testing.assert_array_equal(along.log_times, flow.log_times)
    for row in (0, rows // 2, rows - 1):
        ws = [np.asarray(w[row]) for w in flow.weights]
        values = [np.linalg.svd(w)[1] for w in ws]
        margins = [v[0] / v[1] / layer**0.25 for layer, v in enumerate(values, start=1)]
        np.testing.assert_allclose(along.low_rank_margin[row], margins, rtol=1e-9)
        h = np.asarray(task.x).T
        for w in ws[:-1]:
            h = np.maximum(w @ h / np.linalg.norm(w), 0)
        speed = np.mean(np.sum(np.asarray(task.y).T * (ws[-1] / np.linalg.norm(ws[-1]) @ h), axis=0))
        np.testing.assert_allclose(along.speed_ratio[row], speed / best.speed, rtol=1e-9, atol=1e-12)
        cosines = saddle.layer_cosines(flow.net.with_weights([w[row] for w in flow.weights]), best.weights)
        np.testing.assert_allclose(along.layer_cosines[row], cosines, rtol=1e-9, atol=1e-12)


def test_the_speed_never_passes_the_bound_and_rises_along_the_plateau(problem):
    task, best, flow = problem
    ratio = np.asarray(saddle.along_flow(flow, task, best).speed_ratio)
    assert np.all(ratio * float(best.speed) <= float(best.upper_bound))
    assert ratio[-1] > ratio[0]


def test_unused_rows_are_nan_and_flows_may_be_batched_by_vmap(problem):
    task, best, flow = problem
    nets = eqx.filter_vmap(lambda scale: sj.scale_layers(sj.MLP(SIZES, key=jax.random.key(1)), scale))(
        jnp.array([1e-1, 1e-2])
    )
    flows = eqx.filter_vmap(lambda net: sj.gradient_flow(net, task, save=sj.Save(weights=True), max_steps=200))(nets)
    along = eqx.filter_vmap(lambda one: saddle.along_flow(one, task, best))(flows)
    alone = saddle.along_flow(flow, task, best)
    rows = len(alone.log_times)
    for name in ("layer_cosines", "speed_ratio", "low_rank_margin"):
        values = np.asarray(getattr(along, name)[1])
        assert np.all(np.isnan(values[rows:]))
        np.testing.assert_allclose(values[rows - 1], getattr(alone, name)[-1], rtol=1e-6)
    with pytest.raises(ValueError, match="flow must be a single one"):
        saddle.along_flow(flows, task, best)


def test_what_does_not_fit_is_refused(problem):
    task, best, flow = problem
    without = eqx.tree_at(lambda f: f.weights, flow, None)
    with pytest.raises(ValueError, match="flow must hold its weights"):
        saddle.along_flow(without, task, best)
    shallower = sj.escape_direction(task, [4, 5, 2], starts=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="direction must have the network's depth"):
        saddle.along_flow(flow, task, shallower)
    with pytest.raises(ValueError, match="task"):
        saddle.along_flow(flow, gaussian(0, inputs=3), best)
