"""Escape times in closed form, exponents by differentiation, predictions for real networks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, network, teacher
from scipy.integrate import quad, solve_ivp
from sklearn.datasets import load_breast_cancer

import saddlejax as sj

# Closed forms


def grown(norms, speed, end):
    """The time in which `dX_l/dt = K Π_{m≠l} X_m` takes the smallest norm to `end`, by SciPy."""

    def velocity(t, x):
        return speed * np.array([np.prod(np.delete(x, layer)) for layer in range(len(x))])

    def reached(t, x):
        return min(x) - end

    reached.terminal = True
    done = solve_ivp(velocity, (0, 1e9), norms, events=reached, rtol=1e-11, atol=1e-14, method="DOP853")
    return done.t_events[0][0]


@pytest.mark.parametrize("bottleneck", [1, 2, 3, 5])
def test_closed_forms_are_the_integral(bottleneck):
    scale, speed, end = 0.03, 0.7, 0.9
    integral = quad(lambda s: np.exp(s * (2 - bottleneck)) / speed, np.log(scale), np.log(end), epsabs=0, epsrel=1e-12)[
        0
    ]
    assert float(sj.escape_time(scale, bottleneck, speed, end=end)) == pytest.approx(integral, rel=1e-9)
    assert float(sj.escape_time(scale, bottleneck, speed, end=end)) == pytest.approx(
        grown([scale] * bottleneck, speed, end), rel=1e-7
    )


def test_unequal_layers_by_quadrature():
    norms = np.array([0.03, 0.05, 0.07, 0.09])
    time = sj.escape_time(1.0, speed=0.5, layer_norms=norms, end=0.8)
    assert float(time) == pytest.approx(grown(norms, 0.5, 0.8), rel=1e-8)
    scaled = sj.escape_time(jnp.array([1e-2, 1e-3]), speed=0.5, layer_norms=norms / 1e-2, end=0.8)
    assert float(scaled[0]) == pytest.approx(float(time), rel=1e-10)
    # Nearly equal norms join the closed form, without cancellation, however small they are.
    nearly = sj.law.log_escape_time(1e-9, layer_norms=[1, 1, 1 + 1e-9, 1], speed=2.0)
    assert float(nearly) == pytest.approx(float(sj.law.log_escape_time(1e-9, 4, 2.0)), abs=1e-7)


def test_logarithm_stays_finite_and_differentiates_to_the_law():
    log_time = sj.law.log_escape_time(1e-60, 8, 1e-3)
    assert float(log_time) == pytest.approx(360 * np.log(10) - np.log(6e-3), rel=1e-10)
    assert np.isinf(float(sj.escape_time(1e-60, 8, 1e-3)))
    slope = jax.jit(jax.grad(lambda s: sj.law.log_escape_time(jnp.exp(s), 5)))(jnp.log(1e-4))
    assert float(slope) == pytest.approx(-3, abs=1e-8)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_scales_that_a_square_or_the_precision_cannot_hold(double):
    tolerance = 1e-11 if double else 1e-5
    with jax.enable_x64(double):
        for scale in (1e-25, 1e-30, 1e-160, 1e-300):
            # r = 2 with norms x_1 < x_2: τ = ∫ dy/√(y² + x_2² − x_1²).
            width = scale * np.sqrt(3)
            expected = np.arcsinh(1 / width) - np.arcsinh(scale / width)
            time = sj.escape_time(scale, layer_norms=[1.0, 2.0])
            assert float(time) == pytest.approx(expected, rel=tolerance), scale
        assert float(sj.escape_time(1e-25, layer_norms=[1, 2])) == pytest.approx(57.159, abs=1e-3)
        assert float(sj.escape_time(1e-30, layer_norms=[1, 2])) == pytest.approx(68.672, abs=1e-3)
        # The same for three layers, by SciPy in v = log(X_1 / x_1).
        ratios = np.array([1.0, 3.0, 7.0])
        integral = quad(
            lambda v: np.exp(2 * v - 0.5 * np.sum(np.logaddexp(2 * v, np.log(ratios[1:] ** 2 - 1))) - v), 0, 30
        )
        log_time = sj.law.log_escape_time(1e-50, layer_norms=ratios)
        assert float(log_time) == pytest.approx(np.log(integral[0]) + 50 * np.log(10), rel=tolerance)
        # A number below the least one of the precision is not 0, and no time is infinite because of it.
        assert float(sj.law.log_escape_time(1e-50, 8)) == pytest.approx(300 * np.log(10) - np.log(6), rel=tolerance)
        assert float(sj.escape_time(1e-50, 2, 1e-50)) == pytest.approx(np.inf if not double else 50e50 * np.log(10))
        # An array in which it has become 0 already is refused.
        with pytest.raises(ValueError, match="scale must be positive"):
            sj.law.log_escape_time(jnp.asarray(1e-50, jnp.float32), 8)


def test_law_of_unequal_layers_under_transformations():
    # τ = asinh(1/w) − asinh(ε/w), w = √3 ε.
    scales = jnp.array([1e-2, 1e-100, 1e-200])
    slope = jax.jit(jax.vmap(jax.grad(lambda s: sj.law.log_escape_time(s, layer_norms=[1.0, 2.0]))))(scales)
    times = np.arcsinh(1 / np.sqrt(3) / scales) - np.arcsinh(1 / np.sqrt(3))
    np.testing.assert_allclose(slope * scales, -1 / np.sqrt(1 + 3 * scales**2) / times, rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((0.0, 3), {}, "scale must be positive"),
        ((1e-3,), {}, "bottleneck must be given"),
        ((1e-3, 2.5), {}, "bottleneck must be a whole number"),
        ((2.0, 3), {}, "scale must start every bottleneck layer below end"),
        ((1e-3, 3, -1.0), {}, "speed must be positive"),
        ((1e-3, 3), {"layer_norms": [1.0, 2.0]}, "bottleneck must be 2"),
    ],
)
def test_bad_arguments_are_named(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        sj.escape_time(*arguments, **options)


# Exponents


@pytest.mark.parametrize(("activation", "tolerance"), [("tanh", 1e-3), ("gelu", 1e-3), ("relu", 1e-2)])
def test_exponent_of_he_normal_networks_wherever_the_bottleneck_sits(activation, tolerance):
    task = teacher(50)
    for r, first, seed in ((3, 0, 0), (3, 3, 1), (3, 6, 2), (5, 0, 3), (5, 2, 4), (8, 0, 5), (8, 1, 6)):
        net = sj.MLP([10, *[16] * 8, 1], activation, key=jax.random.key(seed))
        layers = range(first, first + r)
        small = sj.scale_layers(net, 1e-5, layers)
        assert sj.bottleneck_layers(small) == tuple(layers)
        exponent = sj.critical_exponent(small, task)
        assert float(exponent) == pytest.approx(r - 2, abs=tolerance), (r, first, seed)


def test_exponent_agrees_with_differences():
    task = teacher()
    for scale, layers in ((1e-1, None), (3e-2, [0, 1]), (1e-2, [1, 2])):
        net, step = network(3, "gelu", scale, 8, layers), 1e-3
        chosen = layers or range(3)
        logs = [
            float(
                sj.gradient_flow(sj.scale_layers(net, np.exp(h), chosen), task, rtol=1e-9, save=SMALL).log_escape_time
            )
            for h in (-2 * step, -step, step, 2 * step)
        ]
        central = -(8 * (logs[2] - logs[1]) - (logs[3] - logs[0])) / (12 * step)
        exponent = sj.critical_exponent(net, task, layers, rtol=1e-8)
        assert float(exponent) == pytest.approx(central, abs=1e-4)
    for options, words in (
        ({"layers": [5]}, "layers must hold indices"),
        ({"rtol": -1.0}, "rtol must be positive"),
        ({"until": sj.Time(1.0)}, "until must be saddlejax.Escape"),
    ):
        with pytest.raises(ValueError, match=words):
            sj.critical_exponent(net, task, **options)


def test_bottleneck_is_found_from_the_weights():
    net = sj.MLP([10, 8, 8, 8, 1], key=jax.random.key(0))
    assert sj.bottleneck_layers(net) == (0, 1, 2, 3)
    assert sj.bottleneck_layers(sj.scale_layers(net, 1e-2)) == (0, 1, 2, 3)
    assert sj.bottleneck_layers(sj.scale_layers(net, 1e-1, [1, 3])) == (1, 3)
    chain, _ = sj.manifold.chain([1e-3] * 3, jnp.tanh, "tanh", 50)
    assert sj.bottleneck_layers(chain) == (0, 1, 2)
    wide = sj.manifold.project(sj.scale_layers(sj.MLP([5, 8, 8, 3], key=jax.random.key(0)), 0.03), 2)
    assert sj.bottleneck_layers(sj.manifold.reduce(wide, 2)) == sj.bottleneck_layers(wide) == (0, 1, 2)
    with pytest.raises(ValueError, match="layers must be given where the weights are traced"):
        jax.jit(lambda n: sj.critical_exponent(n, teacher()))(net)


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ([1e-3, 3e-2, 1, 1], r"here .*, .*, .*, .*, do not tell.*layers=\(0, 1\)"),
        ([0.4, 1, 2, 2], r"do not tell.*layers=\(0,\)"),
        ([0.04, 0.3, 1, 1], "do not tell"),
    ],
)
def test_a_bottleneck_that_is_not_clear_must_be_named(scales, words):
    net = sj.MLP([10, 8, 8, 8, 1], key=jax.random.key(0))
    norms = jnp.asarray(scales) * jnp.sqrt(2.0 * jnp.asarray(net.sizes[1:]))
    net = net.with_weights([norm * w / jnp.linalg.norm(w) for norm, w in zip(norms, net.weights, strict=True)])
    for question in (
        lambda: sj.bottleneck_layers(net),
        lambda: sj.critical_exponent(net, teacher()),
        lambda: sj.predict_escape(net, teacher()),
    ):
        with pytest.raises(ValueError, match=f"layers must be given where.*{words}"):
            question()


# Predictions


@pytest.mark.parametrize(
    ("activation", "scale", "layers", "tolerance"),
    [
        ("tanh", 1e-2, None, 1e-3),
        ("tanh", 1e-3, (0, 1, 2), 1e-3),
        ("tanh", 1e-3, (2, 3), 0.1),
        ("relu", 1e-3, None, 1e-3),
        ("relu", 1e-3, (1, 2, 3), 2e-3),
    ],
)
def test_predictions_for_real_networks(activation, scale, layers, tolerance):
    task, net = teacher(), network(4, activation, scale, 16, layers)
    prediction = sj.predict_escape(net, task, learning_rate=0.1)
    assert prediction.layers == (layers or (0, 1, 2, 3))
    flow = sj.gradient_flow(net, task, save=SMALL)
    assert float(prediction.time / flow.escape_time) == pytest.approx(1, abs=tolerance)
    assert float(prediction.steps) == pytest.approx(float(prediction.time) / 0.1)
    assert float(prediction.drop) == pytest.approx(float(1 - flow.losses[1] / flow.losses[0]), rel=0.5)
    assert "assuming that" in str(prediction)


def test_predicted_steps_are_those_of_gradient_descent():
    import optax

    task, net = teacher(), network(3, "tanh", 0.03, 16)
    prediction = sj.predict_escape(net, task, learning_rate=0.05)
    run = sj.gradient_descent(net, task, optax.sgd(0.05), steps=int(1.5 * float(prediction.steps)))
    assert float(run.stats["escape_step"]) == pytest.approx(float(prediction.steps), rel=0.05)


def test_a_reduced_network_is_predicted_as_its_wide_one():
    wide = sj.scale_layers(sj.manifold.project(sj.MLP([10, 8, 8, 1], "gelu", key=jax.random.key(3)), 2), 1e-2)
    small = sj.manifold.reduce(wide, 2)
    times = [float(sj.predict_escape(net, teacher()).log_time) for net in (wide, small)]
    assert times[0] == pytest.approx(times[1], abs=1e-6)


def test_the_questions_people_ask():
    task, net = teacher(), network(4, "tanh", 1e-3, 16)
    factor = sj.scale_for_steps(net, task, steps=1e4, learning_rate=0.1)
    scaled = sj.predict_escape(sj.scale_layers(net, factor), task, 0.1)
    assert float(scaled.steps) == pytest.approx(1e4, rel=1e-3)
    full = network(4, "tanh", 1.0, 16)
    allowed = sj.bottleneck_for_steps(full, task, 1e-3, steps=1e4, learning_rate=0.1)
    steps = [
        float(sj.predict_escape(sj.scale_layers(full, 1e-3, range(r)), task, 0.1, range(r)).steps)
        for r in (allowed, allowed + 1)
    ]
    assert steps[0] <= 1e4 < steps[1]
    with pytest.raises(ValueError, match="activation must vanish at zero"):
        sj.predict_escape(network(3, "sigmoid", 1e-2), task)
    with pytest.raises(
        ValueError, match=r"steps must be a length that some factor gives the plateau; a factor of .* gives it"
    ):
        sj.scale_for_steps(network(3, "tanh", 1e-2, 16, (0, 1)), task, steps=1e6, learning_rate=0.1)
    with pytest.raises(ValueError, match="learning_rate must be given"):
        _ = sj.predict_escape(net, task).steps


def test_every_number_of_a_prediction_in_closed_form():
    # f = w₂ w₁ x with w₁ = w₂ = w: 𝓛 = ½ (1 − u)², u = w², 𝓛_0 = −u: dw/dt = w, to u = ⅓, where the Hessian has 0 and ⅔.
    scale = 1e-3
    task = sj.Task(np.ones((1, 1)), np.ones((1, 1)))
    net = sj.MLP.from_weights([[[scale]], [[scale]]], "identity")
    prediction = sj.predict_escape(net, task, learning_rate=0.1, layers=(0, 1))
    assert float(prediction.time) == pytest.approx(np.log(np.sqrt(1 / 3) / scale), rel=1e-4)
    assert float(prediction.speed) == pytest.approx(1, rel=1e-3)
    assert float(prediction.drop) == pytest.approx(1 - (2 / 3) ** 2, rel=1e-3)
    assert float(prediction.signal) == pytest.approx(1, rel=1e-9)
    assert float(prediction.gradient_error) == pytest.approx(scale**2, rel=1e-6)
    np.testing.assert_allclose(prediction.preactivations, [scale], rtol=1e-9)
    np.testing.assert_allclose(prediction.bend, [0.0], atol=1e-9)
    assert float(prediction.growth_rate) == pytest.approx(1, rel=1e-9)
    assert float(prediction.largest_learning_rate) == pytest.approx(3, rel=1e-3)
    assert prediction.concerns == []
    fast = sj.predict_escape(net, task, learning_rate=4.0, layers=(0, 1))
    assert len(fast.concerns) == 1 and "above 2/λ = 3" in fast.concerns[0]
    # A step of 1e-9 of the weights is lost in single precision.
    with jax.enable_x64(False):
        task = sj.Task(np.ones((1, 1)), np.ones((1, 1)))
        net = sj.MLP.from_weights([[[scale]], [[scale]]], "identity")
        slow = sj.predict_escape(net, task, learning_rate=1e-9, layers=(0, 1))
        assert len(slow.concerns) == 1 and "gradient descent will not move" in str(slow)
        after = net.weights[0] - 1e-9 * jax.grad(lambda w: jnp.mean((1 - net.weights[1] @ w) ** 2) / 2)(net.weights[0])
        assert float(after[0, 0]) == float(net.weights[0][0, 0])


def test_predictions_under_transformations():
    task, net = teacher(), network(4, "tanh", 1.0, 16)
    scales = [1e-2, 1e-3]
    alone = [sj.predict_escape(sj.scale_layers(net, scale), task, 0.1, layers=range(4)) for scale in scales]
    jitted = jax.jit(lambda net: sj.predict_escape(net, task, 0.1, layers=range(4)))
    together = jax.vmap(lambda scale: jitted(sj.scale_layers(net, scale)))(jnp.asarray(scales))
    for lane, expected in enumerate(alone):
        for one in (jitted(sj.scale_layers(net, scales[lane])), jax.tree.map(lambda a, i=lane: a[i], together)):
            for name in ("log_time", "steps", "speed", "drop", "signal", "gradient_error", "largest_learning_rate"):
                assert float(getattr(one, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-6), name
            assert one.status == sj.Status.escaped and "assuming that" in str(one)
    assert "shape (2,)" in str(together)
    with pytest.raises(ValueError, match="layers must be given where the weights are traced"):
        jax.jit(lambda net: sj.predict_escape(net, task))(net)
    # What is not traced is computed as it is outside.
    small = sj.scale_layers(net, 1e-2)
    inside = jax.jit(lambda x: x + sj.predict_escape(small, task).log_time)(0.0)
    assert float(inside) == pytest.approx(float(alone[0].log_time), rel=1e-9)
    for name in ("scale_for_steps", "bottleneck_for_steps"):
        rest = {"steps": 100, "learning_rate": 0.1} | ({"scale": 1e-3} if name == "bottleneck_for_steps" else {})
        with pytest.raises(ValueError, match=rf"sj.{name} runs on the host .* model was traced"):
            jax.jit(functools.partial(getattr(sj, name), task=task, **rest))(net)


def test_predictions_where_single_precision_underflows():
    with jax.enable_x64(False):
        digits = sj.tasks.digits()
        task = sj.Task(digits.x[:200], digits.y[:200])
        net = sj.MLP([64, 24, 24, 24, 10], "tanh", key=jax.random.key(0))
        # The leading-order flow of four layers scales as ε^{−2}, and the end does not depend on the scale.
        tiny, small = (sj.predict_escape(sj.scale_layers(net, scale), task) for scale in (1e-12, 1e-6))
        assert tiny.log_time.dtype == jnp.float32
        assert float(tiny.log_time - small.log_time) == pytest.approx(12 * np.log(10), abs=1e-3)
        factor = sj.scale_for_steps(sj.scale_layers(net, 1e-6), task, steps=1e30, learning_rate=0.1)
        assert 2 * np.log(factor) == pytest.approx(float(small.log_time) - np.log(1e29), abs=1e-3)
        # Under jit it is computed in single precision, and says what is amiss.
        traced = jax.jit(lambda net: sj.predict_escape(net, task, layers=range(4)))(sj.scale_layers(net, 1e-12))
        assert traced.status == sj.Status.underflow and np.isnan(float(traced.log_time))
        assert len(traced.concerns) == 1 and "At init scales 9.98e-13" in traced.concerns[0]
    double = sj.MLP.from_weights([w.astype(float) for w in net.weights], "tanh")
    flow = sj.gradient_flow(sj.scale_layers(double, 1e-12), task.astype(float), save=SMALL)
    assert float(tiny.log_time) == pytest.approx(float(flow.log_escape_time), abs=1e-3)


@pytest.mark.parametrize(("activation", "order"), [("tanh", 5), ("gelu", 6)])
def test_predictions_where_the_number_of_small_layers_is_not_the_order(activation, order):
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    task = sj.Task(signs, signs.prod(axis=1, keepdims=True))
    net = sj.scale_layers(sj.MLP([3, 16, 16, 1], activation, key=jax.random.key(0)), 1e-3)
    prediction = sj.predict_escape(net, task, learning_rate=0.1)
    assert float(prediction.order) == order and f"r = {order}" in str(prediction)
    flow = sj.gradient_flow(net, task, save=SMALL)
    assert float(prediction.time / flow.escape_time) == pytest.approx(1, abs=0.02)
    factor = sj.scale_for_steps(net, task, steps=float(prediction.steps) / 10 ** (order - 2), learning_rate=0.1)
    assert factor == pytest.approx(10, rel=0.02)
    # What is traced cannot be told apart: it says that nothing is predicted, and why.
    traced = jax.jit(lambda net: sj.predict_escape(net, task, layers=range(3)))(net)
    assert np.isnan(float(traced.log_time)) and float(traced.signal) < 1e-12
    assert "the order of this saddle is higher than the number of small layers, 3" in str(traced)
    assert "too large" not in str(traced)


def test_predictions_say_which_of_their_assumptions_fail():
    data = load_breast_cancer()
    raw = sj.Task(data.data, data.target, sj.cross_entropy)
    scaled = sj.Task((data.data - data.data.mean(axis=0)) / data.data.std(axis=0), data.target, sj.cross_entropy)
    net = sj.scale_layers(sj.MLP([30, 32, 32, 2], "tanh", key=jax.random.key(0)), 1e-2)
    wrong, right = (sj.predict_escape(net, task) for task in (raw, scaled))
    flows = [sj.gradient_flow(net, task, save=SMALL) for task in (raw, scaled)]
    assert abs(float(wrong.log_time - flows[0].log_escape_time)) > np.log(2)
    sizes = [float(jnp.sqrt(jnp.mean(jnp.square(task.x @ net.weights[0].T)))) for task in (raw, scaled)]
    np.testing.assert_allclose([p.preactivations[0] for p in (wrong, right)], sizes, rtol=1e-9)
    assert float(wrong.gradient_error) > 0.9 and "Centre and scale the inputs" in str(wrong)
    assert float(right.time) == pytest.approx(float(flows[1].escape_time), rel=0.03)
    assert right.concerns == []


def test_networks_without_a_plateau_and_losses_without_an_end():
    # f = w₂ w₁ x escapes at u = w₂ w₁ = ⅓, and starts beyond: there is no plateau, and both layers may have that scale.
    task = sj.Task(np.ones((1, 1)), np.ones((1, 1)))
    full = sj.MLP.from_weights([[[1.0]], [[1.0]]], "identity")
    assert sj.bottleneck_for_steps(full, task, 0.9, steps=10, learning_rate=0.1) == 2
    beyond = sj.predict_escape(full, task)
    assert beyond.status == sj.Status.met_at_start and "too large for a plateau" in str(beyond)
    flat = sj.Task(task.x, task.y, lambda prediction, target: -target[0] * prediction[0])
    with pytest.raises(ValueError, match="task must have a loss that curves upwards along the outputs"):
        sj.predict_escape(sj.scale_layers(full, 1e-2), flat)


# Signal energy


def test_signal_energy_grows_at_least_as_fast_as_the_bootstrap_needs():
    task = teacher()
    constants = []
    for scale in (1e-2, 1e-4):
        net = network(4, "tanh", scale, 16, (0, 1, 2))
        flow = sj.gradient_flow(net, task, save=sj.Save(weights=True, singular_values=False))
        growth = sj.signal_growth(flow, task, 3)
        plateau = np.asarray(flow.losses) > 0.99 * float(flow.losses[0])
        np.testing.assert_allclose(growth.rate[plateau], growth.leading_rate[plateau], rtol=0.1)
        # dγ/dt is the derivative of γ along the flow: γ at a row from the mean value of its rate between rows.
        constants.append(float(np.nanmin(growth.constant[plateau])))
    assert min(constants) > 0
    # One constant serves both scales.
    assert max(constants) < 1.5 * min(constants)
    with pytest.raises(ValueError, match="flow must have kept its weights"):
        sj.signal_growth(sj.gradient_flow(net, task, save=SMALL), task, 3)


def test_constant_of_the_signal_energy_where_the_rates_underflow():
    task, net = teacher(), network(4, "tanh", 1e-8, 16)
    flow = sj.gradient_flow(net, task, save=sj.Save(weights=True, singular_values=False))
    double = sj.signal_growth(flow, task, 4)
    to_single = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == float else a, tree)  # noqa: E731
    single = sj.signal_growth(to_single(flow), to_single(task), 4)
    early = np.asarray(double.rate) < np.finfo(np.float32).tiny
    assert np.sum(early) > 5
    np.testing.assert_allclose(single.constant[early], double.constant[early], rtol=1e-3)
