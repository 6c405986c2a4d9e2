"""Flows through many saddles: the exponential solver, plateaus, and the saddles near them."""

from functools import partial

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saddlejax as sj
from saddlejax.curvature.lanczos import KrylovProblem, phi
from saddlejax.flow.plateaus import crossing_log_time

STRENGTHS = (4.0, 2.0, 1.0, 0.5)
PLATEAUS = (10.625, 2.625, 0.625, 0.125)
LEVELS = (6.625, 1.625, 0.375, 0.0625)
TASK = sj.tasks.linear_teacher(STRENGTHS, in_size=10)
LINEAR = sj.MLP([10, 10, 10, 10, 4], "identity", key=jax.random.key(0))


def stiff(scale, rtol=1e-2, end=1e-2):
    save = sj.Save(weights=True)
    return sj.gradient_flow(sj.scale_layers(LINEAR, scale), TASK, sj.Loss(end), stiff=True, rtol=rtol, save=save)


def crossings(flow):
    return np.array([crossing_log_time(flow, level) for level in LEVELS])


def test_phi_functions_obey_their_recursion_and_known_values():
    z = jnp.array([-1e6, -30.0, -1.0, -1e-9, 0.0, 1e-9, 0.9, 3.0])
    np.testing.assert_allclose(phi(1, z[:4]), jnp.expm1(z[:4]) / z[:4], rtol=1e-10)
    for order in range(5):
        factorial = float(jnp.prod(jnp.arange(1.0, order + 1)))
        assert float(phi(order, z)[4]) == pytest.approx(1 / factorial, rel=1e-10)
        # Terms of size one, with a rounding of 1e-16, cancel to values of 1e-6 at z = -1e6.
        np.testing.assert_allclose(phi(order, z), z * phi(order + 1, z) + 1 / factorial, rtol=1e-10, atol=1e-13)


def test_krylov_space_gives_functions_of_a_matrix_and_owns_up_to_what_is_left():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    values = -np.geomspace(1e-3, 1e2, 60)
    matrix, vector = jnp.asarray(turn * values @ turn.T), jnp.asarray(rng.normal(size=60))
    exact = turn @ (np.asarray(phi(1, jnp.asarray(values))) * (turn.T @ np.asarray(vector)))
    half = turn @ (np.asarray(phi(1, 0.5 * jnp.asarray(values))) * (turn.T @ np.asarray(vector)))
    functions = (lambda z: phi(1, z), lambda z: phi(1, 0.5 * z))

    @partial(jax.jit, static_argnums=1)
    def both(tolerance, size):
        problem = KrylovProblem(lambda v: matrix @ v, vector, lambda z: phi(2, z), jnp.linalg.norm, tolerance, size)
        return problem.space(), problem.apply(*functions)

    for tolerance, size in ((1e-8, 48), (1e-3, 48), (1e-1, 48), (1e-12, 6)):
        space, applied = both(tolerance, size)
        left = float(jnp.linalg.norm(space.error))
        for found, answer in zip(space.apply(*functions), (exact, half), strict=True):
            assert float(jnp.linalg.norm(found - answer)) < 3 * max(left, 1e-10)
        assert left <= tolerance or int(space.used) >= size
        # Taken from the smaller room or from the larger one, it is the same.
        assert int(applied.used) == int(space.used)
        np.testing.assert_allclose(applied.results, space.apply(*functions), atol=1e-10)
        np.testing.assert_allclose(applied.error, space.error, atol=1e-10)
        assert float(applied.extremes[1]) <= 0


