"""Outcomes, records, transformations and precision of gradient flows."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import HALF, NET_KEY, SMALL, TASK_KEY, network, teacher

import saddlejax as sj
from saddlejax.flow.until import AbstractUntil


def linear_task(samples: int = 40) -> sj.Task:
    x = jax.random.normal(TASK_KEY, (samples, 3))
    return sj.Task(x, x[:, :1])


# Outcomes


def test_zero_weights_and_zero_targets_and_dead_relus_do_not_escape():
    task = linear_task()
    net = sj.MLP([3, 4, 1], "tanh", key=NET_KEY)
    still = net.with_weights([0 * w for w in net.weights])
    dead = sj.MLP.from_weights([-jnp.ones((4, 3)), 0.1 * jnp.ones((1, 4))], "relu")
    positive = sj.Task(jnp.abs(task.x) + 0.1, task.y)
    for candidate, problem in ((still, task), (dead, positive)):
        flow = sj.gradient_flow(candidate, problem)
        assert flow.status == sj.Status.stationary
        assert jnp.isnan(flow.escape_time)
        assert "stationary" in str(flow)
    decaying = sj.gradient_flow(sj.scale_layers(net, 0.1), sj.Task(task.x, 0 * task.y))
    assert decaying.status == sj.Status.no_signal
    assert jnp.isnan(decaying.escape_time)


class LayerNorm(AbstractUntil):
    """End where the first layer reaches a norm: an end of a user's own, as the documentation allows."""

    norm: float
    reached: ClassVar = sj.Status.loss_reached
    asks_for_escape: ClassVar[bool] = False
    uses_curvature: ClassVar[bool] = False

    def condition(self, field, state):
        return jnp.linalg.norm(field.model(state).weights[0]) - self.norm

    def describe(self):
        return f"first layer at {self.norm}"


def test_an_end_of_ones_own():
    net = sj.scale_layers(sj.MLP([3, 8, 1], "tanh", key=NET_KEY), 1e-2)
    flow = sj.gradient_flow(net, linear_task(), LayerNorm(0.5))
    assert flow.status == sj.Status.loss_reached
    np.testing.assert_allclose(flow.layer_norms[-1, 0], 0.5, rtol=1e-5)


def test_one_small_layer_has_no_plateau():
    net = sj.scale_layers(sj.MLP([3, 16, 1], "tanh", key=NET_KEY), 1e-6, layers=-1)
    flow = sj.gradient_flow(net, linear_task())
    assert flow.status == sj.Status.no_plateau
    assert jnp.isnan(flow.escape_time)


def test_a_zero_layer_grows():
    net = sj.scale_layers(sj.MLP([3, 8, 8, 1], "tanh", key=NET_KEY), 1e-2)
    net = net.with_weights([*net.weights[:-1], 0 * net.weights[-1]])
    flow = sj.gradient_flow(net, linear_task(), HALF, rtol=1e-8)
    nearly = sj.gradient_flow(
        net.with_weights([*net.weights[:-1], net.weights[-1] + 1e-9]), linear_task(), HALF, rtol=1e-8
    )
    assert flow.status == sj.Status.escaped
    assert float(flow.escape_time) == pytest.approx(float(nearly.escape_time), rel=1e-5)


def test_target_already_met_is_an_error_and_an_outcome_under_jit():
    task, net = linear_task(), sj.MLP([3, 4, 1], "tanh", key=NET_KEY)
    with pytest.raises(ValueError, match="until must not be met at the start"):
        sj.gradient_flow(net, task, sj.Loss(100.0))
    flow = eqx.filter_jit(sj.gradient_flow)(net, task, sj.Loss(100.0))
    assert flow.status == sj.Status.met_at_start


