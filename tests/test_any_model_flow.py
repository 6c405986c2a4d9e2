"""Gradient flows of models that are no perceptrons of this package, of losses of their own, and the checks of their input."""

from collections.abc import Callable

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
from problems import HALF, SMALL, network, teacher

import saddlejax as sj

TASK = teacher(50)
MODEL = eqx.nn.MLP(10, 1, 8, 2, jnp.tanh, key=KEY)
"""With biases; the same shapes in most of the tests."""
PLAIN = eqx.nn.MLP(10, 1, 8, 2, jnp.tanh, use_bias=False, use_final_bias=False, key=KEY)


def scaled(model, scale):
    return jax.tree.map(lambda a: scale * a if eqx.is_inexact_array(a) else a, model)


def slope(model, task, large: float, small: float, until=None) -> tuple[float, list[sj.Flow]]:
    """`−d log τ/d log ε` between two init scales, and the flows."""
    flows = [sj.gradient_flow(scaled(model, scale), task, until, save=SMALL) for scale in (large, small)]
    assert all(bool(flow.status == sj.Status.escaped) for flow in flows)
    times = [float(flow.log_escape_time) for flow in flows]
    return (times[1] - times[0]) / np.log(large / small), flows


# The exponent is r − 2, whatever the model


@pytest.mark.parametrize(
    ("model", "task", "exponent"),
    [
        pytest.param(perceptron(2, "tanh"), parity(), 2, id="tanh, L = 2, parity"),
        pytest.param(perceptron(3, "tanh"), parity(), 3, id="tanh, L = 3, parity"),
        pytest.param(perceptron(3, "gelu"), parity(), 4, id="GELU, L = 3, parity"),
        pytest.param(perceptron(3, "relu"), parity(), 1, id="ReLU, L = 3, parity"),
        pytest.param(perceptron(2, squared_relu, 64, 10), digits(), 1, id="squared ReLU, L = 2"),
        pytest.param(perceptron(3, squared_relu, 64, 10), digits(), 5, id="squared ReLU, L = 3"),
        pytest.param(Convolutions(jnp.tanh), digits(), 1, id="CNN, tanh"),
        pytest.param(Convolutions(jax.nn.relu), digits(), 1, id="CNN, ReLU", marks=pytest.mark.slow),
        pytest.param(attention(), attention_loss, 1, id="linear attention"),
        pytest.param(arrays(), diagonal_loss, 1, id="diagonal, cubic"),
    ],
)
def test_the_escape_time_grows_with_the_order_of_the_saddle(model, task, exponent):
    found, flows = slope(model, task, 1e-3, 3e-4)
    assert found == pytest.approx(exponent, abs=0.01)
    assert all(int(flow.stats["steps"]) <= 150 for flow in flows)


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (perceptron(3, "tanh"), parity()),
        (perceptron(3, squared_relu, 64, 10), digits()),
        (Convolutions(jnp.tanh), digits()),
        (attention(), attention_loss),
        (arrays(), diagonal_loss),
    ],
    ids=["tanh, parity", "squared ReLU", "CNN", "linear attention", "diagonal"],
)
def test_the_escape_time_at_the_default_tolerance_is_within_a_thousandth(model, task):
    default, tight = (sj.gradient_flow(scaled(model, 1e-3), task, rtol=rtol, save=SMALL) for rtol in (None, 1e-8))
    assert float(default.log_escape_time) == pytest.approx(float(tight.log_escape_time), abs=1e-3)


def test_a_residual_network_escapes_in_logarithmic_time():
    found, _ = slope(Residual(), digits(), 1e-3, 1e-4)
    assert 0 < found < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [Convolutions(jnp.tanh, use_bias=True), eqx.nn.MLP(64, 10, 24, 2, jnp.tanh, key=jax.random.key(1))],
    ids=["CNN", "MLP"],
)
def test_biases_that_relax_neither_change_the_exponent_nor_cost_much(model):
    found, flows = slope(model, digits(300), 1e-3, 1e-4)
    assert found == pytest.approx(1, abs=0.01)
    for flow in flows:
        work = int(flow.stats["gradient_evaluations"]) + 1.8 * int(flow.stats["hessian_vector_products"])
        assert work <= 4000
        assert "exponential" in flow.method


