"""A perceptron together with a task: that they fit, and their common precision."""

import jax.numpy as jnp

from .. import _check
from .._numerics import in_precision
from ..tasks.task import Task
from .checks import check_network
from .network import AbstractNetwork, Net


def check_perceptron_fits(net: AbstractNetwork, task: Task) -> None:
    """Refuse what is no perceptron, one that does not map the task's inputs to its outputs, or that is not finite."""
    check_network(net)
    if not isinstance(task, Task):
        raise _check.fail("task", "be a saddlejax.Task", type(task).__name__)
    ends = (net.sizes[0], net.sizes[-1])
    if ends != (task.in_size, task.out_size):
        raise _check.fail(
            "net",
            f"take {task.in_size} inputs to {task.out_size} outputs, as the task does",
            f"a network from {ends[0]} to {ends[1]}",
            f"Its sizes should be [{task.in_size}, …, {task.out_size}].",
        )
    for layer, w in enumerate(net.weights):
        _check.finite(f"net.weights[{layer}]", w)


def match_precision(net: Net, task: Task) -> tuple[Net, Task]:
    """Network and task in the wider of their two floating-point types."""
    dtype = jnp.result_type(task.x, *net.weights)
    return in_precision(net, dtype), task.astype(dtype)
