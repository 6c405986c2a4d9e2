import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saddle_problems import HEXAGON_SPEED, gaussian, hexagon, hexagon_direction
from scipy.optimize import minimize_scalar

import saddlejax as sj
from saddlejax import saddle
from saddlejax.saddle.clarke import stationarity
from saddlejax.saddle.pieces import Cell, Kinks, Problem, flat, run, shaped, true_energy
from saddlejax.saddle.settle import Search, deepen

KEY = jax.random.key(0)
RANK_ONE = 1e-16  # share of the squares beyond rank one: singular values below 1e-8 of the largest
DIGITS_SPEED = 0.074220610  # the best of many searches with other methods


def numpy_problem(task, minus=0.0, plus=1.0):
    x, y = np.asarray(task.x), np.asarray(task.y)
    return Problem(x, y / len(x), minus, plus)  # squared error: −∇c(0, y) = y


def check_certificates(best, task):
    for w in best.weights:
        assert abs(np.linalg.norm(w) - 1) < 1e-10
    assert best.residual <= 1e-8
    assert best.speed <= best.upper_bound * (1 + 1e-10) <= best.proven_bound * (1 + 2e-10)
    assert best.speed >= best.rank_one_speed * (1 - 1e-10)
    assert np.all(np.diff(best.speeds) <= 0)  # sorted, so without rounding
    own = -saddle.leading_order_loss(best.net, task)
    np.testing.assert_allclose(best.speed, own, rtol=1e-8)


@pytest.mark.parametrize(
    ("activation", "gain"),
    [("identity", 1), ("tanh", 1), ("gelu", 0.5), ("mish", 0.6), (lambda z: -2 * jnp.sin(z), -2)],
)
@pytest.mark.parametrize("hidden", [(7,), (5, 6, 3)])
def test_linear_to_leading_order_has_the_closed_form(activation, gain, hidden):
    task = gaussian(0)
    best = sj.escape_direction(task, [4, *hidden, 2], activation, key=KEY)
    m = np.asarray(task.y).T @ np.asarray(task.x) / task.samples
    np.testing.assert_allclose(best.speed, abs(gain) ** len(hidden) * np.linalg.norm(m, 2), rtol=1e-8)
    assert np.all(saddle.rank_one_excess(best.weights) < RANK_ONE)
    check_certificates(best, task)


@pytest.mark.parametrize("e", [0.0, 0.3])
@pytest.mark.parametrize("depth", [3, 5, 8])
def test_hexagon(e, depth):
    task = hexagon(e)
    best = sj.escape_direction(task, [2, *[6] * (depth - 1), 1], "relu", starts=8, key=KEY)
    np.testing.assert_allclose(best.speed, (1 + e) * HEXAGON_SPEED, rtol=1e-8)
    np.testing.assert_allclose(best.rank_one_speed, e / 4, atol=1e-8)
    np.testing.assert_allclose(sj.low_rank_margin(best.weights)[0], 1.07457, rtol=1e-5)
    assert np.all(saddle.rank_one_excess(best.weights)[1:] < RANK_ONE)
    assert best.residual_kind == "Clarke"
    check_certificates(best, task)


def test_hexagon_needs_three_layers():
    best = sj.escape_direction(hexagon(0.3), [2, 6, 1], "relu", starts=4, key=KEY)
    np.testing.assert_allclose(best.speed, 0.075, rtol=1e-8)
    check_certificates(best, hexagon(0.3))
    none = sj.escape_direction(hexagon(0.0), [2, 6, 1], "relu", starts=4, key=KEY)
    assert none.speed == 0 and np.isinf(none.residual) and none.optima == () and np.isinf(none.relative_gap)
    assert "no start found a direction" in str(none) and "nan" not in str(none) and "inf" not in str(none)


