"""Problems that several test files share."""

import jax
import jax.numpy as jnp

import saddlejax as sj

TASK_KEY, NET_KEY = jax.random.key(1), jax.random.key(0)


def teacher(samples: int = 100) -> sj.Task:
    """A single-index teacher of ten inputs."""
    return sj.tasks.single_index(jnp.tanh, in_size=10, samples=samples, key=TASK_KEY)


def network(depth: int, activation: str, scale: float, width: int = 32, layers=None) -> sj.MLP:
    """A He-normal network for the teacher, with layers at an init scale."""
    return sj.scale_layers(sj.MLP([10, *[width] * (depth - 1), 1], activation, key=NET_KEY), scale, layers)


HALF = sj.Escape(loss_fraction=0.5)
SMALL = sj.Save(steps=False, singular_values=False)
