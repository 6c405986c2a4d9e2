"""Networks, initialisation, scales, activations and losses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import saddlejax as sj
from saddlejax._numerics import safe_norm
from saddlejax.networks.network import preactivations

KEY = jax.random.key(3)


def test_weights_are_he_normal_and_outputs_are_plain_matrix_products():
    net = sj.MLP([64, 200, 100, 10], "tanh", key=KEY)
    assert [w.shape for w in net.weights] == [(200, 64), (100, 200), (10, 100)]
    for w in net.weights[:2]:
        assert float(jnp.std(w)) == pytest.approx(np.sqrt(2 / w.shape[1]), rel=0.03)
    keys = jax.random.split(KEY, 3)
    for k, w in zip(keys, net.weights, strict=True):
        np.testing.assert_allclose(w, jnp.sqrt(2 / w.shape[1]) * jax.random.normal(k, w.shape), rtol=1e-10)
    x = jax.random.normal(KEY, (64,))
    expected = net.weights[2] @ jnp.tanh(net.weights[1] @ jnp.tanh(net.weights[0] @ x))
    np.testing.assert_allclose(net(x), expected, rtol=1e-10)
    batch = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(preactivations(net, batch)[-1][1], net(2 * x), rtol=1e-10)


def test_a_network_of_one_layer_is_a_matrix():
    net = sj.MLP([3, 2], "relu", key=KEY)
    x = jnp.arange(3.0)
    np.testing.assert_allclose(net(x), net.weights[0] @ x)
    flow = sj.gradient_flow(net, sj.Task(jnp.eye(3), jnp.ones((3, 2))), sj.Loss(0.01))
    assert flow.status == sj.Status.loss_reached


def test_scale_layers_scales_the_chosen_layers_only():
    net = sj.MLP([4, 5, 6, 2], key=KEY)
    scaled = sj.scale_layers(net, 1e-3, layers=(0, -1))
    ratios = [float(b[0, 0] / a[0, 0]) for a, b in zip(net.weights, scaled.weights, strict=True)]
    np.testing.assert_allclose(ratios, [1e-3, 1, 1e-3])
    each = sj.scale_layers(net, jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(
        [float(b[0, 0] / a[0, 0]) for a, b in zip(net.weights, each.weights, strict=True)], [1, 2, 3]
    )
    for layers, factors in (((2, 0), [0.5, 1, 0.1]), ((-1, 1), [1, 0.5, 0.1]), (np.array([1, 0]), [0.5, 0.1, 1])):
        paired = sj.scale_layers(net, [0.1, 0.5], layers=layers)
        ratios = [float(b[0, 0] / a[0, 0]) for a, b in zip(net.weights, paired.weights, strict=True)]
        np.testing.assert_allclose(ratios, factors)
    batched = jax.vmap(lambda e: sj.scale_layers(net, e).weights[0])(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(batched[1], 2 * net.weights[0])


class Residual(sj.MLP):
    """Adds its input."""

    def __call__(self, x):
        return x + super().__call__(x)


class Gated(eqx.Module):
    """A model with two arrays to scale, of which one is nested, whole numbers, a Python number and a function."""

    gain: jax.Array
    inner: dict
    count: jax.Array
    fixed: float
    activation: Callable


NET = sj.MLP([3, 4, 1], key=KEY)
OTHER = eqx.nn.MLP(3, 1, 4, 2, key=KEY)
RESIDUAL = Residual.from_weights(sj.MLP([3, 3, 3], key=KEY).weights)


def ratios(model, scaled):
    arrays = (jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)) for tree in (model, scaled))
    return [float(jnp.ravel(b)[0] / jnp.ravel(a)[0]) for a, b in zip(*arrays, strict=True)]


def test_scale_layers_scales_any_model():
    gated = Gated(jnp.ones(2), {"w": jnp.full((2, 2), 3.0)}, jnp.arange(3), 2.0, jnp.tanh)
    scaled = sj.scale_layers(gated, 0.1)
    np.testing.assert_allclose(ratios(gated, scaled), [0.1, 0.1])
    for name in ("count", "fixed", "activation"):
        assert getattr(scaled, name) is getattr(gated, name)
    # In the order in which they are picked, with subtrees and with a scale for each array.
    picked = sj.scale_layers(gated, [0.5, 0.1], where=lambda m: [m.inner["w"], m.gain])
    np.testing.assert_allclose(ratios(gated, picked), [0.1, 0.5])
    one = sj.scale_layers(OTHER, 0.1, where=lambda m: m.layers[1])
    np.testing.assert_allclose(ratios(OTHER, one), [1, 1, 0.1, 0.1, 1, 1])
    np.testing.assert_allclose(ratios(OTHER, sj.scale_layers(OTHER, 0.1)), 6 * [0.1])
    np.testing.assert_allclose(ratios(RESIDUAL, sj.scale_layers(RESIDUAL, 0.1)), 2 * [0.1])
    # Arrays that share their memory are arrays of their own.
    twice = Gated(gated.gain, {"w": gated.gain}, gated.count, gated.fixed, jnp.tanh)
    np.testing.assert_allclose(ratios(twice, sj.scale_layers(twice, 0.1, where=lambda m: m.gain)), [0.1, 1])
    batched = jax.vmap(lambda e: sj.scale_layers(OTHER, e, where=lambda m: m.layers[0].weight).layers[0].weight)
    np.testing.assert_allclose(batched(jnp.array([1.0, 2.0]))[1], 2 * OTHER.layers[0].weight)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sj.MLP([3], key=KEY), "sizes must hold at least two sizes"),
        (lambda: sj.MLP([3, 0, 1], key=KEY), r"sizes\[1\] must be a whole number"),
        (lambda: sj.MLP(3, key=KEY), "sizes must be a list"),
        (lambda: sj.MLP([3, 2, 1], "rello", key=KEY), "activation must be one of"),
        (lambda: sj.MLP([3, 2, 1], 5, key=KEY), "activation must be a name"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), 0.0), "scale must be positive"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), -1.0), "scale must be positive"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), 0.1, layers=2), "layers must hold indices"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), 0.1, layers=True), "layers must hold indices.*was True"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), 0.1, layers=[True]), "layers must hold indices"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), 0.1, layers=1.0), "layers must hold indices"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), True), "scale must be a positive number"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), ["0.1", "1"]), "scale must be a positive number"),
        (lambda: sj.MLP([3, 2, 1], key=KEY, dtype="float16"), "dtype must be in single or double precision.*float16"),
        (lambda: sj.MLP([3, 2, 1], key=KEY, dtype=jnp.bfloat16), "dtype must be .*float32 or float64"),
        (lambda: sj.MLP([3, 2, 1], key=KEY, dtype=int), "dtype must be in single or double precision"),
        (lambda: sj.MLP.from_weights([np.ones((1, 2), np.float16)]), r"weights\[0\] must be in single or double"),
        (lambda: sj.MLP.from_weights([np.ones((1, 2), complex)]), r"weights\[0\] must be in single or double"),
        (lambda: sj.MLP.from_weights(None), "weights must be a sequence of matrices"),
        (lambda: sj.low_rank_margin([jnp.ones((2, 2), jnp.bfloat16)]), r"weights_or_net\[0\] must be in single"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), 0.1, layers=(1, -1)), "layers must name each layer once"),
        (lambda: sj.scale_layers(sj.MLP([3, 2, 1], key=KEY), [0.1, 0.2, 0.3]), "scale must be a number or 2 numbers"),
        (lambda: sj.scale_layers(OTHER, 0.1, layers=0), "layers must choose among .* given for a MLP.*where=lambda m"),
        (lambda: sj.scale_layers(RESIDUAL, 0.1, layers=0), "layers must choose among .* given for a Residual"),
        (lambda: sj.scale_layers(NET, 0.1, layers=0, where=lambda m: m.weights), "layers must not be given together"),
        (
            lambda: sj.scale_layers(OTHER, 0.1, where=lambda m: m.weights),
            r"where must be a function .* failed .AttributeError",
        ),
        (lambda: sj.scale_layers(OTHER, 0.1, where=lambda m: m.depth), "where must be a function .* returns int"),
        (
            lambda: sj.scale_layers(OTHER, 0.1, where=lambda m: m.activation),
            "where must be a function that returns parameter arrays",
        ),
        (lambda: sj.scale_layers(OTHER, 0.1, where=lambda m: []), "where must be a function .* returns none"),
        (
            lambda: sj.scale_layers(OTHER, 0.1, where=lambda m: [m.layers[0].bias] * 2),
            "where must return each array once",
        ),
        (
            lambda: sj.scale_layers(OTHER, [0.1, 0.2], where=lambda m: m.layers[0].bias),
            "numbers, one for each chosen a",
        ),
        (lambda: sj.scale_layers(OTHER, 1e-320), "scale must be at least"),
        (lambda: sj.scale_layers(3.0, 0.1), "model must have at least one floating-point array"),
        (lambda: sj.MLP.from_weights([jnp.ones((2, 3)), jnp.ones((1, 3))]), "weights must fit together"),
        (lambda: sj.MLP.from_weights([jnp.ones(3)]), r"weights\[0\] must be a matrix"),
        (lambda: sj.MLP.from_weights([]), "weights must hold at least one matrix"),
    ],
)
def test_bad_networks_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.fixture(scope="module")
def activation_values():
    """As users get them: the tests' own settings of XLA cost the last digits of tanh."""
    script = (
        "import json, jax; jax.config.update('jax_enable_x64', True); import jax.numpy as jnp, saddlejax as sj\n"
        "z = jnp.linspace(-7, 7, 29)\n"
        "print(json.dumps({name: function(z).tolist() for name, function in sj.ACTIVATIONS.items()}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("identity", lambda z: z),
        ("relu", lambda z: np.maximum(z, 0)),
        ("leaky_relu", lambda z: np.where(z > 0, z, 0.01 * z)),
        ("abs", np.abs),
        ("tanh", np.tanh),
        ("erf", special.erf),
        ("sin", np.sin),
        ("arctan", np.arctan),
        ("gelu", lambda z: z * special.ndtr(z)),
        ("gelu_tanh", lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))),
        ("silu", lambda z: z * special.expit(z)),
        ("mish", lambda z: z * np.tanh(np.log1p(np.exp(z)))),
        ("elu", lambda z: np.where(z > 0, z, np.expm1(z))),
        ("celu", lambda z: np.where(z > 0, z, 2 * np.expm1(z / 2))),
        ("selu", lambda z: 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * np.expm1(z))),
        ("softsign", lambda z: z / (1 + np.abs(z))),
        ("softplus", lambda z: np.log1p(np.exp(z))),
        ("sigmoid", special.expit),
        ("squared_relu", lambda z: np.maximum(z, 0) ** 2),
        ("hard_tanh", lambda z: np.clip(z, -1, 1)),
        ("relu6", lambda z: np.clip(z, 0, 6)),
        ("cos", np.cos),
    ],
)
def test_activations_are_what_their_names_say(name, formula, activation_values):
    z = np.linspace(-7, 7, 29)
    np.testing.assert_allclose(activation_values[name], formula(z), rtol=1e-10, atol=1e-10)


