"""Models that are no perceptrons of this package, and data for them, that several test files share."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import saddlejax as sj

KEY = jax.random.key(0)
SIGNS = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))


def parity() -> sj.Task:
    """The product of three signs, on all eight of them: what depends on one or two of them only has no part in it."""
    return sj.Task(SIGNS, SIGNS.prod(axis=1, keepdims=True))


def digits(samples: int = 50) -> sj.Task:
    """Some of the digits, whose targets do not have mean zero: a last bias has a gradient at zero."""
    whole = sj.tasks.digits()
    return sj.Task(whole.x[:samples], whole.y[:samples])


def perceptron(depth: int, activation, inputs: int = 3, outputs: int = 1) -> sj.MLP:
    return sj.MLP([inputs, *[8] * (depth - 1), outputs], activation, key=KEY)


def squared_relu(z):
    return jnp.square(jax.nn.relu(z))


class Convolutions(eqx.Module):
    """Two convolutions and a linear layer on images of 8 × 8."""

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    head: eqx.nn.Linear
    activation: object = eqx.field(static=True)

    def __init__(self, activation, use_bias=False):
        keys = jax.random.split(KEY, 3)
        self.activation = activation
        self.conv1 = eqx.nn.Conv2d(1, 4, 3, padding=1, use_bias=use_bias, key=keys[0])
        self.conv2 = eqx.nn.Conv2d(4, 4, 3, stride=2, padding=1, use_bias=use_bias, key=keys[1])
        self.head = eqx.nn.Linear(64, 10, use_bias=use_bias, key=keys[2])

    def __call__(self, x):
        h = self.activation(self.conv1(x.reshape(1, 8, 8)))
        return self.head(self.activation(self.conv2(h)).ravel())


class Residual(eqx.Module):
    """An embedding, four blocks `h + W tanh(h)`, and a linear layer."""

    weights: list

    def __init__(self):
        keys = jax.random.split(KEY, 6)
        shapes = [(8, 64), *[(8, 8)] * 4, (10, 8)]
        self.weights = [jax.random.normal(k, s) / np.sqrt(s[1]) for k, s in zip(keys, shapes, strict=True)]

    def __call__(self, x):
        h = self.weights[0] @ x
        for w in self.weights[1:-1]:
            h = h + w @ jnp.tanh(h)
        return self.weights[-1] @ h


class Arrays(eqx.Module):
    """Arrays that a loss of its own puts together."""

    u: jax.Array
    v: jax.Array


def diagonal_loss(m):
    """Sparse regression by `u³ − v³`."""
    x = jax.random.normal(jax.random.key(1), (20, 30))
    return 0.5 * jnp.mean((x @ (m.u**3 - m.v**3) - 3 * x[:, 1] + 2 * x[:, 5]) ** 2)


class Attention(eqx.Module):
    """One head of linear attention for regression in context, `v · (K β)(Q x)`."""

    v: jax.Array
    k: jax.Array
    q: jax.Array


def attention_loss(m):
    keys = jax.random.split(jax.random.key(2), 2)
    x, w = jax.random.normal(keys[0], (100, 17, 3)), jax.random.normal(keys[1], (100, 3))
    y = jnp.einsum("bnd,bd->bn", x, w)
    beta = jnp.mean(y[:, :-1, None] * x[:, :-1], axis=1)
    return 0.5 * jnp.mean((jnp.sum(m.v * (beta @ m.k.T) * (x[:, -1] @ m.q.T), axis=1) - y[:, -1]) ** 2)


def arrays() -> Arrays:
    return Arrays(*(jnp.abs(jax.random.normal(key, (30,))) for key in jax.random.split(KEY)))


def attention() -> Attention:
    keys = jax.random.split(KEY, 3)
    return Attention(*(jax.random.normal(k, s) for k, s in zip(keys, [(4,), (4, 3), (4, 3)], strict=True)))
