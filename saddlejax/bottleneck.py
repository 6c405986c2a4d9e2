"""Which layers of a network are small: its bottleneck."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _check
from ._numerics import safe_norm
from .networks.block_mlp import BlockMLP
from .networks.checks import check_network
from .networks.network import AbstractNetwork, layer_norms
from .objective import Problem

LARGEST_SMALL = 1 / 3
SAME_SCALE = 3.0


def init_scales(net: AbstractNetwork) -> Float[Array, " layers"]:
    """The init scale of every layer, `‖W_l‖_F / √(2 n_l)`: near one for He-normal weights, `ε` after `scale_layers`.

    For a reduced network, the scales of the wide one.
    """
    sizes = net.wide_sizes if isinstance(net, BlockMLP) else net.sizes
    return layer_norms(net) / jnp.sqrt(2 * jnp.asarray(sizes[1:], net.weights[0].dtype))


def group_scales(arrays: Sequence[Array]) -> Float[Array, " groups"]:
    """The init scale of every group: that of a layer of as many rows, and the root mean square with fewer than two axes."""
    rows = [2 * array.shape[0] if array.ndim > 1 else array.size for array in arrays]
    return jnp.stack([safe_norm(array) / jnp.sqrt(count) for array, count in zip(arrays, rows, strict=True)])


def bottleneck_layers(net: AbstractNetwork) -> tuple[int, ...]:
    """The layers, counted from 0, that count as small, where their init scales leave no doubt.

    With the init scale `‖W_l‖_F/√(2 n_l)`, which is near one for He-normal weights, and `ε` the smallest of the network:

    - all layers, where the scales are within a factor of 3 of each other;
    - otherwise the layers below `√ε`, those nearer, as a ratio, to `ε` than to one.

    **Raises:** `ValueError` where that is no clear answer: `ε` is above a third, or some layer lies in the middle,
    between `ε^{2/3}` and `ε^{1/3}`. And while JAX is tracing the weights. Name the layers then, where they are asked for.
    """
    check_network(net)
    if not _check.is_concrete(net.weights):
        raise _check.fail(
            "layers", "be given where the weights are traced", None, "For instance layers=range(net.depth)."
        )
    with jax.ensure_compile_time_eval():
        scales = np.asarray(init_scales(net), float)
    least = np.min(scales)
    if np.max(scales) <= SAME_SCALE * least:
        return tuple(range(net.depth))
    small = tuple(int(layer) for layer in np.flatnonzero(scales <= np.sqrt(least)))
    in_the_middle = (scales > least ** (2 / 3)) & (scales < least ** (1 / 3))
    if least > LARGEST_SMALL or np.any(in_the_middle):
        listed = ", ".join(f"{scale:.3g}" for scale in scales)
        raise _check.fail(
            "layers",
            f"be given where the init scales of the layers, here {listed}, do not tell which of them are small",
            None,
            f"For instance layers={small or tuple(range(net.depth))}, counted from 0.",
        )
    return small


def chosen_layers(net: AbstractNetwork, layers: Sequence[int] | int | None) -> tuple[int, ...]:
    """The layers an argument names, in increasing order, or the bottleneck of the network where it is None."""
    if layers is None:
        return bottleneck_layers(net)
    check_network(net)
    chosen = _check.layer_indices(layers, net.depth)
    if not chosen:
        raise _check.fail("layers", "name at least one layer", list(chosen))
    return tuple(sorted(chosen))


def chosen_groups(
    problem: Problem, layers: Sequence[int] | int | None, where: Callable[[Any], Any] | None
) -> tuple[int, ...]:
    """The groups of parameters that are small, in increasing order: the layers of a perceptron, arrays of any model.

    `layers` or `where` name them; where neither does, they are the bottleneck of a perceptron, and all groups of another
    model.
    """
    parameters = problem.parameters
    if where is not None:
        if layers is not None:
            raise _check.fail("layers", "not be given together with where", repr(layers))
        return tuple(sorted(parameters.indices(where)))
    if problem.perceptron:
        return chosen_layers(problem.model, layers)
    if layers is not None:
        raise _check.fail(
            "layers",
            "choose among the layers of a perceptron such as saddlejax.MLP",
            f"given for a {type(problem.model).__name__}",
            f"Choose the arrays by where=, such as where=lambda m: [m.{parameters.names[0]}].",
        )
    return tuple(range(len(parameters.arrays)))


def scale_groups(problem: Problem, log_factor: float | int | Array, small: tuple[int, ...]) -> Problem:
    """The problem with the small groups multiplied by `exp(log_factor)`."""
    arrays = problem.parameters.arrays
    scaled = tuple(a * jnp.exp(log_factor) if group in small else a for group, a in enumerate(arrays))
    return eqx.tree_at(lambda p: p.parameters.arrays, problem, scaled)
