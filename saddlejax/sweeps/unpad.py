"""The record of a flow without padding, and measurements brought to one shape for all depths."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..flow import Flow
from .padded import PaddedMLP, remove

Measure = Callable[[Any], Array]
LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def unpad(flow: Flow, depth: int, net: Any) -> Flow:
    """The record of the network of `depth` layers, `net`, from that of the padded one.

    The violations of the imbalance identity between a layer and the missing ones above it add up to that between the
    layer and the next one that is there.
    """
    last = max(depth - 2, 0)
    squares = jnp.square(flow.layer_norms)
    sums = squares[:, 1:] + squares[:, :-1]
    absolute = flow.imbalance_residual * jnp.where(sums == 0, 1, sums)
    absolute = jnp.concatenate([absolute[:, :last], jnp.sum(absolute[:, last:], axis=1, keepdims=True)], axis=1)
    norms = jnp.stack(remove(list(flow.layer_norms.T), depth), axis=1)
    squares = jnp.square(norms)
    sums = squares[:, 1:] + squares[:, :-1]
    changed = {
        "net": net,
        "layer_norms": norms,
        "imbalance": jnp.diff(squares),
        "imbalance_residual": (absolute / jnp.where(sums == 0, 1, sums))[:, : depth - 1],
        "singular_values": None if flow.singular_values is None else tuple(remove(flow.singular_values, depth)),
        "weights": None if flow.weights is None else tuple(remove(flow.weights, depth)),
    }
    names = tuple(changed)
    return eqx.tree_at(
        lambda f: [getattr(f, name) for name in names],
        flow,
        [changed[name] for name in names],
        is_leaf=lambda leaf: leaf is None,
    )


def measure_flow(flow: Flow, measures: Sequence[tuple[str, Measure]]) -> dict[str, Array]:
    """The measurements of the flow of a padded network: each a function of the record without padding.

    Where the shape of a measurement depends on the depth it is filled up with NaN.
    """
    padded = flow.net
    assert isinstance(padded, PaddedMLP)

    def measured(depth: int, net: Any) -> dict[str, Array]:
        small = unpad(flow, depth, net)
        return {name: _traced(name, function, small) for name, function in measures}

    def alone(depth: int) -> dict[str, jax.ShapeDtypeStruct]:
        first = jnp.asarray(0)
        only = PaddedMLP(padded.weights, first, (depth,), padded.activation)
        return jax.eval_shape(lambda: only.branch(measured))

    shapes = common_shapes([alone(depth) for depth in padded.depths])
    return padded.branch(lambda depth, net: fill_up(measured(depth, net), shapes))


def _traced(name: str, function: Measure, flow: Flow) -> Array:
    """The measurement of a flow whose values are not known yet."""
    try:
        return jnp.asarray(function(flow))
    except LOOKS_AT_VALUES as error:
        raise ValueError(
            f"measure[{name!r}] must be a function that JAX can trace, but it looks at the values of the flow "
            f"({type(error).__name__}). Write it with jax.numpy: jnp.where in place of if, no float(), int(), item() or "
            "NumPy. Or keep what it needs by a measure of its own, and look at the values in the results."
        ) from None


def common_shapes(found: Sequence[dict[str, jax.ShapeDtypeStruct]]) -> dict[str, jax.ShapeDtypeStruct]:
    """The least shape with room for all; numbers that need filling up are floating-point ones."""
    common = {}
    for name in found[0]:
        kinds = [one[name] for one in found]
        if len({len(kind.shape) for kind in kinds}) > 1:
            raise ValueError(
                f"measure[{name!r}] must return an array with the same number of axes for every depth, but its shapes "
                f"were {[kind.shape for kind in kinds]}."
            )
        shape = tuple(int(n) for n in np.max([kind.shape for kind in kinds], axis=0)) if kinds[0].shape else ()
        dtype = jnp.result_type(*[kind.dtype for kind in kinds])
        if any(kind.shape != shape for kind in kinds) and not jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.result_type(float)
        common[name] = jax.ShapeDtypeStruct(shape, dtype)
    return common


def fill_up(values: dict[str, Array], shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Arrays of the given shapes, NaN beyond what there is."""

    def filled(value: Array, like: jax.ShapeDtypeStruct) -> Array:
        missing = [(0, wanted - there) for wanted, there in zip(like.shape, value.shape, strict=True)]
        if not any(after for _, after in missing):
            return value.astype(like.dtype)
        return jnp.pad(value.astype(like.dtype), missing, constant_values=jnp.nan)

    return {name: filled(values[name], like) for name, like in shapes.items()}
