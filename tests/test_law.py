"""Escape times in closed form, exponents by differentiation, predictions for real networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, network, teacher
from scipy.integrate import quad, solve_ivp

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
    with pytest.raises(ValueError, match=r"at .* times this one it is"):
        sj.scale_for_steps(network(3, "tanh", 1e-2, 16, (0, 1)), task, steps=1e6, learning_rate=0.1)
    with pytest.raises(ValueError, match="learning_rate must be given"):
        _ = sj.predict_escape(net, task).steps


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