def test_a_failed_lane_leaves_the_others_alone():
    task, net = teacher(), network(3, "tanh", 1.0)
    scales = jnp.array([1e-2, jnp.nan, 1e-3])
    flow = jax.vmap(lambda e: sj.gradient_flow(sj.scale_layers(net, e), task, HALF, save=SMALL))(scales)
    np.testing.assert_array_equal(flow.status == sj.Status.escaped, [True, False, True])
    assert (flow.status == sj.Status.non_finite)[1]
    np.testing.assert_array_equal(jnp.isnan(flow.log_escape_time), [False, True, False])
    alone = sj.gradient_flow(sj.scale_layers(net, 1e-3), task, HALF, save=SMALL)
    np.testing.assert_allclose(flow.log_escape_time[2], alone.log_escape_time, rtol=1e-8)
    assert "non-finite" in str(flow)
    # The flows end at half of the loss; the share lost is that of the lanes one by one.
    np.testing.assert_allclose(flow.loss_drop[jnp.array([0, 2])], 0.5, atol=1e-3)
    np.testing.assert_allclose(flow.loss_drop[2], alone.loss_drop, rtol=1e-9)


def test_steepest_point_comes_with_a_hessian_product_a_step_and_a_threshold_without():
    task, net = teacher(), network(3, "tanh", 1e-3)
    steepest, half = sj.gradient_flow(net, task), sj.gradient_flow(net, task, HALF)
    attempts = int(steepest.stats["steps"] + steepest.stats["rejected_steps"])
    # What locates the end within its step is not counted.
    assert int(steepest.stats["hessian_vector_products"]) == 2 + attempts
    assert int(steepest.stats["gradient_evaluations"]) == 3 + 6 * attempts
    assert int(half.stats["hessian_vector_products"]) == 0
    assert int(half.stats["gradient_evaluations"]) == 3 + 6 * int(half.stats["steps"] + half.stats["rejected_steps"])


def test_until_loss_ends_at_that_loss_and_until_time_at_that_time():
    task, net = linear_task(), sj.scale_layers(sj.MLP([3, 8, 1], "gelu", key=NET_KEY), 0.1)
    flow = sj.gradient_flow(net, task, sj.Loss(0.05))
    assert flow.status == sj.Status.loss_reached
    assert float(flow.losses[-1]) == pytest.approx(0.05, rel=1e-3)
    assert jnp.isnan(flow.escape_time)
    again = sj.gradient_flow(net, task, sj.Time(flow.times[-1]))
    assert again.status == sj.Status.time_reached
    assert float(again.times[-1]) == pytest.approx(float(flow.times[-1]), rel=1e-5)
    assert float(again.losses[-1]) == pytest.approx(0.05, rel=1e-3)


# Records