@pytest.mark.parametrize("stages", [3, 2])
def test_solver_in_diffrax_has_its_order_counts_its_work_and_interpolates(stages):
    hessian = jnp.array([[12.0, 3.0, 0.0], [3.0, 2.0, 0.5], [0.0, 0.5, -0.3]])
    term = dfx.ODETerm(lambda t, y, args: -hessian @ y - 0.1 * y**3)
    first = jnp.array([1.0, -0.5, 0.2])

    @jax.jit
    def solve(step):
        solver = sj.ExponentialRosenbrock(tolerance=1e-13, stages=stages)
        save = dfx.SaveAt(ts=jnp.array([0.37, 1.0]), solver_state=True)
        return dfx.diffeqsolve(term, solver, 0.0, 1.0, step, first, saveat=save, max_steps=256)

    exact = dfx.diffeqsolve(
        term, dfx.Dopri8(), 0.0, 1.0, 1e-4, first, saveat=dfx.SaveAt(ts=jnp.array([0.37, 1.0])), max_steps=10**6,
        stepsize_controller=dfx.PIDController(rtol=1e-13, atol=1e-14),
    ).ys  # fmt: skip
    errors = []
    for steps in (16, 32, 64):
        solution = solve(jnp.asarray(1 / steps))
        errors.append(np.max(np.abs(np.asarray(solution.ys - exact)), axis=1))
        assert int(solution.solver_state.vector_fields) == stages * steps
        assert int(solution.solver_state.products) <= (3 * stages + stages - 1) * steps
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(slopes > stages + 0.7), slopes


def test_linear_staircase_at_every_scale():
    work = {}
    for scale in (1e-2, 1e-3, 1e-4):
        flow = stiff(scale)
        assert flow.status == sj.Status.loss_reached
        found = flow.plateaus()
        np.testing.assert_allclose([p.loss for p in found], PLATEAUS, rtol=1e-2)
        assert np.all(np.diff([p.log_end for p in found]) > 0)
        assert found[0].log_start == -np.inf
        assert [p.log_start for p in found[1:]] == [p.log_end for p in found[:-1]]
        if scale < 1e-2:
            assert [p.ranks for p in found] == [(k,) * 4 for k in range(4)]
            assert [p.bottleneck_rank for p in found] == [(k, k) for k in range(4)]
        work[scale] = int(flow.stats["hessian_vector_products"])
        reference = crossings(stiff(scale, rtol=1e-5))
        np.testing.assert_allclose(np.exp(crossings(flow) - reference), 1, atol=3e-3)
        assert float(flow.imbalance_error) < 1e-3
    assert work[1e-3] <= 6000
    assert abs(work[1e-4] - 2 * work[1e-3] + work[1e-2]) < 0.25 * work[1e-3]


def test_the_choice_of_steps_costs_little_more_than_the_better_kind():
    def work(flow):
        return int(flow.stats["gradient_evaluations"]) + 2 * int(flow.stats["hessian_vector_products"])

    for scale in (1e-2, 1e-3):
        chosen = sj.gradient_flow(sj.scale_layers(LINEAR, scale), TASK, sj.Loss(1e-2), save=sj.Save(weights=True))
        assert chosen.status == sj.Status.loss_reached and "exponential" in chosen.method
        assert work(chosen) < 1.3 * work(stiff(scale))
        np.testing.assert_allclose(np.exp(crossings(chosen) - crossings(stiff(scale))), 1, atol=3e-3)


def test_crossing_times_agree_with_the_explicit_integrator():
    net = sj.scale_layers(LINEAR, 1e-1)
    explicit = sj.gradient_flow(net, TASK, sj.Loss(1e-2), rtol=1e-7, stiff=False, save=sj.Save(singular_values=False))
    np.testing.assert_allclose(np.exp(crossings(stiff(1e-1)) - crossings(explicit)), 1, atol=3e-3)
    np.testing.assert_allclose(crossings(stiff(1e-1, 1e-6)), crossings(explicit), atol=1e-4)
    checked = stiff(1e-1).plateaus(check=explicit)
    assert all(abs(p.log_end_error) < 2e-3 for p in checked)


