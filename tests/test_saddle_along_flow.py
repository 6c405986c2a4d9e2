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
    """A network of tanh, whose direction has a closed form."""
    task = gaussian(0)
    best = sj.escape_direction(task, SIZES, "tanh", key=jax.random.key(0))
    net = sj.scale_layers(sj.MLP(SIZES, "tanh", key=jax.random.key(1)), 1e-3)
    return task, best, sj.gradient_flow(net, task, save=sj.Save(weights=True))


def test_rows_are_the_measures_of_the_saved_weights(problem):
    task, best, flow = problem
    along = saddle.along_flow(flow, task, best)
    rows = len(flow.losses)
    assert along.layer_cosines.shape == along.low_rank_margin.shape == (rows, 3)
    np.testing.assert_array_equal(along.log_times, flow.log_times)  # handed on as they are
    for row in (0, rows // 2, rows - 1):
        ws = [np.asarray(w[row]) for w in flow.weights]
        values = [np.linalg.svd(w)[1] for w in ws]
        margins = [v[0] / v[1] / layer**0.25 for layer, v in enumerate(values, start=1)]
        np.testing.assert_allclose(along.low_rank_margin[row], margins, rtol=1e-6)
        first, second, third = (w / np.linalg.norm(w) for w in ws)
        pull = np.asarray(task.y).T @ np.asarray(task.x) / len(task.x)
        speed = np.sum(pull * (third @ second @ first))
        np.testing.assert_allclose(along.speed_ratio[row], speed / best.speed, rtol=1e-9, atol=1e-10)
        cosines = saddle.layer_cosines(flow.net.with_weights(ws), best.weights)
        np.testing.assert_allclose(along.layer_cosines[row], cosines, rtol=1e-9, atol=1e-10)


def test_a_linear_network_turns_to_the_best_direction_and_loses_rank(problem):
    task, best, flow = problem
    along = saddle.along_flow(flow, task, best)
    assert np.all(along.speed_ratio <= 1 + 1e-10) and along.speed_ratio[0] < 0.5 < 0.95 < along.speed_ratio[-1]
    assert np.all(along.layer_cosines[-1] > 0.9)
    assert np.all(along.low_rank_margin[-1] > 10) and np.all(along.low_rank_margin[0] < 10)


def test_unused_rows_are_nan_and_batches_need_vmap(problem):
    task, best, flow = problem
    rows = len(flow.losses)
    series = lambda f: (f.log_times, f.losses, f.weights)  # noqa: E731
    room = jax.tree.map(lambda a: jnp.concatenate([a, jnp.full_like(a[:3], jnp.nan)]), series(flow))
    batch = jax.tree.map(lambda a: jnp.stack([a, a]), eqx.tree_at(series, flow, room))
    along = eqx.filter_vmap(lambda one: saddle.along_flow(one, task, best))(batch)
    alone = saddle.along_flow(flow, task, best)
    for name in ("layer_cosines", "speed_ratio", "low_rank_margin"):
        values = np.asarray(getattr(along, name)[1])
        assert np.all(np.isnan(values[rows:]))
        np.testing.assert_allclose(values[:rows], getattr(alone, name), rtol=1e-6, atol=1e-10)
    with pytest.raises(ValueError, match="flow must be a single one"):
        saddle.along_flow(batch, task, best)


def test_what_does_not_fit_is_refused(problem):
    task, best, flow = problem
    silent = eqx.tree_at(lambda b: b.speed, best, jnp.zeros(()))
    with pytest.raises(ValueError, match="best must be a direction of positive speed"):
        saddle.along_flow(flow, task, silent)
    without = eqx.tree_at(lambda f: f.weights, flow, None)
    with pytest.raises(ValueError, match="flow must hold its weights"):
        saddle.along_flow(without, task, best)
    shallower = sj.escape_direction(task, [4, 5, 2], "tanh", key=jax.random.key(0))
    with pytest.raises(ValueError, match="direction must have the network's depth"):
        saddle.along_flow(flow, task, shallower)
    with pytest.raises(ValueError, match="net must take 3 inputs"):
        saddle.along_flow(flow, gaussian(0, inputs=3), best)