# Against other computations


def test_a_group_of_one_number_passes_through_zero_in_closed_form():
    # 𝓛 = ½(b − 1)² + ½·4 Σ(w − 2)²: b = 1 − 2e^{−t} changes its sign at log 2, w = 2 − 1.9 e^{−4t}.
    model = Arrays(jnp.array([-1.0]), jnp.array([0.1, 0.1]))
    times = jnp.array([0.3, 0.69, 0.7, 2.0])
    flow = sj.gradient_flow(
        model,
        lambda m: 0.5 * jnp.sum((m.u - 1) ** 2) + 2 * jnp.sum((m.v - 2) ** 2),
        sj.Time(2.5),
        rtol=1e-7,
        save=sj.Save(times=times, weights=True),
    )
    np.testing.assert_allclose(flow.weights[0][:, 0], 1 - 2 * jnp.exp(-times), atol=1e-6)
    np.testing.assert_allclose(flow.weights[1][:, 0], 2 - 1.9 * jnp.exp(-4 * times), rtol=1e-6)
    assert int(flow.stats["steps"]) < 300


def test_a_perceptron_in_another_guise_takes_the_same_steps():
    net = sj.MLP.from_weights([layer.weight for layer in scaled(PLAIN, 1e-2).layers], "tanh")
    flow, known = sj.gradient_flow(scaled(PLAIN, 1e-2), TASK), sj.gradient_flow(net, TASK)
    assert float(flow.log_escape_time) == pytest.approx(float(known.log_escape_time), abs=1e-9)
    assert flow.names == ("layers[0].weight", "layers[1].weight", "layers[2].weight")
    assert flow.imbalance is None and flow.imbalance_residual is None
    np.testing.assert_allclose(flow.layer_norms, known.layer_norms, rtol=1e-8)
    for ours, theirs in zip(flow.singular_values, known.singular_values, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-10)
    with pytest.raises(ValueError, match="flow must be one of a perceptron"):
        _ = flow.imbalance_error


def plain_loss(model):
    return 0.5 * jnp.mean((jax.vmap(model)(TASK.x) - TASK.y) ** 2)


def test_a_loss_of_ones_own_is_that_of_the_task():
    model = scaled(MODEL, 0.1)
    given, own = sj.gradient_flow(model, TASK, save=SMALL), sj.gradient_flow(model, plain_loss, save=SMALL)
    assert float(own.log_escape_time) == pytest.approx(float(given.log_escape_time), abs=1e-8)
    assert own.task is None


RATES = np.array([0.1, 0.05])


def as_flow(times) -> float:
    """Times of descent at two learning rates, taken to the learning rate zero."""
    return float(2 * times[1] - times[0])


def test_gradient_descent_in_plain_jax_takes_the_same_time():
    model = scaled(MODEL, 0.3)
    flow = sj.gradient_flow(model, TASK, HALF, save=SMALL)
    half = 0.25 * jnp.mean(TASK.y**2)
    moving, rest = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def descend(rate):
        def loss(w):
            return plain_loss(eqx.combine(w, rest))

        def body(c):
            w, steps, _ = c
            return jax.tree.map(lambda p, g: p - rate * g, w, jax.grad(loss)(w)), steps + 1, loss(w)

        w, steps, before = jax.lax.while_loop(lambda c: loss(c[0]) > half, body, (moving, 0, jnp.inf))
        return rate * (steps - 1 + (before - half) / (before - loss(w)))

    assert as_flow([descend(rate) for rate in RATES]) == pytest.approx(float(flow.escape_time), rel=2e-3)


