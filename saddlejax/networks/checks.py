"""What may call itself a perceptron, and what is told to everything else."""

import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .. import _check
from .elementwise import check_elementwise
from .network import AbstractNetwork

_INSTEAD = (
    "For any other model use what needs no layers: the energy_error of its flow, saddlejax.escape_direction(task, model) "
    "and saddlejax.saddle_order(model, task)."
)


def check_weights(argument: str, weights: Sequence[Array | np.ndarray]) -> None:
    """Refuse weights that are not matrices, or whose neighbours do not fit."""
    if len(weights) == 0:
        raise _check.fail(argument, "hold at least one matrix", "empty")
    for layer, w in enumerate(weights):
        if w.ndim != 2 or 0 in w.shape:
            raise _check.fail(f"{argument}[{layer}]", "be a matrix (fan_out, fan_in)", f"of shape {w.shape}")
        if not jnp.issubdtype(w.dtype, jnp.integer):
            _check.float_type(f"{argument}[{layer}]", w.dtype)
    for layer, (below, above) in enumerate(itertools.pairwise(weights)):
        if below.shape[0] != above.shape[1]:
            raise _check.fail(
                argument,
                "fit together: the columns of a layer are the rows of the one below",
                f"{below.shape} in layer {layer} and {above.shape} in layer {layer + 1}",
            )


def check_type(net: object, argument: str = "net") -> None:
    """Refuse what is no network of this package."""
    if isinstance(net, AbstractNetwork):
        return
    name = type(net).__name__
    if not isinstance(net, eqx.Module):
        raise _check.fail(argument, "be a network such as saddlejax.MLP", name)
    raise _check.fail(
        argument,
        "be a network of saddlejax, such as saddlejax.MLP",
        f"another Equinox module, {type(net).__module__}.{name}",
        "Of a perceptron make a network without biases: saddlejax.MLP.from_weights([layer.weight for layer in "
        f"mlp.layers], activation). {_INSTEAD}",
    )


def check_network(net: object, argument: str = "net") -> None:
    """Refuse what is no network, or one that its `weights`, `matrices()` and `activation` do not describe."""
    check_type(net, argument)
    assert isinstance(net, AbstractNetwork)
    if (found := _beyond_weights(net)) is not None:
        raise _check.fail(
            argument,
            "be the perceptron that its weights, its matrices() and its activation describe",
            f"a {type(net).__name__}{found}",
            _INSTEAD,
        )
    check_weights(f"{argument}.weights", net.weights)
    for layer, w in enumerate(net.weights):
        _check.float_type(f"{argument}.weights[{layer}]", w.dtype)
    check_elementwise(net.activation)


def is_perceptron(model: object) -> bool:
    """Whether a model computes what its `weights`, `matrices()` and `activation` say, and nothing else.

    A network that overrides `__call__`, that holds arrays which `matrices()` does not use, or that shares weights between
    layers is a model like any other.
    """
    return isinstance(model, AbstractNetwork) and _beyond_weights(model) is None


def _beyond_weights(net: AbstractNetwork) -> str | None:
    """What makes a network more than its weights, matrices and activation say; None where nothing does."""
    if type(net).__call__ is not AbstractNetwork.__call__:
        return ", which overrides __call__"
    shapes, expected = [w.shape for w in net.weights], [m.shape for m in eqx.filter_eval_shape(net.matrices)]
    if shapes != expected:
        return f" with weights of shapes {shapes} and matrices of shapes {expected}, as where layers share weights"
    if (unused := _unused_arrays(net)) > 0:
        return f", which holds {unused} floating-point arrays that matrices() does not use, such as biases"
    return None


def _unused_arrays(net: AbstractNetwork) -> int:
    """How many floating-point arrays a network holds that neither its matrices nor its activation use."""
    known = {id(leaf) for leaf in jax.tree.leaves((net.weights, net.activation))}
    others, rest = eqx.partition(net, lambda leaf: eqx.is_inexact_array(leaf) and id(leaf) not in known)
    if not (leaves := jax.tree.leaves(others)):
        return 0
    program = jax.make_jaxpr(lambda others: eqx.combine(others, rest).matrices())(others).jaxpr
    used = {id(variable) for equation in program.eqns for variable in equation.invars}
    used |= {id(variable) for variable in program.outvars}
    return len(leaves) - sum(id(variable) in used for variable in program.invars)
