import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saddle_problems import gaussian

import saddlejax as sj
from saddlejax import saddle
from saddlejax.saddle.origin import Origin, energy


@pytest.mark.parametrize(
    ("name", "minus", "plus"),
    [
        ("identity", 1, 1),
        ("relu", 0, 1),
        ("leaky_relu", 0.01, 1),
        ("abs", -1, 1),
        ("tanh", 1, 1),
        ("erf", 2 / np.sqrt(np.pi), 2 / np.sqrt(np.pi)),
        ("gelu", 0.5, 0.5),
        ("silu", 0.5, 0.5),
        ("mish", 0.6, 0.6),
        ("softsign", 1, 1),
        ("elu", 1, 1),
        ("relu6", 0, 1),
        ("hard_tanh", 1, 1),
        ("selu", 1.0507009873554805 * 1.6732632423543772, 1.0507009873554805),
    ],
)
def test_tangent_slopes(name, minus, plus):
    assert np.allclose(saddle.tangent(name), (minus, plus), rtol=1e-9)


@pytest.mark.parametrize(
    ("activation", "words"),
    [
        ("sigmoid", "σ(0) = 0.5"),
        ("softplus", "σ(0)"),
        ("cos", "σ(0) = 1"),
        ("squared_relu", "slopes vanish"),
        (lambda z: jnp.sqrt(jnp.abs(z)), "which has none"),
        (lambda z: z**3, "slopes vanish"),
    ],
)
def test_activations_without_a_saddle_of_this_kind_are_refused(activation, words):
    with pytest.raises(ValueError, match="activation must") as error:
        saddle.tangent(activation)
    assert words in str(error.value)


@pytest.mark.parametrize("loss", [sj.mse, sj.cross_entropy, lambda p, t: jnp.sum(jnp.log(jnp.cosh(p - t)))])
def test_leading_order_loss_is_what_is_left_of_the_loss_at_small_weights(loss):
    task = gaussian(0)
    if loss is sj.cross_entropy:
        task = sj.Task(task.x, jnp.arange(task.samples) % 3, loss)
    task = sj.Task(task.x, task.y, loss)
    net = sj.MLP([task.in_size, 7, 6, task.out_size], "tanh", key=jax.random.key(1))
    scale = 1e-3
    small = sj.scale_layers(net, scale)
    exact = task.mean_loss(jax.vmap(small)(task.x)) - task.mean_loss(jnp.zeros((task.samples, task.out_size)))
    leading = scale**3 * saddle.leading_order_loss(net, task)
    assert abs(exact - leading) < 1e-4 * abs(leading)


def test_energy_is_minus_the_leading_order_loss_for_homogeneous_activations():
    task = gaussian(1)
    net = sj.MLP([4, 9, 8, 2], "relu", key=jax.random.key(2))
    overlap = np.mean(np.sum(np.asarray(task.y) * np.asarray(jax.vmap(net)(task.x)), axis=1))
    assert np.isclose(sj.signal_energy(net, task), overlap, rtol=1e-10)
    assert np.isclose(sj.signal_energy(net, task), -saddle.leading_order_loss(net, task), rtol=1e-10)


def test_instantaneous_speed_is_the_speed_of_growth_of_the_layers():
    task = gaussian(2)
    net = sj.MLP([4, 9, 8, 2], "relu", key=jax.random.key(3))
    unit = net.with_weights([w / jnp.linalg.norm(w) for w in net.weights])
    slope = jax.grad(lambda w: saddle.leading_order_loss(unit.with_weights(w), task))(unit.weights)
    growth = [-jnp.sum(g * w) for g, w in zip(slope, unit.weights, strict=True)]
    assert np.allclose(growth, saddle.instantaneous_speed(net, task), rtol=1e-10)


def test_chunks_of_samples_change_nothing(monkeypatch):
    task = gaussian(3, samples=37)
    origin = Origin(task, saddle.tangent("relu"))
    weights = sj.MLP([4, 6, 5, 2], "relu", key=jax.random.key(4)).weights
    whole = jax.value_and_grad(energy)(weights, origin)
    monkeypatch.setattr("saddlejax.saddle.origin._CHUNK_ENTRIES", 60)
    parts = jax.value_and_grad(energy)(weights, origin)
    text = str(jax.make_jaxpr(energy)(weights, origin))
    assert "scan" in text
    chex.assert_trees_all_close(whole, parts, rtol=1e-10, atol=1e-10)


def test_sample_weights_act_as_repeated_samples():
    task = gaussian(4, samples=3)
    weighted = sj.Task(task.x, task.y, sample_weights=[0.5, 0.25, 0.25])
    repeated = sj.Task(task.x[jnp.array([0, 0, 1, 2])], task.y[jnp.array([0, 0, 1, 2])])
    np.testing.assert_allclose(saddle.origin_matrix(weighted), saddle.origin_matrix(repeated), rtol=1e-10)


def test_nets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="net must take 4 inputs to 2 outputs"):
        sj.signal_energy(sj.MLP([3, 2], key=jax.random.key(0)), gaussian(0))