def test_depth_two_follows_the_exact_solution_of_its_modes():
    # Saxe, McClelland & Ganguli: from W_1 = √a I, W_2 = √a S-aligned, each mode is a logistic curve in e^{2 s t}.
    task = sj.tasks.linear_teacher(STRENGTHS, in_size=4)
    s, a = jnp.array(STRENGTHS), 1e-6
    net = sj.MLP.from_weights([jnp.sqrt(a) * jnp.eye(4)] * 2, "identity")
    times = jnp.geomspace(0.1, 40.0, 60)
    flow = sj.gradient_flow(net, task, sj.Time(40.0), stiff=True, rtol=1e-4, save=sj.Save(times, weights=True))
    product = jnp.einsum("tij,tjk->tik", flow.weights[1], flow.weights[0])
    growth = jnp.exp(-2 * s * times[:, None])
    np.testing.assert_allclose(jnp.diagonal(product, axis1=1, axis2=2), s / (1 + (s / a - 1) * growth), atol=1e-3)


def test_tanh_network_passes_its_plateaus_within_its_budget():
    x = jax.random.normal(jax.random.key(3), (200, 10))
    task = sj.Task(x, x[:, :4] * jnp.array(STRENGTHS))
    net = sj.scale_layers(sj.MLP([10, 10, 10, 4], "tanh", key=jax.random.key(0)), 1e-3)
    save = sj.Save(weights=True)
    flow, tight = (
        sj.gradient_flow(net, task, sj.Loss(0.02), stiff=True, rtol=rtol, save=save) for rtol in (1e-2, 1e-4)
    )
    found = flow.plateaus(check=tight)
    assert [p.bottleneck_rank[1] for p in found] == [0, 1, 2]
    assert all(abs(p.log_end_error) < 1e-3 for p in found)
    assert int(flow.stats["hessian_vector_products"]) <= 8000
    assert float(flow.imbalance_error) < 1e-2
    assert float(tight.imbalance_error) < 3e-4


def test_saddles_are_found_from_their_plateaus():
    found = stiff(1e-2).plateaus(polish=True)
    for plateau, loss in zip(found, PLATEAUS, strict=True):
        saddle = plateau.saddle
        assert float(saddle.loss) == pytest.approx(loss, rel=1e-8)
        # Convergence is linear, and ends after 60 iterations: what is promised is a thousandth.
        assert float(saddle.gradient_norm) < 1e-3 * plateau.gradient_norm
        assert saddle.converged and float(saddle.distance) < 0.1
        assert float(saddle.lowest_eigenvalue) < 0 < float(saddle.highest_eigenvalue)
    # λ_max at the saddle with the mode s learned, all layers equal: L s^{2 − 2/L}.
    assert float(found[1].saddle.highest_eigenvalue) == pytest.approx(4 * 4**1.5, rel=1e-3)
    assert "stationary point" in str(found) and "10.625" in str(found)
    assert found[0].start == 0 and found[1].start == pytest.approx(found[0].end) == pytest.approx(
        np.exp(found[0].log_end)
    )
    hasty = sj.nearby_stationary_point(sj.scale_layers(LINEAR, 0.5), TASK, max_iterations=1)
    assert not hasty.converged and "no stationary point" in str(hasty)


def test_minimum_ends_as_stationary():
    flow = stiff(1e-2, end=-1.0)
    assert flow.status == sj.Status.stationary
    assert float(flow.losses[-1]) < 1e-18
    found = flow.plateaus()
    assert [p.end < np.inf for p in found] == [True] * 4 + [False]  # and where it rests, once
    assert found[-1].loss < 1e-18


def test_strict_saddle_is_left_at_the_exact_time():
    # Saxe, McClelland & Ganguli: in two layers a mode grows as s/(1 + (s/a − 1) e^{−2 s t}). One mode is learned, the
    # other starts from a: the Hessian is indefinite, and nothing but the second mode moves.
    task = sj.tasks.linear_teacher((4.0, 2.0), in_size=2)
    a = 1e-12
    weights = [jnp.diag(jnp.sqrt(jnp.array([4.0, a])))] * 2
    flow = sj.gradient_flow(sj.MLP.from_weights(weights, "identity"), task, sj.Loss(0.5), stiff=True, rtol=1e-4)
    assert flow.status == sj.Status.loss_reached  # (s − mode)²/2 = 1/2 where the mode is at 1
    assert float(flow.times[-1]) == pytest.approx(np.log((2 / a - 1) / (2 / 1 - 1)) / 4, rel=1e-4)
    on_it = sj.MLP.from_weights([jnp.diag(jnp.array([2.0, 0.0]))] * 2, "identity")
    assert sj.gradient_flow(on_it, task, sj.Loss(0.5), stiff=True).status == sj.Status.stationary


