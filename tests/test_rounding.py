"""Flows near the limits of precision: dormant parts below rounding, layers that cancel, times at rest, exact saddles."""

import itertools
import pickle
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

import saddlejax as sj
from saddlejax.flow.plateaus import crossing_log_time

STRENGTHS = np.array([5.0, 2.0, 1.0, 0.5])
DECOUPLED = sj.tasks.linear_teacher(list(STRENGTHS), in_size=8)
ONE_SAMPLE = sj.Task(jnp.ones((1, 1)), jnp.ones((1, 1)))


def decoupled(strength: float) -> sj.MLP:
    """A linear network 8-8-4 whose modes all start with the given strength (Saxe, McClelland & Ganguli)."""
    size = strength**0.5
    return sj.MLP.from_weights([size * jnp.eye(8), size * jnp.eye(4, 8)], "identity")


def exact_crossings(strength: float) -> tuple[list[float], np.ndarray]:
    """Losses halfway between plateaus, and when they are crossed: mode `k` is `s/(1 + (s/u − 1) e^{−2 s t})`."""
    plateaus = [0.5 * np.sum(STRENGTHS[k:] ** 2) for k in range(5)]
    levels = [0.5 * (above + below) for above, below in itertools.pairwise(plateaus)]

    def loss(t: float) -> float:
        modes = STRENGTHS / (1 + (STRENGTHS / strength - 1) * np.exp(-2 * STRENGTHS * t))
        return 0.5 * np.sum((STRENGTHS - modes) ** 2)

    return levels, np.array([brentq(lambda t, level=level: loss(t) - level, 1e-3, 1e3) for level in levels])


@pytest.mark.filterwarnings("ignore:After the first escape something has grown")  # said from 1e-32 on, to be safe
@pytest.mark.parametrize("stiff", [False, True])
@pytest.mark.parametrize("strength", [1e-10, 1e-20, 1e-40])
def test_modes_that_start_far_below_the_learned_ones_are_learned_in_time(strength, stiff):
    levels, exact = exact_crossings(strength)
    flow = sj.gradient_flow(decoupled(strength), DECOUPLED, sj.Loss(1e-3), stiff=stiff)
    assert flow.status == sj.Status.loss_reached
    found = np.exp([crossing_log_time(flow, level) for level in levels])
    rounded = stiff and strength == 1e-40  # in a Krylov space; a tighter tolerance does not help, and the flow says so
    assert bool(flow.resolved) or strength == 1e-40
    np.testing.assert_allclose(found, exact, rtol=1e-2 if rounded else 2e-3)


def test_ends_of_plateaus_lie_between_the_rows():
    # At the largest t‖∇L‖² of the exact solution, ‖∇L‖² = −dL/dt.
    def descent(t: np.ndarray) -> np.ndarray:
        modes = STRENGTHS / (1 + (STRENGTHS / 1e-10 - 1) * np.exp(-2 * STRENGTHS * t[:, None]))
        return t * np.sum((STRENGTHS - modes) * 2 * modes * (STRENGTHS - modes), axis=1)

    _, crossings = exact_crossings(1e-10)
    near = [np.linspace(0.7 * t, 1.3 * t, 100_001) for t in crossings]
    exact = [t[np.argmax(descent(t))] for t in near]
    for stiff in (False, True):
        flow = sj.gradient_flow(decoupled(1e-10), DECOUPLED, sj.Loss(1e-3), stiff=stiff)
        np.testing.assert_allclose([p.end for p in flow.plateaus()], exact, rtol=5e-3)


def test_modes_in_a_rotated_basis_until_rounding_and_a_word_from_there_on():
    # Every entry of a layer mixes all modes. The times are linear in log 1/ε, with slopes 1/s.
    rotate = lambda n, seed: np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]  # noqa: E731
    task = sj.Task(np.asarray(DECOUPLED.x) @ rotate(8, 1), np.asarray(DECOUPLED.y) @ rotate(4, 2))
    net = sj.MLP([8, 8, 4], "identity", key=jax.random.key(0))
    levels, _ = exact_crossings(1e-10)

    def times(scale: float) -> tuple[sj.Flow, np.ndarray]:
        flow = sj.gradient_flow(sj.scale_layers(net, scale), task, sj.Loss(1e-3), stiff=True)
        return flow, np.exp([crossing_log_time(flow, level) for level in levels])

    (_, large), (flow, small) = times(1e-6), times(1e-14)
    assert flow.resolved and "resolved" not in str(flow)
    np.testing.assert_allclose(small, large + np.log(1e8) / STRENGTHS, rtol=1e-4)
    with pytest.warns(UserWarning, match="times of later plateaus are those of rounding errors"):
        flow, _ = times(1e-20)
    assert not flow.resolved and "smaller than rounding" in str(flow)