def test_every_name_has_been_checked_above():
    (mark,) = test_activations_are_what_their_names_say.pytestmark
    checked = {name for name, _ in mark.args[1]}
    assert set(sj.ACTIVATIONS) - checked == {"linear", "swish"}


def test_losses_agree_with_their_formulas():
    f = jnp.array([0.3, -1.0, 2.0])
    assert float(sj.mse(f, jnp.zeros(3))) == pytest.approx(0.5 * (0.09 + 1 + 4))
    expected = float(jnp.log(jnp.sum(jnp.exp(f))) - 2.0)
    assert float(sj.cross_entropy(f, jnp.asarray(2))) == pytest.approx(expected)
    assert float(sj.cross_entropy(f, jnp.array([0.0, 0.0, 1.0]))) == pytest.approx(expected)
    assert jnp.isfinite(sj.cross_entropy(1e4 * f, jnp.asarray(1)))


def test_safe_norm_survives_where_squares_do_not():
    for size in (1e-300, 1e-30, 1.0, 1e200):
        v = size * jnp.array([3.0, 4.0])
        assert float(safe_norm(v) / size) == pytest.approx(5.0)
        np.testing.assert_allclose(jax.grad(safe_norm)(v), [0.6, 0.8], rtol=1e-10)
    assert float(safe_norm(jnp.zeros(2))) == 0
    np.testing.assert_array_equal(jax.grad(safe_norm)(jnp.zeros(2)), [0, 0])  # zero by definition, not by rounding
    assert jnp.isnan(safe_norm(jnp.array([jnp.nan, 1.0])))


def test_scales_that_would_make_the_weights_zero_are_refused():
    net = sj.MLP([3, 4, 1], "tanh", key=jax.random.key(0), dtype="float32")
    for scale in (1e-38, 1e-50, [1e-3, 1e-40]):
        with pytest.raises(ValueError, match=r"scale must be at least 1\.2e-38"):
            sj.scale_layers(net, scale, layers=None if isinstance(scale, float) else (0, 1))
    task = sj.Task(jnp.ones((4, 3), "float32"), jnp.ones((4, 1), "float32"))
    assert sj.gradient_flow(sj.scale_layers(net, 2e-38), task).status == sj.Status.underflow
