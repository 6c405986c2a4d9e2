"""The order of a saddle, predictions, exponents and escape directions of models that are no perceptrons."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import (
    KEY,
    Arrays,
    Convolutions,
    Residual,
    arrays,
    attention,
    attention_loss,
    diagonal_loss,
    digits,
    parity,
    perceptron,
    squared_relu,
)

import saddlejax as sj

# The order


@pytest.mark.parametrize(
    ("depth", "activation", "order"),
    [(2, "tanh", 4), (3, "tanh", 5), (3, "gelu", 6), (3, "relu", 3), (2, squared_relu, 3), (3, squared_relu, 7)],
)
def test_order_of_perceptrons_on_parity_and_of_squared_relu(depth, activation, order):
    # tanh: the first layer gives x₁x₂x₃ at its third power only. GELU = z/2 + c z² + …: at z², squared again with z.
    task = digits() if activation is squared_relu else parity()
    found = sj.saddle_order(perceptron(depth, activation, task.in_size, task.out_size), task)
    assert float(found.order) == order and float(found.exponent) == order - 2
    assert float(found.residual) < 1e-3
    assert f"r = {order}" in str(found)


def test_order_is_the_number_of_small_layers_where_the_data_have_a_signal():
    net, task = perceptron(4, "tanh", 64, 10), digits()
    for layers in ((3,), (1, 2), (0, 1, 2), (0, 1, 2, 3)):
        assert float(sj.saddle_order(net, task, layers=layers).order) == len(layers)
    chosen = sj.saddle_order(net, task, lambda m: m.weights[1:])
    assert float(chosen.order) == 3 and chosen.small == (1, 2, 3)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu], ids=["tanh", "relu"])
@pytest.mark.parametrize("use_bias", [False, True], ids=["plain", "biases"])
def test_order_of_convolutions(activation, use_bias):
    task = digits()
    found = sj.saddle_order(Convolutions(activation, use_bias), task)
    assert float(found.order) == 3
    # With centred targets a last bias is at its minimum from the start.
    centred = sj.Task(task.x, task.y - jnp.mean(task.y, axis=0))
    assert float(sj.saddle_order(Convolutions(activation, use_bias), centred).order) == 3
    moved = [name for name, one in zip(found.names, found.relaxed, strict=True) if one]
    assert moved == (["head.bias"] if use_bias else [])


def test_order_of_other_models():
    assert float(sj.saddle_order(Residual(), digits()).order) == 2
    with_biases = eqx.nn.MLP(64, 10, 8, 2, jnp.tanh, key=KEY)
    for task in (digits(), sj.Task(digits().x, jnp.argmax(digits().y, axis=1), sj.cross_entropy)):
        found = sj.saddle_order(with_biases, task)
        assert float(found.order) == 3 and "at their minimum: layers[2].bias" in str(found)
    assert float(sj.saddle_order(with_biases, lambda m: digits().mean_loss(jax.vmap(m)(digits().x))).order) == 3
    assert float(sj.saddle_order(arrays(), diagonal_loss).order) == 3
    assert float(sj.saddle_order(attention(), attention_loss).order) == 3
    assert float(sj.saddle_order(attention(), attention_loss, lambda m: [m.k, m.q]).order) == 2


def test_the_signal_is_the_leading_coefficient():
    # f = w₂ w₁ x, squared error on y = 3: −𝓛_0(θ̂) = 3 at unit weights.
    net = sj.MLP.from_weights([[[0.2]], [[0.1]]], "identity")
    found = sj.saddle_order(net, sj.Task(np.ones((1, 1)), 3 * np.ones((1, 1))), layers=(0, 1))
    assert float(found.signal) == pytest.approx(3, rel=1e-9)
    both = sj.saddle_order(Arrays(jnp.array([0.1]), jnp.array([0.3])), lambda m: jnp.sum((m.u**2 * m.v - 1) ** 2) / 2)
    assert float(both.order) == 3 and float(both.signal) == pytest.approx(1, rel=1e-9)


def test_where_no_order_is_found_and_bad_arguments():
    nothing = sj.saddle_order(arrays(), lambda m: jnp.sum(0 * m.u * m.v))
    assert np.isnan(float(nothing.order)) and "none found" in str(nothing)
    model = Convolutions(jnp.tanh)
    for options, words in (
        ({"layers": [0]}, "layers must choose among the layers of a perceptron"),
        ({"where": lambda m: [m.conv1, 3]}, "where must be a function that returns parameter arrays"),
        ({"where": lambda m: [m.conv1], "layers": [0]}, "layers must not be given together with where"),
    ):
        with pytest.raises(ValueError, match=words):
            sj.saddle_order(model, digits(), **options)


def test_order_in_single_precision_and_under_transformations():
    with jax.enable_x64(False):
        task = parity()
        net = perceptron(3, "tanh")
        assert task.x.dtype == jnp.float32
        assert float(sj.saddle_order(net, task).order) == 5
    net, task = perceptron(3, "tanh"), parity()
    alone = sj.saddle_order(net, task, layers=range(3))
    jitted = jax.jit(lambda net: sj.saddle_order(net, task, layers=range(3)))(net)
    assert float(jitted.order) == 5 and float(jitted.signal) == pytest.approx(float(alone.signal), rel=1e-6)


# Predictions


@pytest.mark.parametrize(
    ("model", "followed"),
    [(Convolutions(jnp.tanh), "linear"), (Residual(), "linear")],
    ids=["convolutions", "residual"],
)
def test_predictions_of_models(model, followed):
    task, small = digits(), sj.scale_layers(model, 1e-3)
    prediction = sj.predict_escape(small, task)
    flow = sj.gradient_flow(small, task, save=sj.Save(steps=False, singular_values=False))
    tolerance = 2e-3 if float(prediction.order) > 2 else 0.1
    assert followed in prediction.followed
    assert float(prediction.time / flow.escape_time) == pytest.approx(1, abs=tolerance)
    assert prediction.concerns == []


def test_outputs_that_are_held_back_are_followed_on_the_whole_loss():
    # f = u tanh(v·x) with two layers is of degree two, and the parity has order four: ½ E f² counts as much.
    net = sj.scale_layers(perceptron(2, "tanh"), 1e-3)
    prediction = sj.predict_escape(net, parity())
    assert prediction.followed == "the loss itself" and float(prediction.order) == 4
    flow = sj.gradient_flow(net, parity(), save=sj.Save(steps=False, singular_values=False))
    assert float(prediction.log_time) == pytest.approx(float(flow.log_escape_time), abs=1e-6)


# Directions


def test_direction_of_a_perceptron_given_as_a_model_and_as_any_model():
    task = digits()
    net = sj.MLP([64, 8, 8, 10], "tanh", key=KEY)
    known = sj.escape_direction(task, [64, 8, 8, 10], "tanh", key=KEY)
    as_net = sj.escape_direction(task, net, key=KEY)
    assert float(as_net.speed) == pytest.approx(float(known.speed), rel=1e-12)
    # The same network as a module that the library knows nothing of.
    other = eqx.nn.MLP(64, 10, 8, 2, jnp.tanh, use_bias=False, use_final_bias=False, key=KEY)
    found = sj.escape_direction(task, other, starts=4, key=KEY)
    assert float(found.order) == 3
    assert float(found.speed) == pytest.approx(float(known.speed), rel=1e-6)
    assert float(found.residual) < 1e-4
    for group in found.groups:
        assert float(jnp.linalg.norm(group)) == pytest.approx(1, rel=1e-12)
    assert "order r = 3" in str(found)


def test_directions_in_closed_form():
    # E = u v w on unit spheres of one number: 1. With u in R³ against b: 𝓛 = ½ ‖(u v w − b)‖², −𝓛_0 = ⟨u, b⟩ v w: ‖b‖.
    class Product(eqx.Module):
        u: jax.Array
        v: jax.Array
        w: jax.Array

    b = jnp.array([2.0, -1.0, 2.0])
    model = Product(jnp.ones(3), jnp.ones(1), jnp.ones(1))
    found = sj.escape_direction(lambda m: 0.5 * jnp.sum((m.u * m.v * m.w - b) ** 2), model, starts=3, key=KEY)
    assert float(found.order) == 3 and float(found.speed) == pytest.approx(3, rel=1e-6)
    np.testing.assert_allclose(jnp.abs(found.groups[0]), jnp.abs(b) / 3, atol=1e-4)


def test_direction_of_a_perceptron_on_parity_has_the_order_of_the_data():
    # f = u tanh(v·x) at one neuron: −𝓛_0 = u E[x₁x₂x₃ (−(v·x)³/3)] = −2 u v₁v₂v₃, at most 2/√27 on the unit spheres.
    net = sj.MLP([3, 1, 1], "tanh", key=KEY)
    found = sj.escape_direction(parity(), net, starts=4, key=KEY)
    assert float(found.order) == 4
    assert float(found.speed) == pytest.approx(2 / np.sqrt(27), rel=1e-5)
