"""The imbalance identity: the rate, from the gradient of the loss, against the right-hand side from pre-activations."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saddlejax as sj
from saddlejax.networks.activations import Activation
from saddlejax.networks.network import AbstractNetwork, Weights
from saddlejax.objective import task_loss

ACTIVATIONS = sorted(set(sj.ACTIVATIONS) - {"linear", "swish"})
CLASS_A = {"identity", "relu", "leaky_relu", "abs"}
CAN_DIE = {"relu", "relu6", "squared_relu"}
RNG = np.random.default_rng(20)
SIZES = {depth: [int(n) for n in RNG.integers(2, 8, depth + 1)] for depth in range(2, 9)}


def bumpy(prediction, target):
    """A loss that is neither convex nor separable."""
    return jnp.sum(jnp.cosh(prediction - target)) + 0.3 * jnp.prod(jnp.tanh(prediction))


LOSSES = {"mse": sj.mse, "cross_entropy": sj.cross_entropy, "bumpy": bumpy}


def problem(activation, depth, loss, seed):
    """A random network of O(1) weights and random data, drawn with NumPy."""
    rng = np.random.default_rng(seed)
    sizes = SIZES[depth]
    weights = [rng.normal(size=s) * np.sqrt(2 / s[1]) for s in zip(sizes[1:], sizes[:-1], strict=True)]
    x = rng.normal(size=(13, sizes[0]))
    if activation in CAN_DIE:
        weights = keep_alive(weights, x, sj.ACTIVATIONS[activation])
    net = sj.MLP.from_weights(weights, activation)
    y = rng.integers(0, sizes[-1], 13) if loss == "cross_entropy" else rng.normal(size=(13, sizes[-1]))
    return net, sj.Task(x, y, LOSSES[loss], out_size=sizes[-1])


def keep_alive(weights, x, activation):
    """Weights whose pre-activations have mean square one and are often positive, so that some signal gets through."""
    h, scaled = x, []
    for w in weights:
        z = h @ w.T
        w = w * np.where(z.sum(axis=0) > 0, 1, -1)[:, None] / np.sqrt(np.mean(z**2))
        scaled.append(w)
        h = np.asarray(activation(jnp.asarray(h @ w.T)))
    return scaled


def loss_gradient(net, task):
    """`∂𝓛/∂W_l` by plain automatic differentiation of the loss."""
    return jax.grad(lambda weights: task_loss(net.with_weights(weights), task))(net.weights)


def identity(net, task):
    """`2 E[(W_{l+1}ᵀ δ_{l+1})_j φ(z_l)_j]` of every hidden neuron, `φ(z) = z σ'(z) − σ(z)`.

    The mean of `W_{l+1}ᵀ δ_{l+1}` is the derivative of the loss by the signals `h_l`, found by shifting them.
    """
    first, *matrices = net.matrices()

    def shifted_loss(shifts):
        zs, z = [], jnp.matmul(task.x, first.T, precision="highest")
        for matrix, shift in zip(matrices, shifts, strict=True):
            zs.append(z)
            z = jnp.matmul(net.activation(z) + shift, matrix.T, precision="highest")
        return task.mean_loss(z), zs

    none = tuple(jnp.zeros((task.samples, size), task.x.dtype) for size in net.sizes[1:-1])
    signals, zs = jax.grad(shifted_loss, has_aux=True)(none)

    def phi(z):
        value, slope_times_z = jax.jvp(net.activation, (z,), (z,))
        return slope_times_z - value

    return [2 * jnp.sum(signal * phi(z), axis=0) for signal, z in zip(signals, zs, strict=True)]


def both_sides(net, task):
    """The right-hand side of the identity, the rate, and the scale `2‖W_l‖‖∂_l𝓛‖ + 2‖W_{l+1}‖‖∂_{l+1}𝓛‖`.

    The scale bounds, by Cauchy–Schwarz, the two terms whose difference the rate is.
    """
    slopes = loss_gradient(net, task)
    norm = jnp.linalg.norm
    bounds = jnp.stack([2 * norm(w) * norm(d) for w, d in zip(net.weights, slopes, strict=True)])
    expected = jnp.stack([jnp.sum(neurons) for neurons in identity(net, task)])
    return expected, sj.imbalance_rate(net, task), bounds[:-1] + bounds[1:]


def single(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@pytest.mark.parametrize("depth", SIZES)
def test_both_sides_agree_for_every_activation_and_loss(depth):
    pairs = list(itertools.product(range(len(ACTIVATIONS)), range(len(LOSSES))))
    nets, tasks = zip(
        *(problem(ACTIVATIONS[a], depth, "mse", depth + 7 * k) for k, (a, _) in enumerate(pairs)), strict=True
    )
    functions = [sj.ACTIVATIONS[name] for name in ACTIVATIONS]
    weights, x, y = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *((n.weights, t.x, t.y) for n, t in zip(nets, tasks, strict=True))
    )

    def of_pair(arguments):
        # One compilation for all activations and losses: which of them is meant is a number.
        weights, x, y, pair = arguments

        def activation(z):
            return jax.lax.switch(pair[0], functions, z)

        def loss(prediction, target):
            classes = jax.nn.softmax(target)
            costs = [functools.partial(c, target=classes if c is sj.cross_entropy else target) for c in LOSSES.values()]
            return jax.lax.switch(pair[1], costs, prediction)

        net, task = sj.MLP.from_weights(weights, activation), sj.Task(x, y, loss)
        return both_sides(net, task), both_sides(single(net), single(task))

    fast_compilation = {"xla_backend_optimization_level": 0}
    batch = (weights, x, y, jnp.asarray(pairs))
    double, short = jax.jit(lambda batch: jax.lax.map(of_pair, batch), compiler_options=fast_compilation)(batch)
    for (left, right, scale), dtype, tolerance in ((double, jnp.float64, 1e-10), (short, jnp.float32, 1e-4)):
        assert right.dtype == dtype
        assert right.shape == (len(pairs), depth - 1)
        assert np.all(np.abs(left - right) <= tolerance * scale)
    # The identity must not hold for want of anything to compare.
    for (a, _), drift in zip(pairs, np.max(np.abs(double[1]) / double[2], axis=1), strict=True):
        name = ACTIVATIONS[a]
        assert drift < 1e-10 if name in CLASS_A else drift > 1e-6 or name == "relu6", (name, drift)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "softplus"])
def test_identity_holds_for_every_neuron(activation):
    net, task = problem(activation, 4, "mse", 1)
    rates = sj.imbalance_rate(net, task, per_neuron=True)
    assert [r.shape for r in rates] == [(n,) for n in net.sizes[1:-1]]
    for rate, expected in zip(rates, identity(net, task), strict=True):
        np.testing.assert_allclose(rate, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose([r.sum() for r in rates], sj.imbalance_rate(net, task), rtol=1e-10)


def test_rate_is_the_derivative_of_the_imbalance():
    net, task = problem("mish", 3, "cross_entropy", 2)
    velocity = tuple(-slope for slope in loss_gradient(net, task))
    moving = jax.jvp(lambda weights: sj.imbalance(net.with_weights(weights)), (net.weights,), (velocity,))
    np.testing.assert_allclose(moving[1], sj.imbalance_rate(net, task), rtol=1e-10)


def test_imbalance_is_the_difference_of_squared_norms():
    net, _ = problem("relu", 5, "mse", 3)
    norms = [np.linalg.norm(w) ** 2 for w in net.weights]
    np.testing.assert_allclose(sj.imbalance(net), np.diff(norms), rtol=1e-10)
    neurons = sj.imbalance(net, per_neuron=True)
    np.testing.assert_allclose([n.sum() for n in neurons], sj.imbalance(net), rtol=1e-10)
    for matrix, neuron in zip(sj.imbalance_matrices(net), neurons, strict=True):
        np.testing.assert_allclose(np.diag(matrix), neuron, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("activation", "conserved"), [("identity", True), ("relu", False)])
def test_linear_networks_conserve_whole_matrices(activation, conserved):
    net, task = problem(activation, 4, "bumpy", 4)
    velocity = tuple(-slope for slope in loss_gradient(net, task))
    _, rates = jax.jvp(lambda weights: sj.imbalance_matrices(net.with_weights(weights)), (net.weights,), (velocity,))
    size = max(float(jnp.linalg.norm(v)) for v in velocity)
    assert (max(float(jnp.max(jnp.abs(rate))) for rate in rates) < 1e-10 * size) == conserved


class Rescaled(AbstractNetwork):
    """A network whose matrices are its weights times fixed numbers, entry by entry as in a reduced network."""

    weights: Weights
    factors: Weights
    activation: Activation = eqx.field(static=True)

    def matrices(self):
        return tuple(f * w for f, w in zip(self.factors, self.weights, strict=True))


def test_identity_holds_for_the_parameters_of_a_reduced_network():
    net, task = problem("gelu", 3, "mse", 5)
    rng = np.random.default_rng(6)
    factors = tuple(jnp.asarray(rng.uniform(0.5, 2, w.shape)) for w in net.weights)
    left, right, scale = both_sides(Rescaled(net.weights, factors, net.activation), task)
    np.testing.assert_array_less(np.abs(left - right) / scale, 1e-10)


def test_batches_equal_loops():
    net, task = problem("silu", 3, "mse", 7)
    scales = jnp.array([1.0, 0.5, 0.1])
    batch = jax.vmap(lambda scale: sj.scale_layers(net, scale))(scales)
    lanes = [jax.tree.map(lambda a, i=i: a[i], batch) for i in range(3)]
    rates = jax.jit(jax.vmap(sj.imbalance_rate, in_axes=(0, None)))(batch, task)
    np.testing.assert_allclose(rates, jnp.stack([sj.imbalance_rate(lane, task) for lane in lanes]), rtol=1e-10)
    np.testing.assert_allclose(jax.vmap(sj.imbalance)(batch), jnp.stack([sj.imbalance(lane) for lane in lanes]))
    assert rates.shape == (3, 2)


def test_rate_can_be_differentiated():
    net, task = problem("tanh", 3, "mse", 8)

    def total(scale):
        return jnp.sum(sj.imbalance_rate(net.with_weights([scale * w for w in net.weights]), task))

    step = 1e-5
    central = (total(1 + step) - total(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(1.0), central, rtol=1e-8)


def test_one_layer_has_no_imbalance():
    net = sj.MLP.from_weights([np.ones((2, 3))])
    task = sj.Task(np.ones((4, 3)), np.ones((4, 2)))
    assert sj.imbalance(net).shape == sj.imbalance_rate(net, task).shape == (0,)
    assert sj.imbalance_rate(net, task, per_neuron=True) == sj.imbalance_matrices(net) == []


def test_a_network_that_does_not_fit_is_refused():
    net, _ = problem("tanh", 3, "mse", 9)
    with pytest.raises(ValueError, match="net must take 99 inputs"):
        sj.imbalance_rate(net, sj.Task(np.ones((4, 99)), np.ones((4, 2))))