def test_rows_are_functions_of_the_saved_weights():
    task, net = teacher(), network(3, "gelu", 1e-2)
    flow = sj.gradient_flow(net, task, save=sj.Save(weights=True))
    rows = int(flow.stats["steps"]) + 1
    assert flow.times[0] == 0
    assert flow.losses.shape == (rows,)
    assert bool(jnp.all(jnp.diff(flow.log_times[1:]) > 0))
    assert bool(jnp.all(jnp.diff(flow.losses) <= 1e-10))
    for row in (0, rows // 2, rows - 1):
        weights = [w[row] for w in flow.weights]
        norms = jnp.array([jnp.linalg.norm(w) for w in weights])
        np.testing.assert_allclose(flow.layer_norms[row], norms, rtol=1e-10)
        np.testing.assert_allclose(flow.imbalance[row], norms[1:] ** 2 - norms[:-1] ** 2, rtol=1e-9, atol=1e-10)
        for layer, w in enumerate(weights):
            np.testing.assert_allclose(flow.singular_values[layer][row], jnp.linalg.svd(w)[1], rtol=1e-8, atol=1e-10)
        out = jax.vmap(net.with_weights(weights))(task.x)
        slopes = jax.grad(lambda w: 0.5 * jnp.mean((jax.vmap(net.with_weights(w))(task.x) - task.y) ** 2))(weights)
        size = jnp.sqrt(sum(jnp.sum(g**2) for g in slopes))
        np.testing.assert_allclose(flow.gradient_norms[row], size, rtol=1e-10)
        np.testing.assert_allclose(flow.losses[row], 0.5 * jnp.mean((out - task.y) ** 2), rtol=1e-10)
    np.testing.assert_array_equal(flow.steps, [*range(rows - 1), rows - 1])
    for end, last in zip(flow.net.weights, flow.weights, strict=True):
        np.testing.assert_allclose(end, last[-1], rtol=1e-10)


def test_rows_at_times_agree_with_flows_to_those_times():
    task, net = teacher(), network(3, "tanh", 1e-2)
    times = jnp.array([0.01, 10.0, 300.0, 900.0])
    flow = sj.gradient_flow(net, task, sj.Time(1000.0), rtol=1e-7, save=sj.Save(times=times))
    np.testing.assert_allclose(flow.times, times, rtol=1e-6)
    for time, loss in zip(times, flow.losses, strict=True):
        alone = sj.gradient_flow(net, task, sj.Time(time), rtol=1e-7)
        np.testing.assert_allclose(loss, alone.losses[-1], rtol=1e-6)


def test_imbalance_is_conserved_for_homogeneous_and_follows_the_identity_for_others():
    task = teacher()
    for activation in ("identity", "leaky_relu", "tanh", "softsign"):
        flow = sj.gradient_flow(network(3, activation, 0.1), task, HALF)
        assert float(flow.imbalance_error) < 1e-2
    coarse = sj.gradient_flow(network(3, "tanh", 0.1), task, sj.Loss(0.02), rtol=1e-3)
    fine = sj.gradient_flow(network(3, "tanh", 0.1), task, sj.Loss(0.02), rtol=1e-8)
    assert float(fine.imbalance_error) < 1e-6 < float(coarse.imbalance_error)
    # The imbalance itself does move: without the identity's right-hand side the residual would be large.
    drift = jnp.abs(fine.imbalance[-1] - fine.imbalance[0]) / jnp.sum(fine.layer_norms[-1] ** 2)
    assert float(jnp.max(drift)) > 1e-3


# Transformations


def test_derivatives_agree_in_both_modes_and_with_differences():
    task, net = teacher(), network(3, "tanh", 1.0, width=8)

    def escape(log_scale):
        return sj.gradient_flow(sj.scale_layers(net, jnp.exp(log_scale)), task, rtol=1e-7, save=SMALL).log_escape_time

    at, step = jnp.log(3e-3), 1e-3
    forward = jax.jvp(escape, (at,), (jnp.ones_like(at),))[1]
    reverse = jax.grad(escape)(at)
    difference = (escape(at + step) - escape(at - step)) / (2 * step)
    assert float(forward) == pytest.approx(float(reverse), rel=1e-8)
    assert float(forward) == pytest.approx(float(difference), abs=1e-5)


def test_gradient_with_respect_to_data_through_a_saved_flow():
    task, net = linear_task(), sj.scale_layers(sj.MLP([3, 5, 5, 1], "tanh", key=NET_KEY), 0.1)

    def escape(size):
        return sj.gradient_flow(net, sj.Task(task.x, size * task.y), HALF, rtol=1e-7).log_escape_time

    slope = jax.grad(escape)(1.3)
    assert float(slope) == pytest.approx(float((escape(1.3 + 1e-4) - escape(1.3 - 1e-4)) / 2e-4), rel=1e-4)


def test_a_batch_equals_its_lanes():
    task = teacher()
    keys, scales = jax.random.split(NET_KEY, 3), jnp.array([1e-1, 1e-2, 1e-4])

    def run(key, scale):
        return sj.gradient_flow(sj.scale_layers(sj.MLP([10, 8, 8, 1], "relu", key=key), scale), task, save=SMALL)

    batch = jax.jit(jax.vmap(run))(keys, scales)
    for lane in range(3):
        alone = run(keys[lane], scales[lane])
        np.testing.assert_allclose(batch.log_escape_time[lane], alone.log_escape_time, rtol=1e-6)
        assert abs(int(batch.stats["steps"][lane]) - int(alone.stats["steps"])) <= 1


def test_nothing_recompiles_when_only_values_change():
    # The solver's vector field is traced once a compilation: count the traces of the loss inside of it.
    traces = 0

    def counted(prediction, target):
        nonlocal traces
        traces += 1
        return 0.5 * jnp.sum((prediction - target) ** 2)

    x = teacher().x

    def run(seed, scale, rtol, fraction):
        net = sj.scale_layers(sj.MLP([10, 7, 7, 1], "tanh", key=jax.random.key(seed)), scale)
        task = sj.Task(x * (1 + 0.01 * seed), jnp.sin(x[:, :1]), loss=counted)
        return sj.gradient_flow(net, task, sj.Escape(loss_fraction=fraction), rtol=rtol, save=SMALL)

    run(0, 1e-2, 1e-4, 0.5)
    compiled = traces
    for arguments in ((1, 1e-2, 1e-4, 0.5), (1, 1e-5, 1e-4, 0.5), (1, 1e-5, 1e-3, 0.5), (1, 1e-5, 1e-3, 0.6)):
        run(*arguments)
    assert compiled > 0
    assert traces == compiled


# Precision


@pytest.mark.parametrize(("activation", "depth", "scale"), [("tanh", 6, 1e-6), ("relu", 4, 1e-6), ("gelu", 6, 1e-3)])
def test_single_precision_reaches_the_same_times(activation, depth, scale):
    task, net = teacher(), network(depth, activation, scale)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), net)
    flow = sj.gradient_flow(single, task.astype(jnp.float32), save=SMALL)
    assert flow.losses.dtype == jnp.float32
    assert flow.status == sj.Status.escaped
    reference = sj.gradient_flow(net, task, save=SMALL)
    assert abs(np.expm1(float(flow.log_escape_time) - float(reference.log_escape_time))) < 0.01


