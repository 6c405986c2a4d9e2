"""Back-propagation written out, against automatic differentiation of the loss."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saddlejax as sj
from saddlejax.gradient import gradient
from saddlejax.tasks.task import task_loss

KEY = jax.random.key(5)


def problem(sizes, activation, dtype="float64"):
    """A network with layers narrower and wider than sixteen, from where on products are laid out in another way."""
    net = sj.MLP(sizes, activation, key=KEY, dtype=dtype)
    x = jax.random.normal(jax.random.key(1), (30, sizes[0]))
    return net, sj.Task(x, jnp.sin(x[:, : sizes[-1]])).astype(dtype)


@pytest.mark.parametrize("sizes", [(3, 2), (5, 20, 1), (18, 20, 17, 4), (4, 5, 24, 16, 3)])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_it_is_the_gradient_of_the_loss(sizes, activation, dtype, tolerance):
    net, task = problem(sizes, activation, dtype)
    found = gradient(net, task)
    loss, slopes = jax.value_and_grad(lambda w: task_loss(net.with_weights(w), task))(net.weights)
    np.testing.assert_allclose(found.loss, loss, rtol=tolerance)
    for a, b in zip(found.weights, slopes, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.max(jnp.abs(b))), rtol=0)


def test_weights_that_are_not_the_matrices_get_their_own_gradient():
    wide = sj.MLP([3, 6, 4, 1], "gelu", key=KEY)
    narrow = sj.manifold.reduce(sj.manifold.project(wide, 2), 2)
    task = problem((3, 1), "gelu")[1]
    slopes = jax.grad(lambda w: task_loss(narrow.with_weights(w), task))(narrow.weights)
    chex.assert_trees_all_close(gradient(narrow, task).weights, slopes, atol=1e-10, rtol=1e-10)


def test_it_can_be_differentiated_in_both_modes_and_batched():
    net, task = problem((18, 20, 17, 4), "tanh")
    direction = jax.tree.map(jnp.cos, net.weights)

    def along(weights):
        return gradient(net.with_weights(weights), task).weights

    hessian_product = jax.jvp(jax.grad(lambda w: task_loss(net.with_weights(w), task)), (net.weights,), (direction,))[1]
    forward = jax.jvp(along, (net.weights,), (direction,))[1]
    backward = jax.vjp(along, net.weights)[1](direction)[0]
    two = jax.vmap(along)(jax.tree.map(lambda w: jnp.stack([w, 2 * w]), net.weights))
    chex.assert_trees_all_close(forward, hessian_product, atol=1e-10, rtol=0)
    chex.assert_trees_all_close(backward, hessian_product, atol=1e-10, rtol=0)
    chex.assert_trees_all_close(jax.tree.map(lambda w: w[0], two), along(net.weights), atol=1e-10, rtol=0)