def test_a_flow_whose_dormant_gradient_is_rounding_says_so_and_from_which_scale_on_it_holds():
    net = sj.MLP([8, 8, 8, 8, 4], "identity", key=jax.random.key(0))
    with pytest.warns(UserWarning, match="nothing but rounding in float64") as record:
        flow = sj.gradient_flow(sj.scale_layers(net, 1e-7), DECOUPLED, sj.Loss(1e-3), stiff=True)
    assert flow.status == sj.Status.below_rounding
    found = flow.plateaus()
    assert found[-1].end == np.inf and float(flow.losses[-1]) > 0.1
    factor = float(str(record[0].message).split("at least ")[1].split(" times")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = sj.gradient_flow(sj.scale_layers(net, 1e-7 * factor), DECOUPLED, sj.Loss(1e-3), stiff=True)
    assert held.status == sj.Status.loss_reached


@pytest.mark.parametrize("stiff", [False, True])
@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_start_near_the_stable_manifold_of_the_saddle(gap, stiff):
    # W_1 = a, W_2 = −a (1 − δ): u = W_2 W_1 falls to nearly zero and then grows as a logistic curve from (δa/2)².
    weights = [jnp.array([[1e-3]]), jnp.array([[-1e-3 * (1 - gap)]])]
    flow = sj.gradient_flow(sj.MLP.from_weights(weights, "identity"), ONE_SAMPLE, sj.Loss(0.125), stiff=stiff)
    exact = 0.5 * np.log(1 / (gap * 1e-3 / 2) ** 2 - 1)
    assert float(flow.times[-1]) == pytest.approx(exact, rel=5e-4)
    assert flow.resolved


def test_layers_that_shrink_towards_a_minimum_do_not_count_as_cancelling():
    # Both layers shrink at one rate, as on the stable manifold of the saddle, but outputs and signal agree.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow = sj.gradient_flow(sj.MLP.from_weights([[[3.0]], [[3.0]]], "identity"), ONE_SAMPLE, sj.Loss(1e-6))
    assert flow.resolved and int(flow.stats["gradient_evaluations"]) < 200


def test_cancellation_beyond_the_precision_is_said():
    weights = [jnp.array([[1e-3]], "float32"), jnp.array([[-1e-3 * (1 - 1e-4)]], "float32")]
    net, task = sj.MLP.from_weights(weights, "identity"), ONE_SAMPLE.astype("float32")
    with pytest.warns(UserWarning, match="the layers cancel"):
        flow = sj.gradient_flow(net, task, sj.Loss(0.125))
    assert not flow.resolved
    batch = jax.vmap(lambda a: sj.gradient_flow(net.with_weights([net.weights[0], a * net.weights[1]]), task))(
        jnp.array([1.0, -1.0], "float32")
    )
    np.testing.assert_array_equal(batch.resolved, [False, True])
    assert "all but 1" in str(batch)


def three_points() -> tuple[sj.MLP, sj.Task]:
    """The three points of Boursier & Flammarion (arXiv:2401.10791), and a network of balanced neurons."""
    inputs = np.array([-0.75, -0.5, 0.125])
    first = np.asarray(jax.random.normal(jax.random.key(0), (8, 2))) * 1e-3
    signs = np.where(np.arange(8) % 2, -1, 1)
    net = sj.MLP.from_weights([first, (signs * np.linalg.norm(first, axis=1))[None]], "relu")
    return net, sj.Task(np.stack([inputs, np.ones(3)], 1), np.array([[1.1], [0.1], [0.8]]))


@pytest.mark.parametrize("stiff", [False, True])
def test_a_time_is_reached_to_the_last_digit_and_rest_is_one_plateau(stiff):
    net, task = three_points()
    for time in (40.0, 4000.0):
        flow = sj.gradient_flow(net, task, sj.Time(time), stiff=stiff)
        assert flow.status == sj.Status.time_reached
        assert float(flow.times[-1]) == pytest.approx(time, rel=1e-9)
    # It rests at the least-squares line: loss 0.0875213676, known from the three points alone.
    x, y = np.asarray(task.x), np.asarray(task.y)
    line = 0.5 * np.mean((x @ np.linalg.lstsq(x, y, rcond=None)[0] - y) ** 2)
    found = flow.plateaus()
    assert [p.loss for p in found][1:] == [pytest.approx(line, rel=1e-9)]
    assert found[0].end < np.inf and found[1].end == np.inf
    times = jnp.array([1.0, 40.0, 2000.0, 4000.0])
    kept = sj.gradient_flow(net, task, sj.Time(4000.0), save=sj.Save(times), stiff=stiff)
    np.testing.assert_allclose(kept.times, times, rtol=1e-9)
    assert float(kept.losses[-1]) == pytest.approx(line, rel=1e-9)


@pytest.mark.parametrize("until", [sj.Loss(1e-3), sj.Time(10.0)])
def test_a_flow_that_starts_on_a_stationary_point_is_one_plateau(until):
    task = sj.tasks.linear_teacher([4.0, 2.0], in_size=2)
    on_it = sj.MLP.from_weights([jnp.diag(jnp.array([2.0, 0.0]))] * 2, "identity")
    flow = sj.gradient_flow(on_it, task, until)
    reached = isinstance(until, sj.Time)
    assert flow.status == (sj.Status.time_reached if reached else sj.Status.stationary)
    (plateau,) = flow.plateaus()
    assert plateau.end == np.inf and plateau.loss == pytest.approx(2.0) and plateau.ranks == (1, 1)


def test_a_layer_that_starts_at_zero_has_stable_rank_zero():
    net = sj.MLP.from_weights([1e-2 * jnp.eye(8), jnp.zeros((4, 8))], "identity")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sj.gradient_flow(net, DECOUPLED, sj.Loss(1e-3)).plateaus()
    assert found[0].stable_ranks[1] == 0


def test_crossing_times_do_not_overflow_in_single_precision():
    net = sj.scale_layers(sj.MLP([8, 8, 8, 8, 8, 4], "identity", key=jax.random.key(0)), 1e-8)
    double = sj.gradient_flow(net, DECOUPLED, sj.Loss(10.0), stiff=True)
    assert float(double.times[-1]) > 1e20
    level = 0.5 * (float(double.losses[0]) + 10.0)
    long = jax.tree.map(lambda a: a.astype("float32") if jnp.issubdtype(a.dtype, jnp.floating) else a, double)
    # As if time ran 1e30 times as slowly: times beyond single precision, squares of gradients below it.
    shift = np.float32(np.log(1e30))
    changed = (long.log_times + shift, long.gradient_norms * np.float32(1e-15))
    slow = eqx.tree_at(lambda flow: (flow.log_times, flow.gradient_norms), long, changed)
    assert np.isinf(np.asarray(slow.times)[-1])
    assert crossing_log_time(slow, level) == pytest.approx(crossing_log_time(double, level) + float(shift), rel=1e-5)


def test_flows_that_differ_in_tolerance_stack_and_share_a_program():
    net, traces = decoupled(1e-4), []

    @jax.jit
    def last(flow: sj.Flow) -> jax.Array:
        traces.append(flow)
        return flow.losses[-1] * flow.rtol

    flows = [
        sj.gradient_flow(net, DECOUPLED, sj.Loss(loss), rtol=rtol, save=sj.Save(steps=False))
        for rtol, loss in ((1e-4, 1.0), (1e-6, 2.0))
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *flows)
    np.testing.assert_allclose(stacked.losses[:, -1], [1.0, 2.0], rtol=1e-4)
    np.testing.assert_allclose(stacked.rtol, [1e-4, 1e-6])
    assert "loss 1.0 to 2.0" in str(stacked) and "rtol 1e-06 to 0.0001" in str(stacked)
    assert [float(last(flow)) for flow in flows] == pytest.approx([1e-4, 2e-6], rel=1e-4)
    assert len(traces) == 1


def test_a_flow_knows_its_task_but_does_not_carry_it():
    x = np.random.default_rng(0).normal(size=(1000, 8))
    task = sj.Task(x, x[:, :4])
    flow = sj.gradient_flow(decoupled(1e-4), task, sj.Loss(1.0), save=sj.Save(steps=False))
    assert flow.task.x.shape == (1000, 8)
    assert all(leaf.size < 1000 for leaf in jax.tree.leaves(flow) if hasattr(leaf, "size"))
    restored = pickle.loads(pickle.dumps(flow))
    assert len(pickle.dumps(flow)) < x.nbytes / 2
    assert restored.task is None and float(restored.times[-1]) == float(flow.times[-1])


def test_points_whose_gradient_is_rounding_are_stationary():
    # Below 3e-5 rounding decides whether the last mode is still there when its time has come.
    net = sj.scale_layers(sj.MLP([8, 8, 8, 8, 4], "identity", key=jax.random.key(0)), 5e-5)
    flow = sj.gradient_flow(net, DECOUPLED, sj.Loss(1e-3), stiff=True, save=sj.Save(weights=True))
    assert flow.status == sj.Status.loss_reached
    found = flow.plateaus(polish=True)
    np.testing.assert_allclose([p.loss for p in found], [0.5 * np.sum(STRENGTHS[k:] ** 2) for k in range(4)], rtol=1e-3)
    assert all(p.saddle.converged for p in found)


def test_warnings_point_at_the_line_of_the_caller():
    with pytest.warns(UserWarning, match="nothing but rounding") as record:
        sj.gradient_flow(
            sj.scale_layers(sj.MLP([8, 8, 8, 8, 4], "identity", key=jax.random.key(0)), 1e-7),
            DECOUPLED,
            sj.Loss(1e-3),
            stiff=True,
        )
    assert record[0].filename == __file__