def test_single_precision_says_where_it_underflows():
    task = teacher().astype(jnp.float32)
    for depth in (8, 10):
        net = jax.tree.map(lambda a: a.astype(jnp.float32), network(depth, "tanh", 1e-6))
        flow = sj.gradient_flow(net, task, save=SMALL)
        assert flow.status == sj.Status.underflow
        assert jnp.isnan(flow.escape_time)


def test_mixed_precision_is_computed_in_the_wider_one():
    net = jax.tree.map(lambda a: a.astype(jnp.float32), network(3, "tanh", 1e-2))
    assert sj.gradient_flow(net, teacher(), HALF, save=SMALL).losses.dtype == jnp.float64


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"until": 5.0}, "until must be"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"rtol": 2.0}, "rtol must be below one"),
        ({"max_steps": 0}, "max_steps must be"),
        ({"solver": "tsit5"}, "solver must be"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        sj.gradient_flow(network(3, "tanh", 1e-2), teacher(), **arguments)


def test_bad_targets_and_records_are_named():
    for call, words in (
        (lambda: sj.Escape(loss_fraction=1.5), "loss_fraction must lie between 0 and 1"),
        (lambda: sj.Time(-1.0), "time must be positive"),
        (lambda: sj.Loss(float("nan")), "value must be finite"),
        (lambda: sj.Save(times=[2.0, 1.0]), "times must increase"),
        (lambda: sj.Save(times=[]), "times must be a non-empty list"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"model must map one sample of shape \(10,\) to an output"):
        sj.gradient_flow(sj.MLP([9, 4, 1], key=NET_KEY), teacher())
    with pytest.raises(ValueError, match=r"model must return an array of shape \(1,\) for one sample"):
        sj.gradient_flow(sj.MLP([10, 4, 2], key=NET_KEY), teacher())
    net = network(3, "tanh", 1e-2)
    with pytest.raises(ValueError, match=r"model.weights\[0\] must be finite"):
        sj.gradient_flow(net.with_weights([net.weights[0] * jnp.nan, *net.weights[1:]]), teacher())


def test_activation_away_from_zero_warns_that_the_origin_is_no_saddle():
    with pytest.warns(UserWarning, match="the origin is then no saddle"):
        sj.gradient_flow(network(2, "sigmoid", 1e-2, width=4), teacher(), max_steps=20)


def test_the_summary_tells_outcome_time_and_work():
    flow = sj.gradient_flow(network(2, "tanh", 1e-2, width=4), teacher())
    text = str(flow)
    for words in ("escaped", "escape time", "layer norms", "imbalance error", "gradient evaluations", "Tsit5"):
        assert words in text
