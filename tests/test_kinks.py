"""Flows that slide along kinks: closed forms, gradient descent, other implementations of the same model, and what is refused."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from scipy.optimize import lsq_linear

import saddlejax as sj
from saddlejax.flow.box_problem import solve_box
from saddlejax.flow.sides import sides_at
from saddlejax.flow.sliding_problem import SlidingProblem
from saddlejax.flow.units import KinkedUnits
from saddlejax.networks.kinks import kinks_of
from saddlejax.objective import as_problem

absolute = sj.kinked(jnp.abs)
relu = sj.kinked(jax.nn.relu)

KINKS = [
    (jax.nn.relu, [0], [0], [1]),
    (jnp.abs, [0], [-1], [1]),
    (jax.nn.leaky_relu, [0], [0.01], [1]),
    (jax.nn.hard_tanh, [-1, 1], [0, 1], [1, 0]),
    (jax.nn.relu6, [0, 6], [0, 1], [1, 0]),
    (lambda z: jnp.maximum(z, 0.3), [0.3], [0], [1]),
    (lambda z: jnp.abs(z - 2) + jnp.tanh(z), [2], [-1 + 1 / np.cosh(2) ** 2], [1 + 1 / np.cosh(2) ** 2]),
    (jnp.tanh, [], [], []),
    (lambda z: jnp.sqrt(jnp.abs(z)), [], [], []),
]


class Vee(eqx.Module):
    """`f = |u| + v`: with a target of −1 the flow runs into the kink of `|u|` and slides along it."""

    p: Array

    def __call__(self, x: Array) -> Array:
        return absolute(self.p[:1]) + self.p[1:] + 0 * x


VEE_START = np.array([0.5, 0.3])
VEE_ARRIVES = -0.5 * np.log(1 - 0.5 / 0.9)


def vee_at(time: float) -> np.ndarray:
    """The closed form: `d(u + v + 1)/dt = −2 (u + v + 1)` until `u = 0`, then `d(v + 1)/dt = −(v + 1)`."""
    if time <= VEE_ARRIVES:
        return VEE_START - 0.9 * (1 - np.exp(-2 * time))
    return np.array([0.0, -1 + 0.8 * np.exp(VEE_ARRIVES - time)])


def vee(dtype: type = np.float64) -> tuple[Vee, sj.Task]:
    """The model at its start, and its task."""
    return Vee(jnp.asarray(VEE_START, dtype)), sj.Task(jnp.ones((1, 1), dtype), -jnp.ones((1, 1), dtype))


def teacher() -> tuple[sj.Task, float]:
    """24 samples in three dimensions of a sum of three ReLUs, and two per cent of its loss at zero."""
    x = np.random.default_rng(0).standard_normal((24, 3))
    ramp = lambda z: np.maximum(z, 0)  # noqa: E731
    y = ramp(x @ [1, 0.2, 0]) - 0.8 * ramp(x @ [-0.3, 1, 0.4]) + 0.5 * ramp(x @ [0.1, -0.6, 1])
    return sj.Task(jnp.asarray(x), jnp.asarray(y)[:, None]), float(0.02 * np.mean(y**2) / 2)


def student(depth: int, seed: int) -> sj.MLP:
    """A ReLU network of width 8 from small weights."""
    net = sj.MLP([3, *[8] * (depth - 1), 1], "relu", key=jax.random.key(seed))
    return sj.scale_layers(net, 1e-2)


@pytest.mark.parametrize(("function", "places", "below", "above"), KINKS)
def test_kinks_of_known_functions(function, places, below, above):
    found = kinks_of(function)
    np.testing.assert_allclose(found.places, places, atol=1e-8)
    np.testing.assert_allclose(found.below, below, atol=1e-5)
    np.testing.assert_allclose(found.above, above, atol=1e-5)


def test_the_nearest_kink_counts():
    kinks = kinks_of(jax.nn.hard_tanh)
    z = jnp.array([-3.0, -0.2, 0.3, 2.0])
    np.testing.assert_allclose(kinks.distance(z), [-2, 0.8, -0.7, 1], atol=1e-8)
    np.testing.assert_allclose(kinks.jump(z), [1, 1, -1, -1], atol=1e-5)
    np.testing.assert_allclose(kinks.slope(z, jnp.full(4, 0.25)), [0.25, 0.25, 0.75, 0.75], atol=1e-5)


@pytest.mark.parametrize(("variables", "rank"), [(12, 40), (40, 25)])
def test_box_problem_agrees_with_scipy(variables, rank):
    """Full rank and singular matrices, badly scaled, with a variable that is held at zero."""
    solve = jax.jit(solve_box)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((variables, rank)) * np.exp(rng.standard_normal(variables))[:, None]
        goal, top = rng.standard_normal(rank), np.exp(rng.standard_normal(variables) - 1)
        top[3] = 0
        matrix, linear = rows @ rows.T, rows @ goal
        x = np.asarray(solve(matrix, linear, top))
        other = lsq_linear(rows.T, goal, (0 * top, np.maximum(top, 1e-300)), tol=1e-14, max_iter=1000).x
        value = lambda x, m=matrix, c=linear: 0.5 * x @ m @ x - c @ x  # noqa: E731
        assert np.all((x >= 0) & (x <= top))
        assert value(x) <= value(other) + 1e-10 * abs(value(other))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_box_problem_finds_small_shares_and_slopes_that_vanish_at_a_bound(dtype):
    solve = jax.jit(solve_box)
    matrix, top = np.zeros((100, 100), dtype), np.zeros(100, dtype)
    matrix[0, 0], top[0] = 0.94, 2e-3
    for share in (0.3, 4e-5):
        linear = np.zeros(100, dtype)
        linear[0] = share * matrix[0, 0] * top[0]
        np.testing.assert_allclose(solve(matrix, linear, top)[0] / top[0], share, rtol=1e-4)
    # At (0.4, 0) the slope along the second variable is zero.
    matrix, linear = np.array([[1, 0.5], [0.5, 1]], dtype), np.array([0.4, 0.2], dtype)
    found = solve(matrix, linear, np.ones(2, dtype))
    np.testing.assert_allclose(found, [0.4, 0], atol=100 * np.finfo(dtype).eps)


def test_units_that_slide_make_up_for_one_that_passes_through_its_kink():
    """With `dz/dt = r − K(σa)`: the first slides all the time, the second comes from above and leaves to below."""
    matrix, signal, free = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([1.0, 0.5]), np.array([0.9, -0.1])
    far, size = 0.02, 0.1

    def sliding(above: float) -> tuple[float, float]:
        """The share of the first with the second above or below, and the rate of the second."""
        share = (free[0] - matrix[0, 1] * signal[1] * above) / (matrix[0, 0] * signal[0])
        return share, free[1] - matrix[1] @ (signal * [share, above])

    (before, rate), (after, leaves) = sliding(1), sliding(0)
    part = -far / rate / size
    assert 0 < part < 1 and leaves < 0
    problem = SlidingProblem(
        units=jnp.arange(2),
        valid=jnp.array([True, True]),
        distance=jnp.array([0, far]),
        rate=jnp.array([0, rate]),
        signal=jnp.asarray(signal),
        common=jnp.asarray(signal),
        jacobian=jnp.linalg.cholesky(jnp.asarray(matrix)),
        free_rate=jnp.asarray(free),
        matrix=jnp.asarray(matrix),
        gradient=jnp.zeros(2),
        size=jnp.asarray(size),
    )
    mean, last = problem.solve(jnp.array([before, 1.0]))
    # Of the two rates at which the second may come the faster one counts: the other knows that the first makes up for it.
    faster = -far / (free[1] - matrix[1] @ (signal * [after, 1])) / size
    assert 0.7 * part < faster < part
    np.testing.assert_allclose(mean, [faster * before + (1 - faster) * after, faster], rtol=1e-9)
    np.testing.assert_allclose(problem.end(mean)[0], 0, atol=1e-12)
    # At its end only the first slides; its share is then that of a step that begins below.
    assert float(last[1]) == 0 and problem.slides(last).tolist() == [True, False]


def test_lower_units_at_kinks_put_upper_ones_on_different_sides():
    """The first layer has rank one, and two samples lie where all its units vanish: those of one sign rise when those of
    the other fall, and move the units above to other sides. Along the least element the loss falls as it says, and faster
    than along any gradient nearby.
    """
    rng = np.random.default_rng(29)
    across = rng.standard_normal(4)
    weights = [np.outer(rng.standard_normal(6), across), rng.standard_normal((6, 6)) / 2, rng.standard_normal((2, 6))]
    _, x = rng.standard_normal((2, 5, 4))
    x[:2] -= np.outer(x[:2] @ across, across) / (across @ across)
    task = sj.Task(x, rng.standard_normal((5, 2)))
    net = sj.MLP.from_weights([jnp.asarray(w) for w in weights], "relu")
    problem = as_problem(net, task, None)
    parameters = problem.parameters
    theta = parameters.shapes.join(parameters.arrays)
    units = KinkedUnits(parameters, problem.objective)
    _, least, sides = jax.jit(lambda theta: sides_at(units, theta, 64))(theta)
    assert jnp.max(jnp.abs(sides.forces)) > 1e-2

    loss = jax.jit(lambda theta: problem.objective.loss(units.model(theta)))
    size, step = float(jnp.linalg.norm(least)), 1e-7
    nearby = theta + 1e-9 * rng.standard_normal((400, theta.size))
    gradients = jax.jit(jax.vmap(jax.grad(loss)))(nearby)
    norms = jnp.linalg.norm(gradients, axis=1)
    falls = (loss(theta) - jax.vmap(loss)(theta - step * gradients / norms[:, None])) / step
    assert float(jnp.max(falls)) < size + 1e-4 * float(jnp.median(norms))
    np.testing.assert_allclose((loss(theta) - loss(theta - step * least)) / (step * size**2), 1, atol=1e-3)


def test_units_without_inputs_leave_room_for_those_that_slide():
    """Samples that are zero are at the kinks of all units; they only weaken the gradient of the others."""
    first = jnp.array([[0.0, 1.0], [1.0, 0.5], [0.3, -0.7]])
    net = sj.MLP.from_weights([first, jnp.array([[1.0, 0.5, 0.2]])], "relu")
    x, y = np.array([[1.0, 0.0], [0.2, 1.0], [-0.4, 0.9]]), np.array([[-1.0], [5.0], [2.0]])
    found = []
    for silent in (0, 50):
        task = sj.Task(np.concatenate([np.zeros((silent, 2)), x]), np.concatenate([np.zeros((silent, 1)), y]))
        problem = as_problem(net, task, None)
        parameters = problem.parameters
        theta = parameters.shapes.join(parameters.arrays)
        _, least, sides = sides_at(KinkedUnits(parameters, problem.objective), theta, 4)
        assert not np.any(sides.which[:silent])
        found.append((least * len(task.x), sides.which[silent:], sides.shares[silent, 0]))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-12)
    np.testing.assert_array_equal(found[1][1], found[0][1])
    # The unit that is at its kink on the first sample: the row of its pre-activation is that sample.
    assert bool(found[0][1][0, 0]) and 0 < float(found[0][2]) < 1
    assert abs(float(found[0][0][0])) < 1e-12


def test_the_first_plateau_has_a_finer_tolerance():
    """Errors of 1e-2 a step would shorten or lengthen it by half."""
    x = jax.random.normal(jax.random.key(0), (24, 3))
    task = sj.Task(x, jnp.maximum(x[:, :1] + 0.2 * x[:, 1:2], 0))
    net = sj.scale_layers(sj.MLP([3, 8, 8, 1], "relu", key=jax.random.key(1)), 1e-3)
    exact = sj.gradient_flow(net, task)
    rough = sj.gradient_flow(net, task, sj.Loss(float(exact.losses[-1])), rtol=1e-2, stiff=False)
    assert abs(float(rough.log_times[-1] - exact.log_times[-1])) < 5e-3


@pytest.mark.parametrize("stiff", [False, True])
def test_a_flow_that_slides_has_its_closed_form(stiff):
    net, task = vee()
    for time in (0.2, VEE_ARRIVES + 0.05, 2.0):
        flow = sj.gradient_flow(net, task, sj.Time(time), stiff=stiff)
        assert flow.status == sj.Status.time_reached
        np.testing.assert_allclose(flow.net.p, vee_at(time), atol=2e-4)
        assert int(flow.sliding[-1]) == (time > VEE_ARRIVES)
    assert int(flow.stats["box_problems"]) > 0 and int(flow.stats["unit_jacobians"]) > 0


def test_a_sliding_flow_converges_with_its_tolerance_and_in_single_precision():
    net, task = vee()
    errors = []
    for rtol in (1e-2, 1e-3, 1e-4):
        flow = sj.gradient_flow(net, task, sj.Time(1.0), rtol=rtol, stiff=False)
        errors.append(np.max(np.abs(np.asarray(flow.net.p) - vee_at(1.0))))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    single = sj.gradient_flow(*vee(np.float32), sj.Time(1.0), stiff=False)
    assert single.losses.dtype == jnp.float32
    np.testing.assert_allclose(single.net.p, vee_at(1.0), atol=3e-4)


def test_rows_at_times_slide_too():
    net, task = vee()
    times = np.array([0.2, 0.6, 1.0])
    flow = sj.gradient_flow(net, task, sj.Time(1.2), save=sj.Save(times, weights=True), stiff=False)
    np.testing.assert_allclose(flow.weights[0], [vee_at(t) for t in times], atol=2e-4)


def test_a_point_that_is_stationary_in_clarkes_sense_is_told_with_its_certificate():
    """With the target out of reach the flow ends at `u = 0`, where both one-sided gradients in `u` point to it."""

    class Only(eqx.Module):
        u: Array

        def __call__(self, x: Array) -> Array:
            return absolute(self.u) + 0 * x

    task = sj.Task(jnp.ones((1, 2)), -jnp.ones((1, 2)))
    flow = sj.gradient_flow(Only(jnp.array([0.5, 0.4])), task, sj.Loss(0.5))
    assert flow.status == sj.Status.stationary
    np.testing.assert_allclose(flow.net.u, [0, 0], atol=1e-6)
    np.testing.assert_allclose(flow.losses[-1], 1.0, atol=1e-6)
    assert float(flow.clarke_residual) < 1e-8
    one_sided = jax.grad(lambda u: 0.5 * jnp.sum(jnp.square(u + 1)))(jnp.zeros(2))
    np.testing.assert_allclose(one_sided, [1, 1])
    assert "slide" in str(flow)


@pytest.fixture(scope="module")
def followed() -> sj.Flow:
    """The flow of a network of two layers, in one kind of step."""
    task, target = teacher()
    return sj.gradient_flow(student(2, 1), task, sj.Loss(target), stiff=False)


def test_gradient_descent_extrapolated_to_learning_rate_zero_agrees(followed):
    task, target = teacher()
    net = student(2, 1)

    def loss(weights):
        h = task.x
        for w in weights[:-1]:
            h = jnp.maximum(h @ w.T, 0)
        return 0.5 * jnp.mean(jnp.sum((h @ weights[-1].T - task.y) ** 2, axis=1))

    @jax.jit
    def crossing(rate):
        def step(carry):
            weights, before, _, count = carry
            value, slopes = jax.value_and_grad(loss)(weights)
            weights = jax.tree.map(lambda w, g: w - rate * g, weights, slopes)
            return weights, value, before, count + 1

        start = (net.weights, jnp.inf, jnp.inf, 0)
        _, after, before, count = jax.lax.while_loop(lambda c: (c[1] > target) & (c[3] < 10**6), step, start)
        return rate * (count - 2 + (before - target) / (before - after))

    coarse, fine = (float(crossing(rate)) for rate in (4e-3, 2e-3))
    np.testing.assert_allclose(float(followed.times[-1]), 2 * fine - coarse, rtol=2e-3)
    assert followed.status == sj.Status.loss_reached
    assert int(followed.stats["gradient_evaluations"]) < 1500


def test_any_model_with_named_kinks_is_followed_the_same(followed):
    """As an attribute called neuron by neuron, and as a wrapped function of the module."""

    class Own(eqx.Module):
        first: Array
        second: Array

        def __call__(self, x: Array) -> Array:
            return self.second @ relu(self.first @ x)

    task, target = teacher()
    weights = student(2, 1).weights
    mlp = eqx.nn.MLP(3, 1, 8, 1, jax.nn.relu, use_bias=False, use_final_bias=False, key=jax.random.key(0))
    mlp = eqx.tree_at(lambda m: [layer.weight for layer in m.layers], mlp, weights)
    for model in (mlp, Own(*weights)):
        flow = sj.gradient_flow(model, task, sj.Loss(target), stiff=False)
        # Where units come to their kinks together, rounding decides which of two orders a step takes.
        np.testing.assert_allclose(flow.times[-1], followed.times[-1], rtol=5e-4)
        assert int(jnp.max(flow.sliding)) > 0


def test_batches_under_vmap_equal_single_flows(followed):
    task, target = teacher()
    nets = [student(2, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *nets)
    run = eqx.filter_vmap(
        lambda net: sj.gradient_flow(net, task, sj.Loss(target), save=sj.Save(steps=False), max_steps=512)
    )
    flows = run(stacked)
    assert np.all(np.asarray(flows.status == sj.Status.loss_reached))
    np.testing.assert_allclose(np.exp(flows.log_times[0, -1]), followed.times[-1], rtol=5e-4)


def test_the_solver_works_in_a_diffeqsolve_of_ones_own(followed):
    task, target = teacher()
    clock = sj.plateau_clock(student(2, 1), task)
    solution = dfx.diffeqsolve(
        clock.term,
        sj.SlidingSolver(),
        0.0,
        jnp.inf,
        None,
        clock.y0,
        args=clock.args,
        stepsize_controller=sj.PlateauController(2e-4, to_escape=False),
        event=clock.event(sj.Loss(target), rtol=2e-4),
        max_steps=2048,
        saveat=dfx.SaveAt(t1=True, solver_state=True),
    )
    end = jax.tree.map(lambda a: a[-1], solution.ys)
    np.testing.assert_allclose(jnp.exp(clock.log_time(end)), followed.times[-1], rtol=5e-4)
    assert solution.solver_state.sides.which.shape == (24, 8)


def test_derivatives_through_kinks_are_refused_and_those_to_the_escape_are_not():
    net, task = vee()
    with pytest.raises(NotImplementedError, match="slides along the kinks"):
        jax.grad(lambda p: sj.gradient_flow(Vee(p), task, sj.Time(1.0)).losses[-1])(net.p)
    task, _ = teacher()
    weights = student(2, 1).weights
    time = lambda w: sj.gradient_flow(sj.MLP.from_weights(w, "relu"), task).log_escape_time  # noqa: E731
    assert all(np.all(np.isfinite(g)) for g in jax.grad(time)(weights))


def test_kinks_within_jit_are_refused_in_words():
    class Inside(eqx.Module):
        w: Array

        def __call__(self, x: Array) -> Array:
            return jax.jit(lambda z: relu(z))(self.w * x)

    with pytest.raises(ValueError, match="outside of jax"):
        sj.gradient_flow(Inside(jnp.array([0.3])), sj.Task(jnp.ones((1, 1)), jnp.ones((1, 1))), sj.Loss(0.01))
    with pytest.raises(ValueError, match="elementwise"):
        sj.kinked(jax.nn.softmax)
    with pytest.raises(ValueError, match="most_units"):
        sj.SlidingSolver(most_units=0)
    smooth = sj.plateau_clock(sj.MLP([1, 2, 1], "tanh", key=jax.random.key(0)), vee()[1])
    with pytest.raises(ValueError, match="have activations with kinks"):
        sj.SlidingSolver().init(smooth.term, 0.0, 1.0, smooth.y0, smooth.args)
    alone = sj.plateau_clock(vee()[0], lambda model: jnp.sum(model.p**2))
    with pytest.raises(ValueError, match="be a saddlejax"):
        sj.SlidingSolver().init(alone.term, 0.0, 1.0, alone.y0, alone.args)


def test_solvers_and_tolerances_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"solver must be made for steps along kinks.*at_kinks=True"):
        sj.SlidingSolver(sj.StiffPlateauSolver(1e-2))
    with pytest.raises(ValueError, match="at_kinks must be True or False"):
        sj.StiffPlateauSolver(at_kinks="yes")
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="first_rtol must be positive"):
            sj.PlateauController(first_rtol=bad)