@pytest.mark.parametrize(("activation", "hidden"), [("relu", (5, 5, 5)), ("tanh", (5, 5)), ("tanh", ())])
def test_without_a_signal_there_is_no_direction(activation, hidden):
    task, sizes = gaussian(0), [4, *hidden, 2]

    def search(x, y):
        return sj.escape_direction(sj.Task(x, y), sizes, activation, starts=4, key=KEY)

    for x, y, words in ((0 * task.x, task.y, "x = 0"), (task.x, 0 * task.y, "∇c\\(0, y\\) = 0")):
        with pytest.raises(ValueError, match=f"task must have .*{words}"):
            search(x, y)
        traced = jax.jit(search)(x, y)
        assert traced.speed == traced.upper_bound == traced.relative_gap == 0 and np.isinf(traced.residual)
        assert traced.optima == () and "there is no escape direction" in str(traced)
        numbers = [leaf for leaf in jax.tree.leaves(traced) if np.any(np.isnan(leaf))]
        assert numbers == [] and "nan" not in str(traced) and "inf" not in str(traced)
        assert all(np.isclose(np.linalg.norm(w), 1) for w in traced.weights)
    slope = jax.grad(lambda y: search(task.x, y).speed)(0 * task.y)
    chex.assert_tree_all_finite(slope)


def test_a_smooth_network_without_signal_to_leading_order_has_no_direction():
    # E[y x] = 0 for the alternating hexagon, up to the rounding of the sum.
    none = sj.escape_direction(hexagon(0.0), [2, 6, 6, 1], "tanh", key=KEY)
    assert none.speed == 0 and none.upper_bound == 0 and none.relative_gap == 0
    assert "there is no escape direction" in str(none)


def test_starts_are_counted_by_kind():
    task = hexagon(0.3)
    for depth, added in ((3, [1]), (4, [1, 2])):
        best = sj.escape_direction(task, [2, *[6] * (depth - 1), 1], "relu", starts=4, key=KEY)
        assert sorted(best.start_kinds.tolist()) == [0, 0, 0, 0, *added]
        assert len(best.speeds) == 4 + len(added) and "4 random" in str(best)
        assert "of rank one (from 64)" in str(best) and ("of three layers" in str(best)) == (depth > 3)
    assert "closed form" in str(sj.escape_direction(task, [2, 6, 1], "tanh", starts=4, key=KEY))