def test_gradient_descent_in_pytorch_takes_the_same_time():
    torch = pytest.importorskip("torch")
    model = scaled(MODEL, 0.3)
    flow = sj.gradient_flow(model, TASK, HALF, save=SMALL)
    x, y = (torch.tensor(np.asarray(a)) for a in (TASK.x, TASK.y))
    half = 0.25 * float(jnp.mean(TASK.y**2))

    def descend(rate: float) -> float:
        layers = [torch.nn.Linear(*layer.weight.shape[::-1], dtype=torch.float64) for layer in model.layers]
        net = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
        with torch.no_grad():
            for ours, theirs in zip(layers, model.layers, strict=True):
                ours.weight.copy_(torch.tensor(np.asarray(theirs.weight)))
                ours.bias.copy_(torch.tensor(np.asarray(theirs.bias)))
        optimiser, before = torch.optim.SGD(net.parameters(), lr=rate), np.inf
        for step in range(100_000):
            optimiser.zero_grad()
            loss = 0.5 * torch.mean((net(x) - y) ** 2)
            if loss.item() <= half:
                return rate * (step - 1 + (before - half) / (before - loss.item()))
            before = loss.item()
            loss.backward()
            optimiser.step()
        return np.nan

    assert as_flow([descend(rate) for rate in RATES]) == pytest.approx(float(flow.escape_time), rel=2e-3)


def test_a_bias_that_explains_most_of_the_loss_hides_neither_the_plateau_nor_its_end():
    task, shallow = sj.Task(TASK.x, TASK.y + 2), eqx.nn.MLP(10, 1, 8, 1, jnp.tanh, key=KEY)

    def log_time(scale, rtol):
        flow = sj.gradient_flow(scaled(shallow, scale), task, rtol=rtol, save=SMALL)
        assert flow.status == sj.Status.escaped and flow.losses[-1] < 0.05 * flow.losses[0]
        return float(flow.log_escape_time)

    assert log_time(1e-3, 1e-4) == pytest.approx(log_time(1e-3, 1e-8), abs=1e-4)
    slope = (log_time(1e-3 * np.exp(-0.05), 1e-8) - log_time(1e-3 * np.exp(0.05), 1e-8)) / 0.1
    assert float(sj.critical_exponent(scaled(shallow, 1e-3), task)) == pytest.approx(slope, rel=0.01)
    large = sj.gradient_flow(scaled(shallow, 1.0), task, save=SMALL)
    assert large.status == sj.Status.no_plateau


class Chain(eqx.Module):
    """`f = a w₂ w₁ x`, in which the factor is an array of the activation."""

    weights: tuple[jax.Array, jax.Array]
    factor: jax.Array

    def __call__(self, x):
        return self.weights[1] * self.factor * self.weights[0] * x


def test_a_factor_of_the_activation_is_differentiated_as_the_closed_form():
    # u = a w²: u' = 2a u (S − u), and ‖∇𝓛‖ is largest at u = S/3: τ = log(½ (S/u₀ − 1))/(2aS).
    strength, start = 1.5, 1e-2
    task = sj.Task(jnp.ones((1, 1)), jnp.full((1, 1), strength))
    moving = Chain((True, True), False)

    def flow(a):
        chain = Chain((jnp.full(1, start), jnp.full(1, start)), a)
        return sj.gradient_flow(chain, task, trainable=moving, rtol=1e-8, save=SMALL).escape_time

    def exact(a):
        return jnp.log(0.5 * (strength / (a * start**2) - 1)) / (2 * a * strength)

    at = jnp.asarray(0.7)
    time, rate = jax.value_and_grad(flow)(at)
    assert float(time) == pytest.approx(float(exact(at)), rel=1e-6)
    assert float(rate) == pytest.approx(float(jax.grad(exact)(at)), rel=1e-5)


class Sloped(eqx.Module):
    """An activation `tanh(a z)` with an array of its own."""

    slope: jax.Array

    def __call__(self, z):
        return jnp.tanh(self.slope * z)


