"""Curvature, stationary points, plateaus and gradient descent of any model, against closed forms and dense matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
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
