"""Gradient descent against plain loops, closed forms and the identity it discretises."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import saddlejax as sj
from saddlejax.objective import task_loss

TASK = sj.tasks.single_index(jnp.tanh, in_size=4, samples=30, key=jax.random.key(0))
NET = sj.scale_layers(sj.MLP([4, 6, 5, 1], activation="tanh", key=jax.random.key(1)), 0.5)


def plain_loop(net, task, optimiser, steps):
    """The textbook loop: every net, every gradient."""
    memory, nets, gradients = optimiser.init(net.weights), [net], []
    slope = jax.jit(lambda net: jax.grad(lambda w: task_loss(net.with_weights(w), task))(net.weights))
    for _ in range(steps):
        gradients.append(slope(net))
        updates, memory = optimiser.update(gradients[-1], memory, net.weights)
        net = net.with_weights(optax.apply_updates(net.weights, updates))
        nets.append(net)
    return nets, gradients


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "schedule"])
def test_equals_a_plain_loop(name):
    optimiser = {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.05, momentum=0.9),
        "adam": optax.adam(1e-2),
        "schedule": optax.sgd(optax.linear_schedule(0.2, 0.05, 20)),
    }[name]
    record = sj.gradient_descent(NET, TASK, optimiser, 23, every=5)
    nets, _ = plain_loop(NET, TASK, optimiser, 23)
    # 23 steps are four whole intervals and a rest.
    np.testing.assert_array_equal(record.steps, [0, 5, 10, 15, 20, 23])
    rows = [nets[k] for k in record.steps]
    # optax computes schedules in single precision.
    rtol = 1e-4 if name == "schedule" else 1e-8
    chex.assert_trees_all_close(record.net.weights, nets[-1].weights, rtol=rtol)
    np.testing.assert_allclose(record.losses, [task_loss(n, TASK) for n in rows], rtol=rtol)
    np.testing.assert_allclose(record.imbalance, [sj.imbalance(n) for n in rows], rtol=rtol, atol=rtol)
    np.testing.assert_allclose(record.layer_norms, [[np.linalg.norm(w) for w in n.weights] for n in rows], rtol=rtol)
    for layer, values in enumerate(record.singular_values):
        expected = [np.linalg.svd(n.weights[layer], compute_uv=False) for n in rows]
        np.testing.assert_allclose(values, expected, rtol=10 * rtol)
    assert (int(record.stats["steps"]), int(record.stats["gradient_evaluations"])) == (23, 23 + 6)
    assert record.status != sj.Status.non_finite


def test_flow_time_of_sgd_is_its_learning_rate():
    record = sj.gradient_descent(NET, TASK, optax.sgd(0.1), 12, every=4)
    np.testing.assert_allclose(record.times, 0.1 * record.steps, rtol=1e-10)
    np.testing.assert_allclose(record.log_times[1:], np.log(record.times[1:]))
    schedule = optax.linear_schedule(0.2, 0.05, 10)
    scheduled = sj.gradient_descent(NET, TASK, optax.sgd(schedule), 12, every=4)
    expected = np.cumsum([0, *(schedule(k) for k in range(12))])[::4]
    np.testing.assert_allclose(scheduled.times, expected, rtol=1e-4)


def test_flow_time_of_momentum_on_a_plateau():
    small = sj.scale_layers(NET, 1e-2)
    record = sj.gradient_descent(small, TASK, optax.sgd(1e-3, momentum=0.9), 400, every=100)
    np.testing.assert_allclose(np.diff(record.times)[1:], 100 * 1e-3 / (1 - 0.9), rtol=1e-3)
    assert "the imbalance error is their departure from gradient flow" in str(record)


def test_sgd_leaves_the_identity_by_the_squares_of_its_steps():
    rate, steps = 0.1, 15
    record = sj.gradient_descent(NET, TASK, optax.sgd(rate), steps, every=1)
    _, gradients = plain_loop(NET, TASK, optax.sgd(rate), steps)
    squares = np.array([[np.sum(np.square(g)) for g in at] for at in gradients])
    drift = np.cumsum(rate**2 * np.diff(squares, axis=1), axis=0)
    sizes = record.layer_norms[1:] ** 2
    expected = np.abs(drift) / (sizes[:, 1:] + sizes[:, :-1])
    np.testing.assert_allclose(jnp.abs(record.imbalance_residual[1:]), expected, rtol=1e-6, atol=1e-10)


def test_the_departure_from_the_identity_is_first_order_in_the_learning_rate():
    errors = [sj.gradient_descent(NET, TASK, optax.sgd(0.1 / n), 100 * n).imbalance_error for n in (1, 2, 4)]
    order = -np.polyfit(np.log([1, 2, 4]), np.log(errors), 1)[0]
    assert order == pytest.approx(1, abs=0.1)
    adam = sj.gradient_descent(NET, TASK, optax.adam(1e-2), 200).imbalance_error
    assert adam > 10 * errors[0]


def test_escape_in_closed_form():
    # f = w₂w₁x with w₁ = w₂ = √u: du/dt = 2u(1 − u), ‖∇𝓛‖ = √(2u) (1 − u), largest at u = 1/3.
    task = sj.Task(np.ones((1, 1)), np.ones((1, 1)))
    start = 1e-3
    net = sj.MLP.from_weights([[[start]], [[start]]], "identity")
    odds = start**2 / (1 - start**2)
    expected = 0.5 * np.log(0.5 / odds)
    record = sj.gradient_descent(net, task, optax.sgd(1e-3), 12_000)
    assert record.status == sj.Status.escaped
    assert record.escape_time == pytest.approx(expected, rel=1e-3)
    assert record.log_escape_time == pytest.approx(np.log(expected), abs=1e-3)
    assert record.stats["escape_step"] == pytest.approx(expected / 1e-3, rel=1e-3)
    assert sj.gradient_descent(net, task, optax.sgd(1e-3), 3000).status == sj.Status.steps_taken


@pytest.mark.parametrize("scale", [1e-2, 1e-4])
def test_optimisers_that_do_not_wait_leave_no_plateau(scale):
    # Modes 5, 2, 1, ½ of a linear teacher. Under Muon singular values grow by the learning rate a step, whatever the
    # gradient: mode k is done after about √s_k/η steps, and nothing depends on the scale. The flow waits like log 1/ε.
    task, rate = sj.tasks.linear_teacher([5.0, 2.0, 1.0, 0.5], in_size=8), 0.01
    net = sj.scale_layers(sj.MLP([8, 8, 4], "identity", key=jax.random.key(0)), scale)
    muon = sj.gradient_descent(net, task, optax.contrib.muon(rate), 600)
    assert muon.status == sj.Status.no_plateau
    assert muon.stats["escape_step"] == -1 and np.isnan(muon.escape_time)
    # ‖∇𝓛‖ is largest while the first modes are being learned.
    assert np.sqrt(0.5) / rate < muon.stats["peak_step"] < np.sqrt(5) / rate
    assert muon.losses[-1] < 0.01 * muon.losses[0]
    adam = sj.gradient_descent(net, task, optax.adam(rate), 600)
    assert adam.status == sj.Status.no_plateau and adam.stats["peak_step"] > 0
    flow = sj.gradient_flow(net, task, save=sj.Save(steps=False, singular_values=False))
    plain = sj.gradient_descent(net, task, optax.sgd(0.02), 600)
    assert plain.status == sj.Status.escaped
    assert plain.escape_time == pytest.approx(float(flow.escape_time), rel=0.1)
    assert plain.stats["peak_step"] == plain.stats["escape_step"]


@pytest.mark.parametrize(("momentum", "batch_size"), [(0.9, None), (None, 10)])
def test_optimisers_that_wait_do(momentum, batch_size):
    small = sj.scale_layers(NET, 0.1)
    optimiser = optax.sgd(0.01, momentum=momentum)
    key = None if batch_size is None else jax.random.key(0)
    run = sj.gradient_descent(small, TASK, optimiser, 5000, every=10, batch_size=batch_size, key=key)
    flow = sj.gradient_flow(small, TASK, save=sj.Save(steps=False, singular_values=False))
    steps = float(flow.escape_time) / 0.01 * (1 - (momentum or 0))
    assert run.status == sj.Status.escaped
    # Momentum starts, and ends, by a few times 1/(1 − m) steps later.
    late = 80 if momentum else 0
    assert abs(float(run.stats["escape_step"]) - steps - late / 2) < 0.1 * steps + late / 2


def test_a_gradient_that_only_falls_is_no_escape():
    task = sj.Task(np.ones((1, 1)), np.ones((1, 1)))
    record = sj.gradient_descent(sj.MLP.from_weights([[[0.0]]]), task, optax.sgd(0.1), 100)
    assert record.status == sj.Status.steps_taken and record.stats["escape_step"] == -1 and np.isnan(record.escape_time)
    assert record.imbalance.shape == (101, 0)


def test_minibatches_go_through_the_data():
    # For f = w x and c = −w·x + … linear in w, a step of SGD adds the mean of the batch: one pass adds all.
    x = np.eye(7)
    task = sj.Task(x, np.zeros((7, 1)), lambda prediction, target: -prediction[0])
    net = sj.MLP.from_weights([np.zeros((1, 7))])
    record = sj.gradient_descent(net, task, optax.sgd(1.0), 3, batch_size=2, key=jax.random.key(0))
    seen = np.asarray(record.net.weights[0][0])
    np.testing.assert_allclose(np.sort(seen), [0, *[0.5] * 6])
    longer = sj.gradient_descent(net, task, optax.sgd(1.0), 300, batch_size=2, key=jax.random.key(0)).net.weights[0]
    assert longer.sum() == pytest.approx(300) and longer.min() > 30 and len(np.unique(longer)) > 1
    whole = sj.gradient_descent(NET, TASK, optax.sgd(0.1), 20, batch_size=30, key=jax.random.key(0))
    full = sj.gradient_descent(NET, TASK, optax.sgd(0.1), 20)
    chex.assert_trees_all_close(whole.net.weights, full.net.weights, rtol=1e-8)


def test_minibatches_depend_on_the_key_only():
    optimiser = optax.sgd(0.1)
    runs = [sj.gradient_descent(NET, TASK, optimiser, 30, batch_size=5, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    # The same program with the same inputs: equal to the last bit.
    np.testing.assert_array_equal(runs[0].losses, runs[1].losses)
    assert np.max(np.abs(runs[0].losses - runs[2].losses)) > 1e-6
    # The rates are those of each batch, so what is left is discretisation, as for the full batch.
    assert runs[0].imbalance_error < 0.05


def test_batches_of_networks_equal_loops_without_compiling_again():
    optimiser, traces = optax.sgd(0.1), []

    def counted(prediction, target):
        traces.append(None)
        return sj.mse(prediction, target)

    task = sj.Task(TASK.x, TASK.y, counted)
    nets = [sj.scale_layers(NET, scale) for scale in (1.0, 0.5, 0.1)]
    alone = [sj.gradient_descent(net, task, optimiser, 40) for net in nets[:1]]
    count = len(traces)
    alone += [sj.gradient_descent(net, task, optimiser, 40) for net in nets[1:]]
    assert len(traces) == count
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)
    together = jax.vmap(lambda net: sj.gradient_descent(net, task, optimiser, 40))(stacked)
    for field in ("losses", "times", "imbalance", "escape_time"):
        expected = np.stack([getattr(record, field) for record in alone])
        np.testing.assert_allclose(getattr(together, field), expected, rtol=1e-9)


def test_the_end_can_be_differentiated():
    optimiser = optax.sgd(0.1)

    def final_loss(scale):
        net = NET.with_weights([scale * w for w in NET.weights])
        return sj.gradient_descent(net, TASK, optimiser, 30, every=10).losses[-1]

    step = 1e-5
    central = (final_loss(1 + step) - final_loss(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(final_loss)(1.0), central, rtol=1e-7)


def test_single_precision():
    single = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)  # noqa: E731
    record = sj.gradient_descent(single(NET), single(TASK), optax.adam(1e-2), 40)
    double = sj.gradient_descent(NET, TASK, optax.adam(1e-2), 40)
    assert {a.dtype for a in (record.times, record.losses, record.imbalance_residual)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(record.losses, double.losses, rtol=1e-4)
    # Time summed step by step would have lost more than this by now.
    tiny = sj.gradient_descent(single(NET), single(TASK), optax.sgd(1e-4), 40_000, every=200)
    assert abs(tiny.times[-1] - 4) < 0.5 * abs(np.cumsum(np.full(40_000, 1e-4, np.float32))[-1] - 4)


def test_other_optimisers_and_failures():
    searched = sj.gradient_descent(NET, TASK, optax.lbfgs(), 15)
    assert searched.losses[-1] < 1e-2 * searched.losses[0]
    diverged = sj.gradient_descent(NET, TASK, optax.sgd(1e200), 5)
    assert diverged.status == sj.Status.non_finite


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimiser": 0.1}, "optimiser must be an optax optimiser"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"every": 0}, "every must be a whole number"),
        ({"batch_size": 31, "key": jax.random.key(0)}, "batch_size must be at most the 30 samples"),
        ({"batch_size": 5}, "key must be a JAX random key"),
        ({"task": sj.Task(np.ones((2, 9)), np.ones((2, 1)))}, "model must map one sample of shape"),
        (
            {
                "task": sj.Task(np.ones((2, 4)), np.ones((2, 1)), sample_weights=[0.5, 0.5]),
                "batch_size": 1,
                "key": jax.random.key(0),
            },
            "batch_size must be left out",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    good = {"model": NET, "task": TASK, "optimiser": optax.sgd(0.1), "steps": 10}
    with pytest.raises(ValueError, match=message):
        sj.gradient_descent(**(good | arguments))