def test_a_traced_activation_of_a_model_is_differentiated_as_by_differences():
    model = scaled(PLAIN, 1e-2)
    moving = eqx.tree_at(lambda m: m.activation, jax.tree.map(eqx.is_inexact_array, model), False)

    def escape(slope):
        net = eqx.tree_at(lambda m: m.activation, model, Sloped(slope), is_leaf=lambda leaf: leaf is model.activation)
        return sj.gradient_flow(net, TASK, trainable=moving, rtol=1e-8, save=SMALL).log_escape_time

    at, step = jnp.full((2, 8), 1.2), 1e-4
    rate = jax.grad(escape)(at)
    difference = (escape(at + step) - escape(at - step)) / (2 * step)
    assert float(jnp.sum(rate)) == pytest.approx(float(difference), rel=1e-5)


@pytest.mark.slow
def test_derivatives_by_the_weights_of_any_model_agree_in_both_modes():
    def escape(log_scale):
        return sj.gradient_flow(scaled(PLAIN, jnp.exp(log_scale)), TASK, save=SMALL).log_escape_time

    at = jnp.log(1e-2)
    forward, reverse = jax.jvp(escape, (at,), (jnp.ones_like(at),))[1], jax.grad(escape)(at)
    assert float(forward) == pytest.approx(float(reverse), rel=1e-8)
    assert float(sj.critical_exponent(scaled(PLAIN, 1e-2), TASK)) == pytest.approx(-float(forward), abs=1e-6)


def test_the_energy_spent_is_the_loss_lost():
    model = scaled(MODEL, 0.1)
    errors = [
        float(sj.gradient_flow(model, TASK, sj.Loss(0.05), rtol=rtol, save=SMALL).energy_error)
        for rtol in (1e-3, 1e-5, 1e-7)
    ]
    assert errors[0] < 1e-2 and errors[1] < 0.1 * errors[0] and errors[2] < 0.1 * errors[1]
    assert float(sj.gradient_flow(Convolutions(jnp.tanh), digits(), sj.Loss(0.3), save=SMALL).energy_error) < 1e-3


# What moves and what stays


class Mixed(eqx.Module):
    """A linear layer on features of frozen weights, with leaves of many kinds."""

    features: jax.Array
    head: jax.Array
    order: jax.Array
    name: str = eqx.field(static=True)
    act: Callable
    scale: float

    def __call__(self, x):
        return self.scale * self.head @ self.act(self.features @ x)[self.order]


def mixed() -> Mixed:
    keys = jax.random.split(KEY)
    head = 1e-2 * jax.random.normal(keys[1], (1, 8))
    return Mixed(0.3 * jax.random.normal(keys[0], (8, 10)), head, jnp.arange(8)[::-1], "mixed", jnp.tanh, 2.0)


def test_a_frozen_array_stays_and_the_head_relaxes_in_closed_form():
    model = mixed()
    moving = eqx.tree_at(lambda m: m.head, jax.tree.map(lambda _: False, model), True)
    flow = sj.gradient_flow(model, TASK, sj.Time(3.0), trainable=moving, rtol=1e-8)
    assert flow.names == ("head",)
    np.testing.assert_array_equal(flow.net.features, model.features)
    # On fixed features Φ the loss is quadratic: w(t) = w* + e^{−Ct} (w₀ − w*) with C = ΦᵀΦ/n.
    phi = 2.0 * jnp.tanh(TASK.x @ model.features.T)[:, model.order]
    covariance = phi.T @ phi / len(phi)
    best = jnp.linalg.solve(covariance, phi.T @ TASK.y[:, 0] / len(phi))
    exact = best + jax.scipy.linalg.expm(-3.0 * covariance) @ (model.head[0] - best)
    np.testing.assert_allclose(flow.net.head[0], exact, rtol=1e-5, atol=1e-7)


