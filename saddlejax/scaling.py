"""Init scales: multiply the layers of a perceptron, or arrays of any model, by small numbers."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from . import _check
from ._numerics import Numbers
from .networks.checks import is_perceptron
from .parameters import Parameters

Model = TypeVar("Model")


def scale_layers(
    model: Model,
    scale: ArrayLike | Numbers,
    layers: Sequence[int] | np.ndarray | int | None = None,
    *,
    where: Callable[[Model], Any] | None = None,
) -> Model:
    """Multiply layers, or other arrays of a model, by `scale`, an init scale `ε`.

    **Arguments:**

    - `model`: any Equinox module.
    - `scale`: a positive number for all chosen arrays, or one for each of them, in the order in which they are chosen.
    - `layers`: which layers of a perceptron such as [`saddlejax.MLP`][], indices from 0, negative ones from the end.
      Choosing `r` layers of an otherwise He-normal network makes a bottleneck of `r` layers.
    - `where`: which arrays of any model: a function of the model that returns an array, or a tree of arrays such as a
      list or a layer. As for `equinox.tree_at`, it must go by the structure of the model, not by values.

    By default all layers of a perceptron, and all floating-point arrays of another model.

    **Returns:** a new model; `model` is unchanged.

    **Raises:** `ValueError` for scales that are not positive, or below the smallest number of an array's type (1e-38 in
    single precision), which would make it zero; for unknown or repeated layers or arrays; and for `layers` of a model
    that is no perceptron.

    **Example:**

    ```python
    mlp = eqx.nn.MLP(10, 1, 8, 2, jax.nn.gelu, key=key)
    small = sj.scale_layers(mlp, 1e-3)
    first_small = sj.scale_layers(mlp, 1e-3, where=lambda m: [m.layers[0].weight, m.layers[1].weight])
    ```
    """
    _check.positive_number("scale", scale, "An init scale multiplies the weights; use a small positive one.")
    if layers is not None and where is not None:
        raise _check.fail("layers", "not be given together with where", repr(layers))
    if layers is not None and not is_perceptron(model):
        raise _check.fail(
            "layers",
            "choose among the layers of a perceptron such as saddlejax.MLP",
            f"given for a {type(model).__name__}",
            "Choose the arrays by where=, such as where=lambda m: [m.layers[0].weight].",
        )
    parameters = Parameters.of(model, None if where is None else eqx.is_inexact_array)
    arrays = list(parameters.arrays)
    chosen = _check.layer_indices(layers, len(arrays)) if where is None else parameters.indices(where)
    least = max(float(jnp.finfo(arrays[index].dtype).tiny) for index in chosen)
    if _check.is_concrete(scale) and np.any(np.asarray(scale, float) < least):
        raise _check.fail(
            "scale",
            f"be at least {least:.2g}, the smallest number of the weights' type",
            scale,
            "Smaller ones would make the weights zero. Use a larger scale or weights in double precision.",
        )
    scales = jnp.asarray(scale)
    if scales.ndim > 1 or (scales.ndim == 1 and scales.shape != (len(chosen),)):
        kind = "layer" if where is None and is_perceptron(model) else "array"
        raise _check.fail(
            "scale", f"be a number or {len(chosen)} numbers, one for each chosen {kind}", f"of shape {scales.shape}"
        )
    for index, factor in zip(chosen, jnp.broadcast_to(scales, (len(chosen),)), strict=True):
        arrays[index] = arrays[index] * factor.astype(arrays[index].dtype)
    return parameters.with_arrays(arrays)
