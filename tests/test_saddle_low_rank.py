import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saddle_problems import hexagon, hexagon_direction

import saddlejax as sj
from saddlejax import saddle


def test_measures_of_known_singular_values():
    values = np.array([4.0, 2.0, 1.0])
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    w = q @ np.diag(values) @ q.T
    np.testing.assert_allclose(sj.low_rank_margin([w, w]), [2, 2 / 2**0.25], rtol=1e-10)
    np.testing.assert_allclose(saddle.stable_rank([w]), [21 / 16], rtol=1e-10)
    np.testing.assert_allclose(saddle.rank_one_excess([w]), [5 / 21], rtol=1e-10)


def test_single_rows_have_infinite_margin():
    assert np.isinf(sj.low_rank_margin([np.ones((1, 3))])[0])


def test_hexagon_first_layer_has_the_ratio_of_the_closed_form():
    a2, t2 = 2 * np.sqrt(3) - 3, 2 - np.sqrt(3)
    margin = sj.low_rank_margin(hexagon_direction())
    assert np.isclose(margin[0], np.sqrt(2 * t2 / a2), rtol=1e-10)


def test_margins_of_networks_and_under_jit():
    net = sj.MLP([3, 5, 4, 2], key=jax.random.key(0))
    np.testing.assert_allclose(jax.jit(sj.low_rank_margin)(net.weights), sj.low_rank_margin(net), rtol=1e-10)


def test_layers_of_zeros_have_rank_zero():
    zeros, ones = np.zeros((3, 3)), np.ones((3, 3))
    np.testing.assert_allclose(saddle.stable_rank([zeros, ones]), [0, 1], atol=1e-10)
    np.testing.assert_allclose(saddle.rank_one_excess([zeros, ones]), [0, 0], atol=1e-10)
    assert np.isnan(sj.low_rank_margin([zeros, ones])[0])


def test_networks_with_a_layer_of_zeros_have_neither_speed_nor_cosine():
    direction = hexagon_direction()
    net = sj.MLP.from_weights([direction[0], 0 * direction[1], direction[2]], "relu")
    assert saddle.instantaneous_speed(net, hexagon(0)) == 0
    cosines = saddle.layer_cosines(net, direction)
    chex.assert_tree_all_finite(cosines)
    assert cosines[1] == 0


@pytest.mark.parametrize("value", [0, np.nan])
def test_cosines_refuse_directions_that_are_none(value):
    direction = hexagon_direction()
    net = sj.MLP.from_weights(direction, "relu")
    with pytest.raises(ValueError, match=r"direction must (pass a signal|be finite)"):
        saddle.layer_cosines(net, [direction[0], value * direction[1], direction[2]])


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="weights_or_net must be a network"):
        sj.low_rank_margin(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="fit together"):
        sj.low_rank_margin([np.ones((2, 3)), np.ones((2, 3))])


def test_cosines_are_one_for_permuted_and_split_copies():
    direction = hexagon_direction()
    q1 = np.zeros((5, 3))
    q1[0, 1], q1[1, 0], q1[2, 0], q1[3, 2], q1[4, 2] = 1, 0.6, 0.8, 0.28, 0.96
    q2 = np.array([[0.6], [0.8]])
    split = [q1 @ direction[0], q2 @ direction[1] @ q1.T, direction[2] @ q2.T]
    net = sj.MLP.from_weights(split, "relu")
    assert np.isclose(saddle.instantaneous_speed(net, hexagon(0)), np.sqrt(3) / (6 * (2 + np.sqrt(3))), rtol=1e-10)
    np.testing.assert_allclose(saddle.layer_cosines(net, direction), 1, atol=1e-10)


def test_cosines_see_signs_and_small_turns():
    rng = np.random.default_rng(1)
    v, u = rng.normal(size=(1, 6)), rng.normal(size=(2, 1))
    v, u = v / np.linalg.norm(v), u / np.linalg.norm(u)
    q = np.abs(rng.normal(size=(4, 1)))
    q /= np.linalg.norm(q)
    along = saddle.layer_cosines(sj.MLP.from_weights([q @ v, u @ q.T], "relu"), [v, u])
    against = saddle.layer_cosines(sj.MLP.from_weights([-q @ v, u @ q.T], "relu"), [v, u])
    np.testing.assert_allclose(along, 1, atol=1e-10)
    np.testing.assert_allclose(against, 0, atol=1e-10)
    normal = np.linalg.svd(v)[2][1:2]
    turned = np.cos(0.3) * v + np.sin(0.3) * normal
    cosines = saddle.layer_cosines(sj.MLP.from_weights([q @ turned, u @ q.T], "relu"), [v, u])
    np.testing.assert_allclose(cosines, [np.cos(0.3), 1], atol=1e-10)


def test_cosines_refuse_directions_that_do_not_fit():
    with pytest.raises(ValueError, match="direction must have the network's depth"):
        saddle.layer_cosines(sj.MLP([2, 3, 1], key=jax.random.key(0)), hexagon_direction())