def test_other_leaves_survive():
    model = mixed()
    flow = sj.gradient_flow(model, TASK, sj.Loss(0.1), save=sj.Save(weights=True))
    assert flow.status == sj.Status.loss_reached
    assert flow.names == ("features", "head")
    assert isinstance(flow.net, Mixed)
    np.testing.assert_array_equal(flow.net.order, model.order)
    assert flow.net.order.dtype == model.order.dtype
    assert (flow.net.name, flow.net.act, flow.net.scale) == ("mixed", jnp.tanh, 2.0)
    assert [w.shape[1:] for w in flow.weights] == [(8, 10), (1, 8)]
    for end, saved in zip((flow.net.features, flow.net.head), flow.weights, strict=True):
        np.testing.assert_allclose(end, saved[-1], rtol=1e-12)
    assert float(plain_loss(flow.net)) == pytest.approx(float(flow.losses[-1]), rel=1e-10)
    assert "Mixed (2 arrays)" in str(flow)


def test_groups_that_are_no_matrices():
    flow = sj.gradient_flow(
        scaled(Convolutions(jnp.tanh, True), 0.1), digits(), sj.Time(5.0), save=sj.Save(weights=True)
    )
    by_name = dict(zip(flow.names, flow.singular_values, strict=True))
    assert by_name["head.bias"] is None
    for name, kept in zip(flow.names, flow.weights, strict=True):
        column = flow.layer_norms[:, flow.names.index(name)]
        np.testing.assert_allclose(column, jnp.linalg.norm(kept.reshape(len(kept), -1), axis=1), rtol=1e-10)
        if by_name[name] is not None:
            matrices = kept.reshape(len(kept), kept.shape[1], -1)
            np.testing.assert_allclose(by_name[name], jnp.linalg.svd(matrices)[1], rtol=1e-8, atol=1e-12)


class Tied(eqx.Module):
    """A linear autoencoder whose decoder is the transpose of its encoder."""

    shared: eqx.nn.Shared

    def __init__(self, weight):
        encoder = eqx.nn.Linear(4, 2, use_bias=False, key=KEY)
        decoder = eqx.nn.Linear(2, 4, use_bias=False, key=KEY)
        pair = (eqx.tree_at(lambda e: e.weight, encoder, weight), decoder)
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight.T)

    def __call__(self, x):
        encoder, decoder = self.shared()
        return decoder(encoder(x))


def test_shared_arrays_move_together():
    x = jax.random.normal(jax.random.key(4), (40, 4)) * jnp.array([2.0, 1.0, 0.5, 0.1])
    weight = 1e-3 * jax.random.normal(KEY, (2, 4))
    flow = sj.gradient_flow(Tied(weight), sj.Task(x, x), save=SMALL)
    assert len(flow.names) == 1
    one = sj.gradient_flow(weight, lambda w: 0.5 * jnp.mean(jnp.sum((x @ w.T @ w - x) ** 2, axis=1)), save=SMALL)
    assert flow.status == one.status == sj.Status.escaped
    assert float(flow.log_escape_time) == pytest.approx(float(one.log_escape_time), abs=1e-8)
    encoder, decoder = flow.net.shared()
    np.testing.assert_array_equal(decoder.weight, encoder.weight.T)


# Transformations and precision


def test_a_batch_of_models_equals_its_lanes():
    scales = jnp.array([1e-1, 1e-2, 1e-4])

    def run(scale):
        return sj.gradient_flow(scaled(PLAIN, scale), TASK, save=SMALL)

    # A model holds functions, which plain `jax.vmap` cannot return.
    times, batch = jax.vmap(lambda scale: run(scale).log_escape_time)(scales), eqx.filter_vmap(run)(scales)
    # Two programs, whose sums XLA may order differently.
    np.testing.assert_allclose(times, batch.log_escape_time, rtol=1e-9)
    for lane, scale in enumerate(scales):
        alone = run(scale)
        assert float(batch.log_escape_time[lane]) == pytest.approx(float(alone.log_escape_time), abs=1e-8)
        assert int(batch.stats["steps"][lane]) == int(alone.stats["steps"])
    assert batch.net.layers[0].weight.shape == (3, 8, 10)
    assert "3 flows of MLP (3 arrays)" in str(batch)


