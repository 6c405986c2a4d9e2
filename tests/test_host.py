"""What runs on the host says so, in its docstring and in an error under a transformation."""

import jax
import jax.numpy as jnp
import pytest

import saddlejax as sj

TASK = sj.tasks.linear_teacher([2.0, 1.0], in_size=3)
NET = sj.scale_layers(sj.MLP([3, 4, 2], "identity", key=jax.random.key(0)), 1e-2)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda x: flow_at(x).plateaus(), sj.staircase.plateaus),
        (
            lambda x: sj.manifold.balanced_log_times(x * jnp.arange(1.0, 4.0), jnp.sin, "tanh", 3, 3),
            sj.manifold.balanced_log_times,
        ),
        (lambda x: sj.plot.flow(flow_at(x)), None),
        (lambda x: sj.plot.staircase(flow_at(x)), None),
        (lambda x: sj.plot.singular_values([x * w for w in NET.weights]), None),
    ],
)
def test_functions_of_the_host_refuse_traced_values_in_words(call, argument):
    with pytest.raises(ValueError, match=r"runs on the host and cannot be used under jax.jit"):
        jax.jit(call)(1.0)
    assert argument is None or "runs\n    on the host" in argument.__doc__ or "runs on the host" in argument.__doc__


def flow_at(scale: jax.Array) -> sj.Flow:
    return sj.gradient_flow(sj.scale_layers(NET, scale), TASK, sj.Loss(1.0))
