"""Escape times against tight tolerances, against an independent integrator, and against gradient descent."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import HALF, SMALL, network, teacher
from scipy.integrate import solve_ivp

import saddlejax as sj


def relative(log_time, reference):
    return abs(np.expm1(float(log_time) - float(reference)))


def plain_loss(weights, x, y, activation):
    h = x
    for w in weights[:-1]:
        h = activation(h @ w.T)
    return 0.5 * jnp.mean(jnp.sum((h @ weights[-1].T - y) ** 2, axis=-1))


@pytest.mark.parametrize(("activation", "depth"), [("tanh", 2), ("gelu", 3), ("tanh", 5), ("gelu", 8), ("tanh", 8)])
def test_default_tolerance_is_within_a_thousandth_of_a_tight_one(activation, depth):
    task = teacher()
    for scale in (1e-1, 1e-3, 1e-6):
        net = network(depth, activation, scale)
        default = sj.gradient_flow(net, task, HALF, save=SMALL)
        tight = sj.gradient_flow(net, task, HALF, rtol=1e-9, save=SMALL)
        assert default.status == sj.Status.escaped
        assert tight.status == sj.Status.escaped
        assert relative(default.log_escape_time, tight.log_escape_time) < 1e-3


def test_no_scale_is_an_outlier_on_a_balanced_chain():
    # On one number a layer the certificate of the imbalance is blind, so that only the tolerance protects the time.
    chain, task = sj.manifold.chain([1.0] * 3, lambda g: g, "tanh", 50)
    for scale in np.geomspace(1e-4, 1e-2, 25):
        net = sj.scale_layers(chain, scale)
        default, tight = (sj.gradient_flow(net, task, save=SMALL, rtol=rtol) for rtol in (1e-4, 1e-8))
        assert relative(default.log_escape_time, tight.log_escape_time) < 1e-3


def fixed_step_escape(weights, x, y, activation, step, fraction=0.5):
    """Runge-Kutta of order 4 with fixed steps, in a clock of its own (`dt/ds = ‖θ‖/‖∇𝓛‖`), by plain JAX."""
    plateau = plain_loss([0 * w for w in weights], x, y, activation)

    def rate(weights):
        loss, grads = jax.value_and_grad(plain_loss)(weights, x, y, activation)
        tau = jnp.sqrt(sum(jnp.sum(w**2) for w in weights) / sum(jnp.sum(g**2) for g in grads))
        return [-tau * g for g in grads], tau, loss

    def advance(carry):
        w, t, _, _, old, _ = carry

        def move(k, a):
            return [p + a * step * q for p, q in zip(w, k, strict=True)]

        k1, t1, _ = rate(w)
        k2, t2, _ = rate(move(k1, 0.5))
        k3, t3, _ = rate(move(k2, 0.5))
        k4, t4, _ = rate(move(k3, 1.0))
        new = [p + step / 6 * (a + 2 * b + 2 * c + d) for p, a, b, c, d in zip(w, k1, k2, k3, k4, strict=True)]
        return new, t + step / 6 * (t1 + 2 * t2 + 2 * t3 + t4), t, old, plain_loss(new, x, y, activation), 0

    first = plain_loss(weights, x, y, activation)
    start = (weights, jnp.zeros(()), jnp.zeros(()), first, first, 0)
    run = jax.jit(lambda c: jax.lax.while_loop(lambda c: c[4] > fraction * plateau, advance, c))
    _, after, before, loss_before, loss_after, _ = run(start)
    share = (loss_before - fraction * plateau) / (loss_before - loss_after)
    return jnp.log(before + share * (after - before))


@pytest.mark.parametrize(("depth", "scale"), [(2, 1e-4), (3, 1e-3), (3, 1e-1), (6, 1e-6), (8, 1e-4)])
def test_relu_default_agrees_with_small_fixed_steps(depth, scale):
    task, net = teacher(), network(depth, "relu", scale)
    flow = sj.gradient_flow(net, task, HALF, save=SMALL)
    reference = fixed_step_escape(list(net.weights), task.x, task.y, jax.nn.relu, 2e-3)
    assert relative(flow.log_escape_time, reference) < 2e-3
    assert int(flow.stats["gradient_evaluations"]) <= 250


def test_escape_time_agrees_with_scipy():
    task, net = teacher(), network(3, "tanh", 0.05, width=8)
    flow = sj.gradient_flow(net, task, HALF, rtol=1e-9, save=SMALL)
    shapes = [w.shape for w in net.weights]
    x, y = np.asarray(task.x), np.asarray(task.y)

    def split(theta):
        parts = np.split(theta, np.cumsum([a * b for a, b in shapes])[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def forward(theta):
        hs = [x]
        for w in split(theta)[:-1]:
            hs.append(np.tanh(hs[-1] @ w.T))
        return hs, hs[-1] @ split(theta)[-1].T

    def velocity(t, theta):
        hs, out = forward(theta)
        weights, delta, grads = split(theta), (out - y) / len(x), []
        for layer in reversed(range(3)):
            grads.append(delta.T @ hs[layer])
            delta = (delta @ weights[layer]) * (1 - hs[layer] ** 2) if layer else delta
        return -np.concatenate([g.ravel() for g in reversed(grads)])

    def half(t, theta):
        return 0.5 * np.mean((forward(theta)[1] - y) ** 2) - 0.25 * np.mean(y**2)

    half.terminal = True
    theta = np.concatenate([np.asarray(w).ravel() for w in net.weights])
    solution = solve_ivp(velocity, (0, 1e6), theta, method="LSODA", rtol=1e-10, atol=1e-13, events=half)
    assert solution.t_events[0].size == 1
    assert float(flow.escape_time) == pytest.approx(solution.t_events[0][0], rel=1e-6)


def test_gradient_descent_approaches_the_flow_at_first_order():
    task, net = teacher(), network(3, "tanh", 0.1)
    flow = sj.gradient_flow(net, task, HALF, save=SMALL)
    half = 0.5 * plain_loss([0 * w for w in net.weights], task.x, task.y, jnp.tanh)

    @jax.jit
    def descend(rate):
        def step(w):
            return [p - rate * g for p, g in zip(w, jax.grad(plain_loss)(w, task.x, task.y, jnp.tanh), strict=True)]

        def loss(w):
            return plain_loss(w, task.x, task.y, jnp.tanh)

        def body(c):
            return (step(c[0]), c[1] + 1, loss(c[0]))

        weights, steps, before = jax.lax.while_loop(lambda c: loss(c[0]) > half, body, (list(net.weights), 0, jnp.inf))
        return rate * (steps - 1 + (before - half) / (before - loss(weights)))

    rates = np.array([0.4, 0.2, 0.1, 0.05])
    errors = np.array([float(descend(rate)) for rate in rates]) / float(flow.escape_time) - 1
    assert np.all(np.abs(errors) < 0.2 * rates)
    order = np.polyfit(np.log(rates), np.log(np.abs(errors)), 1)[0]
    assert order == pytest.approx(1, abs=0.1)


def test_error_falls_with_the_tolerance_at_the_order_of_the_solver():
    task, net = teacher(), network(4, "tanh", 1e-2)
    reference = sj.gradient_flow(net, task, HALF, rtol=1e-11, save=SMALL, solver=dfx.Dopri8())
    tolerances = np.array([1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
    flows = [sj.gradient_flow(net, task, HALF, rtol=rtol, save=SMALL) for rtol in tolerances]
    errors = [relative(flow.log_escape_time, reference.log_escape_time) for flow in flows]
    # The error of a step is kept at the tolerance, so the error of the whole is nearly proportional to it.
    assert np.polyfit(np.log(tolerances), np.log(errors), 1)[0] == pytest.approx(1, abs=0.3)
    certificates = [float(flow.imbalance_error) for flow in flows]
    assert np.all(np.diff(certificates) < 0)


def test_escape_is_the_first_maximum_of_the_gradient_norm():
    task, net = teacher(), network(3, "tanh", 1e-2)
    flow = sj.gradient_flow(net, task)
    times = float(flow.escape_time) * np.linspace(0.98, 1.02, 81)
    rows = sj.gradient_flow(net, task, sj.Time(times[-1] * 1.0001), rtol=1e-7, save=sj.Save(times=times, weights=True))

    def norm(w):
        return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.grad(plain_loss)(list(w), task.x, task.y, jnp.tanh)))

    norms = np.asarray(jax.vmap(norm)(rows.weights))
    assert norms.shape == (81,)
    assert times[np.argmax(norms)] == pytest.approx(float(flow.escape_time), rel=1e-3)


def test_exact_solution_of_two_linear_layers():
    # One mode of singular value S from a balanced start: u(t) = S e^{2St} / (e^{2St} − 1 + S/u0) (Saxe et al.).
    strength, start = 2.0, 1e-4
    task = sj.tasks.linear_teacher([strength], in_size=1)
    net = sj.MLP.from_weights([jnp.full((1, 1), jnp.sqrt(start))] * 2, "identity")
    times = jnp.linspace(0.1, 6, 25)
    flow = sj.gradient_flow(net, task, sj.Time(6.5), rtol=1e-8, save=sj.Save(times=times))
    growth = jnp.exp(2 * strength * times)
    mode = strength * growth / (growth - 1 + strength / start)
    np.testing.assert_allclose(flow.losses, 0.5 * (strength - mode) ** 2, rtol=1e-5)
    np.testing.assert_allclose(flow.layer_norms[:, 0] ** 2, mode, rtol=1e-6)
    assert float(flow.imbalance_error) < 1e-10


def test_escape_of_the_linear_chain_in_closed_form():
    # y' = y^{L−1}(S − y^L): the gradient norm √L y^{L−1}(S − y^L) is largest at y^L = (L−1) S/(2L−1).
    depth, strength, start = 3, 1.0, 1e-3
    task = sj.tasks.linear_teacher([strength], in_size=1)
    net = sj.MLP.from_weights([jnp.full((1, 1), start)] * depth, "identity")
    flow = sj.gradient_flow(net, task, rtol=1e-8)
    end = ((depth - 1) * strength / (2 * depth - 1)) ** (1 / depth)
    y = jnp.linspace(jnp.log(start), jnp.log(end), 200_001)
    time = jnp.trapezoid(jnp.exp(y) / (jnp.exp(y * (depth - 1)) * (strength - jnp.exp(y * depth))), y)
    assert float(flow.escape_time) == pytest.approx(float(time), rel=1e-6)
    np.testing.assert_allclose([w[0, 0] for w in flow.net.weights], end, rtol=1e-4)


def test_slow_problem_ends_with_an_outcome():
    flow = sj.gradient_flow(network(3, "tanh", 1e-3), teacher(), HALF, max_steps=5)
    assert flow.status == sj.Status.step_limit
    assert jnp.isnan(flow.escape_time)
    assert flow.losses.size == 1 + int(flow.stats["steps"])


def test_cost_meets_its_budget_and_hardly_grows():
    task = teacher()
    cost = [
        int(
            sj.gradient_flow(network(6, "tanh", scale), task, HALF, rtol=1e-4, save=SMALL).stats["gradient_evaluations"]
        )
        for scale in (1e-6, 1e-7, 1e-8, 1e-10, 1e-12)
    ]
    assert cost[0] <= 115
    assert (cost[-1] - cost[0]) / 6 <= 12