@pytest.mark.parametrize("model", [scaled(PLAIN, 1e-4), scaled(MODEL, 0.1)], ids=["plain", "biases"])
def test_single_precision_is_within_a_hundredth(model):
    single = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, model)
    flow = sj.gradient_flow(single, TASK.astype(jnp.float32), save=SMALL)
    assert flow.losses.dtype == jnp.float32 and flow.status == sj.Status.escaped
    reference = sj.gradient_flow(model, TASK, save=SMALL)
    assert abs(np.expm1(float(flow.log_escape_time) - float(reference.log_escape_time))) < 0.01


# Bad input


class Noisy(eqx.Module):
    """A model with a layer that needs a key."""

    layer: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, x, key=None):
        return self.dropout(self.layer(x), key=key)


class Normed(eqx.Module):
    """A model with a layer that has a state."""

    layer: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __call__(self, x, state):
        return self.norm(self.layer(x), state)


LINEAR = eqx.nn.Linear(10, 1, key=KEY)


@pytest.mark.parametrize(
    ("model", "task", "words"),
    [
        (
            eqx.nn.MLP(10, 3, 8, 2, key=KEY),
            TASK,
            r"return an array of shape \(1,\) .* to shape \(3,\).* maps one sample",
        ),
        (eqx.nn.MLP(9, 1, 8, 2, key=KEY), TASK, r"map one sample of shape \(10,\) .* whose call failed"),
        (eqx.nn.MLP(10, "scalar", 8, 2, key=KEY), TASK, r"return an array of shape \(1,\)"),
        (Noisy(LINEAR, eqx.nn.Dropout(0.5)), TASK, r"Dropout needs a random key.*eqx.nn.inference_mode"),
        (
            Normed(LINEAR, eqx.nn.BatchNorm(1, "batch", mode="batch")),
            TASK,
            "Batch normalisation has a state.*LayerNorm",
        ),
        (eqx.nn.Lambda(jnp.sum), TASK, "at least one floating-point array that moves.*Arrays move"),
        (Arrays(jnp.ones(2), jnp.ones(2)), TASK, r"model must map a sample.*Give a function loss\(model\)"),
        (MODEL, 3.0, r"task must be a saddlejax.Task, or a function loss\(model\) -> scalar"),
        (MODEL, lambda m: jax.vmap(m)(TASK.x), r"loss must return a scalar.*\(50, 1\)"),
        (MODEL, lambda m: plain_loss(m) + 0j, "loss must return a real number.*complex128"),
        (MODEL, lambda m: plain_loss(m) * jnp.inf, "have a finite loss at the start"),
        (MODEL, lambda m: m.nothing, "a function that failed on the model .AttributeError"),
        (scaled(MODEL, jnp.nan), TASK, r"model.layers\[0\].weight must be finite"),
    ],
)
def test_bad_models_and_losses_are_refused_with_a_remedy(model, task, words):
    with pytest.raises(ValueError, match=words):
        sj.gradient_flow(model, task)


def test_a_model_in_inference_mode_is_taken():
    model = scaled(eqx.nn.inference_mode(Noisy(LINEAR, eqx.nn.Dropout(0.5))), 0.1)
    flow = sj.gradient_flow(model, TASK, sj.Time(1.0), save=SMALL)
    assert flow.status == sj.Status.time_reached


def test_throw_raises_where_a_flow_does_not_end_as_asked():
    net = network(3, "tanh", 1e-3, width=8)
    with pytest.raises(RuntimeError, match=r"did not end as asked.*step limit"):
        sj.gradient_flow(net, TASK, max_steps=5, throw=True)
    traced = eqx.filter_jit(lambda net: sj.gradient_flow(net, TASK, max_steps=5, throw=True).losses)
    with pytest.raises(Exception, match="A flow did not end as it was asked to"):
        traced(net)
    assert sj.gradient_flow(net, TASK, throw=True).status == sj.Status.escaped
