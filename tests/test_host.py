"""What runs on the host says so, in its docstring and in an error under a transformation."""

import jax
import jax.numpy as jnp
import pytest

import saddlejax as sj

TASK = sj.tasks.linear_teacher([2.0, 1.0], in_size=3)
NET = sj.scale_layers(sj.MLP([3, 4, 2], "identity", key=jax.random.key(0)), 1e-2)


def flow_at(scale: jax.Array) -> sj.Flow:
    return sj.gradient_flow(sj.scale_layers(NET, scale), TASK, sj.Loss(1.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: flow_at(x).plateaus(),
        lambda x: sj.manifold.balanced_log_times(x * jnp.arange(1.0, 4.0), jnp.sin, "tanh", 3, 3),
        lambda x: sj.plot.flow(flow_at(x)),
        lambda x: sj.plot.staircase(flow_at(x)),
        lambda x: sj.plot.singular_values([x * w for w in NET.weights]),
    ],
)
def test_functions_of_the_host_refuse_traced_values_in_words(call):
    with pytest.raises(ValueError, match=r"runs on the host and cannot be used under jax\.jit"):
        jax.jit(call)(1.0)


def test_functions_of_the_host_say_so():
    host = (sj.staircase.plateaus, sj.manifold.balanced_log_times, sj.sweep, sj.escape_scan, sj.collapse)
    for function in (*host, sj.scale_for_steps, sj.bottleneck_for_steps):
        assert "on the host" in " ".join(function.__doc__.split()), function.__name__
