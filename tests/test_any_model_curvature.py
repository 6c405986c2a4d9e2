"""Curvature, stationary points, plateaus and gradient descent of any model, against closed forms and dense matrices."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import saddlejax as sj
from saddlejax.curvature.lanczos import KrylovProblem, extreme_eigenvalues, ritz_values
from saddlejax.curvature.sharpness import sharpness

X = jax.random.normal(jax.random.key(1), (50, 10))
TASK = sj.Task(X, jnp.stack([jnp.sin(X[:, 0]), X[:, 1] * X[:, 2]], axis=1))
MODEL = eqx.nn.MLP(10, 2, 8, 2, jnp.tanh, key=jax.random.key(0))  # with biases
SMALL = jax.tree.map(lambda leaf: 0.05 * leaf if eqx.is_inexact_array(leaf) else leaf, MODEL)


class Convolutional(eqx.Module):
    """A convolution and a linear layer, both with biases."""

    convolution: eqx.nn.Conv2d
    readout: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.convolution = eqx.nn.Conv2d(1, 3, 2, key=first)
        self.readout = eqx.nn.Linear(12, 2, key=second)

    def __call__(self, x):
        return self.readout(jnp.tanh(self.convolution(x[:9].reshape(1, 3, 3))).reshape(-1))


class Bowl(eqx.Module):
    """Parameters alone: what they cost is a function of its own."""

    at: jax.Array
    rows: jax.Array


VALUES = jnp.array([3.0, -2.0, 0.5, 0.1])


def quadratic(model):
    """`½ Σ λ_i (a_i − 1)² + ½ Σ rows²`: the Hessian has the eigenvalues `λ` and 1, and one stationary point."""
    return 0.5 * jnp.sum(VALUES * (model.at - 1) ** 2) + 0.5 * jnp.sum(model.rows**2)


BOWL = Bowl(jnp.zeros(4), jnp.full((2, 3), 0.3))


def dense_eigenvalues(model):
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(arrays)

    def loss(flat):
        return TASK.mean_loss(jax.vmap(eqx.combine(unravel(flat), rest))(TASK.x))

    return jnp.linalg.eigvalsh(jax.hessian(loss)(flat))


@pytest.mark.parametrize(
    "model", [MODEL, Convolutional(jax.random.key(0))], ids=["perceptron with biases", "convolutional"]
)
def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian(model):
    expected = dense_eigenvalues(model)[-1]
    assert float(sharpness(model, TASK)) == pytest.approx(float(expected), rel=1e-3)


def test_sharpness_of_a_loss_of_its_own_and_of_the_parameters_that_move():
    assert float(sharpness(BOWL, quadratic)) == pytest.approx(3, rel=1e-10)
    rows = Bowl(False, True)
    assert float(sharpness(BOWL, quadratic, rows)) == pytest.approx(1, rel=1e-10)
    # λ_max of a(w) = w⁴ is 12 w²; the derivative of sharpness by the point is 24 w.
    slope = jax.grad(lambda w: sharpness(w, lambda w: jnp.sum(w**4)))
    np.testing.assert_allclose(slope(jnp.array([0.5])), [12.0], rtol=1e-8)


def test_ritz_values_of_a_space_that_closes_are_the_eigenvalues_once_each():
    values = jnp.array([-2.0, 1.0, 1.0, 5.0, 7.0])
    found = ritz_values(lambda v: values * v, jnp.ones(5), 5)
    np.testing.assert_allclose(found[:4], [-2, 1, 5, 7], rtol=1e-10)
    assert np.isnan(found[4])
    assert np.all(np.isnan(ritz_values(lambda v: values * v, jnp.zeros(5), 3)))
    lowest, highest = extreme_eigenvalues(lambda v: values * v * jnp.nan, jnp.ones(5), 5)
    assert np.isnan(lowest) and np.isnan(highest)


def test_matrix_that_is_not_finite_gives_no_plausible_numbers():
    problem = KrylovProblem(lambda v: v * jnp.nan, jnp.ones(20), jnp.exp, jnp.linalg.norm, jnp.asarray(1e-6), 16)
    space = problem.space()
    assert np.isnan(space.error).all() and np.isnan(space.apply(jnp.exp)).all()
    assert int(space.used) <= 5


def test_stationary_point_of_a_quadratic_is_its_saddle():
    found = sj.nearby_stationary_point(BOWL, quadratic)
    assert found.converged
    np.testing.assert_allclose(found.net.at, 1, atol=1e-8)
    np.testing.assert_allclose(found.net.rows, 0, atol=1e-8)
    assert float(found.loss) == pytest.approx(0, abs=1e-12)
    assert float(found.distance) == pytest.approx(np.sqrt(4 + 6 * 0.09), rel=1e-6)
    assert float(found.lowest_eigenvalue) == pytest.approx(-2, rel=1e-6)
    assert float(found.highest_eigenvalue) == pytest.approx(3, rel=1e-6)
    frozen = sj.nearby_stationary_point(BOWL, quadratic, Bowl(True, False))
    np.testing.assert_array_equal(frozen.net.rows, BOWL.rows)


def test_stationary_point_of_a_model_with_biases_has_the_spectrum_of_the_dense_hessian():
    # From small parameters: the saddle at which only the bias of the last layer is learned.
    found = sj.nearby_stationary_point(SMALL, TASK)
    assert found.converged and isinstance(found.net, eqx.nn.MLP)
    np.testing.assert_allclose(found.net.layers[-1].bias, TASK.y.mean(axis=0), atol=1e-3)
    values = dense_eigenvalues(found.net)
    assert float(found.lowest_eigenvalue) == pytest.approx(float(values[0]), rel=1e-3, abs=1e-6)
    assert float(found.highest_eigenvalue) == pytest.approx(float(values[-1]), rel=1e-3)


def test_points_are_refused_where_the_model_does_not_fit():
    for function in (sharpness, sj.nearby_stationary_point):
        with pytest.raises(ValueError, match="model must map one sample"):
            function(eqx.nn.Linear(3, 2, key=jax.random.key(0)), TASK)


def test_gradient_descent_of_a_model_with_biases_equals_a_plain_optax_loop():
    optimiser = optax.adam(1e-2)
    record = sj.gradient_descent(MODEL, TASK, optimiser, 7, every=3)
    model, memory = MODEL, optimiser.init(eqx.filter(MODEL, eqx.is_inexact_array))
    slope = eqx.filter_jit(eqx.filter_value_and_grad(lambda model: TASK.mean_loss(jax.vmap(model)(TASK.x))))
    models = [MODEL]
    for _ in range(7):
        _, gradient = slope(model)
        updates, memory = optimiser.update(gradient, memory, eqx.filter(model, eqx.is_inexact_array))
        model = eqx.apply_updates(model, updates)
        models.append(model)
    chex.assert_trees_all_close(eqx.filter(record.net, eqx.is_array), eqx.filter(model, eqx.is_array), rtol=1e-8)
    assert record.net.activation is MODEL.activation
    rows = [models[k] for k in (0, 3, 6, 7)]
    np.testing.assert_allclose(record.losses, [slope(m)[0] for m in rows], rtol=1e-8)
    leaves = [[np.asarray(a) for a in jax.tree.leaves(eqx.filter(m, eqx.is_array))] for m in rows]
    np.testing.assert_allclose(record.layer_norms, [[np.linalg.norm(a) for a in row] for row in leaves], rtol=1e-8)
    assert len(record.names) == 6 and record.names[1] == "layers[0].bias"
    for group, values in enumerate(record.singular_values):
        if group % 2:  # biases
            assert values is None
        else:
            expected = [np.linalg.svd(row[group], compute_uv=False) for row in leaves]
            np.testing.assert_allclose(values, expected, rtol=1e-7, atol=1e-12)
    assert record.imbalance is None and record.imbalance_residual is None
    assert "imbalance" not in str(record)


def test_gradient_descent_on_a_loss_of_its_own_moves_what_it_is_told_to():
    # From a = 0 under the plain step η the entries are 1 − (1 − η λ)^k.
    record = sj.gradient_descent(BOWL, quadratic, optax.sgd(0.1), 10, trainable=Bowl(True, False))
    np.testing.assert_allclose(record.net.at, 1 - (1 - 0.1 * VALUES) ** 10, rtol=1e-10)
    np.testing.assert_array_equal(record.net.rows, BOWL.rows)
    np.testing.assert_allclose(record.times, 0.1 * np.arange(11), rtol=1e-8)
    assert record.names == ("at",)
    with pytest.raises(ValueError, match="batch_size must be left out where the loss is a function"):
        sj.gradient_descent(BOWL, quadratic, optax.sgd(0.1), 10, batch_size=2, key=jax.random.key(0))


class Modes(eqx.Module):
    """`u_k v_k` for each mode `k`, which gradient flow learns one after another."""

    u: jax.Array
    v: jax.Array
    table: jax.Array  # a matrix that does not matter: it keeps its rank of one


STRENGTHS = jnp.array([4.0, 1.0])


def modes_loss(model):
    return 0.5 * jnp.sum((STRENGTHS - model.u * model.v) ** 2)


def test_plateaus_of_a_flow_of_any_model():
    # u = v = √a: each mode is s/(1 + (s/a − 1) e^{−2 s t}) (Saxe, McClelland & Ganguli).
    a = 1e-8
    start = Modes(jnp.full(2, a**0.5), jnp.full(2, a**0.5), jnp.ones((3, 2)))
    flow = sj.gradient_flow(
        start, modes_loss, sj.Loss(1e-3), save=sj.Save(weights=True), trainable=Modes(True, True, False)
    )
    found = flow.plateaus(modes_loss, polish=True)
    assert [p.loss for p in found] == pytest.approx([8.5, 0.5], rel=1e-3)
    t = np.linspace(0.01, 20, 400_001)

    def descent(s):
        mode = s / (1 + (s / a - 1) * np.exp(-2 * s * t))
        return t * 2 * (s - mode) ** 2 * mode

    assert [p.end for p in found] == pytest.approx([t[np.argmax(descent(s))] for s in (4.0, 1.0)], rel=5e-3)
    for plateau, strengths in zip(found, ([0, 0], [4, 0]), strict=True):
        np.testing.assert_allclose(plateau.saddle.net.u * plateau.saddle.net.v, strengths, atol=1e-4)
        np.testing.assert_array_equal(plateau.saddle.net.table, start.table)
        # At u = v = 0 the Hessian of mode s has the eigenvalues ±s.
        assert float(plateau.saddle.lowest_eigenvalue) == pytest.approx(-4 if plateau is found[0] else -1, rel=1e-3)
        assert plateau.ranks == () and plateau.bottleneck_rank is None
    assert "unknown" in str(found)


def test_plateaus_name_the_matrices_whose_ranks_they_give():
    flow = sj.gradient_flow(SMALL, TASK, sj.Loss(0.3), save=sj.Save(weights=True))
    found = flow.plateaus()
    assert found.groups == ("layers[0].weight", "layers[1].weight", "layers[2].weight")
    assert all(len(p.ranks) == len(p.stable_ranks) == 3 for p in found) and "layers[1].weight" in str(found)
    # On the first plateau the outputs are constant: the Jacobian has no rank beside that at the end.
    assert found[0].bottleneck_rank == (0, 2)
    jacobians = jax.vmap(jax.jacobian(flow.net))(TASK.x)
    last = np.linalg.svd(jacobians, compute_uv=False)
    assert found[-1].bottleneck_rank[0] <= np.sum(last > 0.1 * last.max(), axis=1).max() <= 2