def test_zero_speeds_in_the_table_and_the_figure():
    import matplotlib
    from rich.console import Console

    matplotlib.use("Agg")
    none = jax.jit(lambda y: sj.escape_direction(sj.Task(gaussian(0).x, y), [4, 5, 5, 2], "tanh", key=KEY))(
        jnp.zeros((30, 2))
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(saddle.directions_table([none]))
    assert "nan" not in (printed := console.export_text()) and "inf" not in printed
    left, _ = sj.plot.directions([none])
    assert left.get_ylim() == (0, 1)


def test_bounds_scale_with_the_task_in_single_precision():
    # Squares of the targets underflow, those of the inputs overflow.
    task = gaussian(0)
    large, small = (sj.Task(task.x.astype("float32") * s, task.y.astype("float32") / s) for s in (1.0, 1e22))
    bounds = [sj.escape_direction(one, [4, 5, 2], "relu", starts=1, key=KEY).proven_bound for one in (large, small)]
    assert bounds[1] > 0
    np.testing.assert_allclose(bounds[1], bounds[0], rtol=1e-4)


def test_clarke_residual_of_the_closed_form_and_of_its_neighbours():
    problem = numpy_problem(hexagon(0.0))
    exact = stationarity(hexagon_direction(), problem)
    assert exact.plain > 0.1 and exact.clarke < 1e-10 and len(exact.kinks) == 6
    # x_0 = −x_3, so of the slopes of a first-layer neuron at these two only the sum counts.
    first, last = exact.slopes[exact.kinks.rows[:, 0] == 0], exact.slopes[exact.kinks.rows[:, 0] == 1]
    np.testing.assert_allclose([first.sum() / 2, *last], [2 - np.sqrt(3), *[4 - 2 * np.sqrt(3)] * 2], rtol=1e-8)
    turn = np.array([[np.cos(1e-3), -np.sin(1e-3)], [np.sin(1e-3), np.cos(1e-3)]])
    w1, w2, w3 = hexagon_direction()
    assert stationarity([w1 @ turn, w2, w3], problem).clarke > 1e-4


def test_cell_derivatives_match_finite_differences():
    rng = np.random.default_rng(0)
    problem = numpy_problem(gaussian(5, samples=12))
    weights = [rng.normal(size=s) for s in ((3, 4), (5, 3), (2, 5), (2, 2))]
    kinks = Kinks(np.array([[0, 2, 1], [1, 7, 4], [2, 5, 0]]))
    _, slopes = run(weights, problem, kinks)
    slopes = kinks.put(slopes, np.array([0.3, 0.6, 0.2]))
    free = Kinks()
    cell, theta, h = Cell(weights, problem, slopes, free), flat(weights), 1e-6
    gradient, hessian = np.zeros(theta.size), np.zeros((theta.size, theta.size))
    values = np.zeros((3, theta.size))
    for i, step in enumerate(np.eye(theta.size) * h):
        up, down = (Cell(shaped(theta + s, weights), problem, slopes, free) for s in (step, -step))
        gradient[i] = (up.energy - down.energy) / (2 * h)
        hessian[i] = (up.gradient - down.gradient) / (2 * h)
        values[:, i] = (kinks.gather(up.z) - kinks.gather(down.z)) / (2 * h)
    np.testing.assert_allclose(cell.gradient, gradient, atol=1e-7)
    np.testing.assert_allclose(cell.hessian(), hessian, atol=1e-7)
    held = Cell(weights, problem, slopes, free)
    held.kinks = kinks
    np.testing.assert_allclose(held.kink_jacobian(), values, atol=1e-7)


@pytest.mark.parametrize("activation", ["relu", lambda z: jnp.where(z > 0, z, 0.3 * z), "abs", "selu"])
def test_rank_one_speed_against_all_directions_of_a_plane(activation):
    task = gaussian(6, samples=15, inputs=2)
    depth = 4
    best = sj.escape_direction(task, [2, 5, 5, 5, 2], activation, starts=4, key=KEY)
    minus, plus = saddle.tangent(activation)
    x, y = np.asarray(task.x), np.asarray(task.y)

    def speed(angle, signs):
        z = x @ [np.cos(angle), np.sin(angle)]
        for sign in signs:
            z = sign * np.where(z > 0, plus * z, minus * z)
        return np.linalg.norm(y.T @ z) / len(x)

    tops = []
    for code in range(2 ** (depth - 1)):
        signs = [1 if code >> i & 1 else -1 for i in range(depth - 1)]
        angles = np.linspace(0, 2 * np.pi, 721)
        top = angles[np.argmax([speed(a, signs) for a in angles])]
        found = minimize_scalar(
            lambda a, signs=signs: -speed(a, signs),
            bounds=(top - 0.01, top + 0.01),
            method="bounded",
            options={"xatol": 1e-12},
        )
        kinks = np.arctan2(x[:, 1], x[:, 0]) + np.pi / 2  # a maximum on a kink is too sharp for the line search
        tops += [-found.fun, *(speed(angle + turn, signs) for angle in kinks for turn in (0, np.pi))]
    np.testing.assert_allclose(best.rank_one_speed, max(tops), rtol=1e-8)
    check_certificates(best, task)


@pytest.mark.parametrize("seed", range(3))
def test_speeds_rise_with_depth_and_random_starts_do_not_beat_them(seed):
    task = gaussian(seed, samples=20, inputs=3)
    found = saddle.directions_over_depth(task, [2, 3, 4], width=5, starts=4, key=jax.random.key(seed))
    for best in found:
        check_certificates(best, task)
    speeds = np.array([float(best.speed) for best in found])
    assert np.all(np.diff(speeds) >= -1e-10 * speeds[0])
    np.testing.assert_allclose([float(best.rank_one_speed) for best in found], found[0].rank_one_speed, rtol=1e-8)


def test_a_fast_direction_with_two_neurons_in_its_last_hidden_layer_can_be_made_deeper():
    weights = hexagon_direction()
    doubled = [weights[0], np.vstack([0.8 * weights[1], -0.6 * weights[1]]), np.array([[0.8, 0.6]])]
    problem = numpy_problem(hexagon(0.0))
    deep = deepen(doubled, problem, Search((2, 3, 2, 4, 2, 1), saddle.tangent("relu")))
    assert [w.shape for w in deep] == [(3, 2), (2, 3), (4, 2), (2, 4), (1, 2)]
    np.testing.assert_allclose(true_energy(deep, problem), HEXAGON_SPEED, rtol=1e-10)


def test_cross_entropy_and_sample_weights():
    task = gaussian(8)
    labels = np.argmax(np.asarray(task.y), axis=1)
    task = sj.Task(task.x, labels, sj.cross_entropy, sample_weights=np.arange(1, 31) / 465)
    check_certificates(sj.escape_direction(task, [4, 6, 6, 2], "relu", starts=4, key=KEY), task)


@pytest.fixture(scope="module")
def digits():
    task = sj.tasks.digits()
    return task, saddle.directions_over_depth(task, [3, 5], width=24, starts=12, key=KEY)


def test_digits(digits):
    task, found = digits
    for best in found:
        assert abs(best.speed - DIGITS_SPEED) < 1e-7 and abs(best.rank_one_speed - DIGITS_SPEED) < 1e-7
        assert best.kinks == 1 and np.all(saddle.rank_one_excess(best.weights) < RANK_ONE)
        assert 1.07 < best.upper_bound / best.speed < 1.08
        assert np.median(best.gradient_evaluations[best.start_kinds == 0]) <= 300
        check_certificates(best, task)


def test_digits_have_worse_local_optima(digits):
    rank_one = digits[1][0].rank_one_optima
    for speed in (DIGITS_SPEED, 0.0618718, 0.0530941):
        assert min(abs(one.speed - speed) for one in rank_one) < 2e-7
    assert any(abs(one.speed - 0.06187) < 1e-5 for best in digits[1] for one in best.optima)


def test_slope_on_the_kink_of_the_digits(digits):
    task, found = digits
    v, u = found[0].weights[0][:1], found[0].weights[-1][:, :1]
    there = stationarity([np.asarray(v), np.asarray(u)], numpy_problem(task))
    assert len(there.kinks) == 1 and abs(there.slopes[0] - 0.904) < 1e-3


def test_transforms_agree_with_plain_calls():
    # Away from the symmetric targets, where mirror images of one optimum make a kink of s* in the targets.
    task = sj.Task(hexagon(0.3).x, hexagon(0.3).y + 0.05 * jnp.asarray([[0.3, 0.5, -0.2, 0.4, -0.6, 0.9]]).T)

    def speed(y):
        return sj.escape_direction(sj.Task(task.x, y), [2, 6, 6, 1], "relu", starts=8, key=KEY).speed

    plain = speed(task.y)
    np.testing.assert_allclose(jax.jit(speed)(task.y), plain, rtol=1e-9)
    np.testing.assert_allclose(jax.vmap(speed)(jnp.stack([task.y, 2 * task.y])), [plain, 2 * plain], rtol=1e-9)
    direction = jnp.asarray([[0.3, 0.1, -0.2, 0.4, -0.1, 0.2]]).T
    slope = jnp.sum(jax.grad(speed)(task.y) * direction)
    difference = (speed(task.y + 1e-5 * direction) - speed(task.y - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-4)


def test_summary_table_and_figure():
    import matplotlib
    from rich.console import Console

    matplotlib.use("Agg")
    best = sj.escape_direction(hexagon(0.3), [2, 6, 6, 1], "relu", starts=8, key=KEY)
    text = str(best)
    assert "0.100555" in text and "Clarke" in text and "0.075" in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(saddle.directions_table([best]))
    printed = console.export_text()
    assert "0.100555350" in printed and "1.075" in printed
    _, right = sj.plot.directions([best])
    line = right.lines[0]
    np.testing.assert_allclose(line.get_ydata(), np.maximum(line.get_xdata(), 1) ** -0.25)


def test_bad_arguments_are_explained():
    task = hexagon(0)
    with pytest.raises(ValueError, match="activation must vanish at zero"):
        sj.escape_direction(task, [2, 3, 1], "sigmoid", key=KEY)
    with pytest.raises(ValueError, match="sizes must begin with 2 and end with 1"):
        sj.escape_direction(task, [3, 3, 1], key=KEY)
    with pytest.raises(ValueError, match="starts must be a whole number"):
        sj.escape_direction(task, [2, 3, 1], starts=0, key=KEY)


def test_depth_does_not_lose_a_rare_optimum():
    # Perturbed alternating targets on a decagon, where few random starts find the best three-layer direction.
    rng = np.random.default_rng(2)
    angles = np.arange(10) * np.pi / 5 + 0.1 * rng.normal(size=10)
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    task = sj.Task(x, (np.cos(5 * angles) + 0.1 * rng.normal(size=10))[:, None])
    three, four = saddle.directions_over_depth(task, [3, 4], width=8, starts=16, key=jax.random.key(2))
    assert four.speed >= three.speed * (1 - 1e-10) and three.speed > 1.05 * three.rank_one_speed
    check_certificates(four, task)