def test_flat_valleys_end_with_an_outcome():
    # Separable classes: the loss falls for ever, along a valley that gets flatter. A saturated network: flat from the start.
    x = jnp.array([[1.0, 0.5], [0.5, 1.0], [-1.0, 0.3], [-0.7, -1.0]])
    classes = sj.Task(x, jnp.array([0, 0, 1, 1]), loss=sj.cross_entropy)
    net = sj.scale_layers(sj.MLP([2, 6, 6, 2], "tanh", key=jax.random.key(0)), 0.1)
    flow = sj.gradient_flow(net, classes, sj.Loss(-1.0), stiff=True, max_steps=300)
    assert flow.status in (sj.Status.step_limit, sj.Status.stationary)
    assert np.all(np.diff(flow.losses) <= 1e-10) and float(flow.losses[-1]) < 1e-3
    saturated = sj.gradient_flow(sj.scale_layers(net, 1e4), classes, sj.Loss(-1.0), stiff=True, max_steps=300)
    assert saturated.status in (sj.Status.step_limit, sj.Status.stationary, sj.Status.non_finite)
    assert np.all(np.isfinite(saturated.losses)) and np.all(np.diff(saturated.losses) <= 1e-9)


def test_batches_precision_and_derivatives():
    task = TASK.astype("float32")
    net = LINEAR.with_weights([w.astype("float32") for w in LINEAR.weights])
    scales = jnp.array([3e-2, jnp.nan, 1e-1], "float32")
    small = sj.Save(steps=False)

    def run(scale):
        return sj.gradient_flow(sj.scale_layers(net, scale), task, sj.Loss(1.0), stiff=True, save=small)

    batch = jax.vmap(run)(scales)
    np.testing.assert_array_equal(batch.status == sj.Status.loss_reached, [True, False, True])
    double = stiff(3e-2, end=1.0)
    assert batch.losses.dtype == jnp.float32
    assert float(batch.log_times[0, 1]) == pytest.approx(float(double.log_times[-1]), abs=2e-3)
    with pytest.raises(NotImplementedError, match="stiff=True cannot be differentiated"):
        jax.grad(lambda scale: run(scale).losses[-1])(scales[0])
    with pytest.raises(ValueError, match="solver must be left alone"):
        sj.gradient_flow(net, task, stiff=True, solver=dfx.Tsit5())
    with pytest.raises(ValueError, match="save must be"):
        sj.gradient_flow(net, task, save=True)
    with pytest.raises(ValueError, match="flow must be a single one"):
        batch.plateaus()
    bare = eqx.tree_at(lambda f: f.weights, double, None, is_leaf=lambda leaf: leaf is None)
    with pytest.raises(ValueError, match="Save\\(weights=True\\)"):
        bare.plateaus(polish=True)


def test_kinks_make_no_plateaus():
    x = jax.random.normal(jax.random.key(3), (200, 10))
    teacher = sj.MLP([10, 4, 3], "relu", key=jax.random.key(5))
    task = sj.Task(x, jax.vmap(teacher)(x))
    net = sj.scale_layers(sj.MLP([10, 10, 10, 3], "relu", key=jax.random.key(0)), 1e-2)
    flow = sj.gradient_flow(net, task, sj.Loss(0.03), stiff=False)
    assert "Bosh3" in flow.method and "sliding" in flow.method
    assert flow.status == sj.Status.loss_reached
    found = flow.plateaus()
    losses = [p.loss for p in found]
    assert "some per cent" in str(found) and "some per cent" not in str(flow.plateaus(check=flow))
    assert 3 <= len(losses) <= 8
    assert np.all(np.diff(losses) < 0)
