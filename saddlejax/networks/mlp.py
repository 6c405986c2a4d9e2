"""Bias-free networks as Equinox modules, and their initial scales."""

import abc
import itertools
from collections.abc import Sequence
from functools import singledispatch
from typing import Self, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .. import _check
from .._numerics import safe_norm as safe_norm
from .activations import Activation, ActivationParts, activation_name
from .elementwise import check_elementwise, is_array
from .random_weights import standard_normal

Weights = tuple[Float[Array, "fan_out fan_in"], ...]
Net = TypeVar("Net", bound="AbstractNetwork")


class AbstractNetwork(eqx.Module):
    """A bias-free network `z_l = M_l h_{l−1}`, `h_l = σ(z_l)` for `l < L`, `f(x) = z_L`.

    `weights` are the parameters that a gradient flow moves, one matrix a layer; `matrices()` are the `M_l`
    they stand for, of the same shapes: the weights themselves in an ordinary network. Arrays of the activation, and
    other arrays that `matrices()` uses, are fixed numbers: one can differentiate by them, but no flow moves them.

    A subclass says by `matrices()` what it computes. One that overrides `__call__`, or that holds arrays (such as
    biases) which `matrices()` does not use, is refused: flows would follow another network than the one it is.
    """

    weights: eqx.AbstractVar[Weights]
    activation: eqx.AbstractVar[Activation]

    @abc.abstractmethod
    def matrices(self) -> Weights:
        """The matrices `M_l`, of shape `(n_l, n_{l−1})`."""

    @property
    def depth(self) -> int:
        """Number `L` of weight matrices."""
        return len(self.weights)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The `L + 1` sizes of the layers, input and output included."""
        return (self.weights[0].shape[-1], *(w.shape[-2] for w in self.weights))

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """The output `f(x)` for one sample."""
        return predict(self, x)

    def with_weights(self, weights: Sequence[Array]) -> Self:
        """The same network with other weights."""
        return eqx.tree_at(lambda net: net.weights, self, tuple(weights))


class AbstractNetworkOfParts(AbstractNetwork):
    """A network that is a tree of arrays, whatever its activation: it keeps the arrays and the rest of it apart."""

    activation_parts: eqx.AbstractVar[ActivationParts]

    @property  # type: ignore[misc]  # in Equinox a property may stand for an AbstractVar
    def activation(self) -> Activation:  # type: ignore[override]
        """The activation `σ`."""
        return self.activation_parts.whole


class MLP(AbstractNetworkOfParts):
    """A multilayer perceptron without biases.

    **Arguments:**

    - `sizes`: the sizes of the layers, `[in_size, width, …, out_size]`; `L = len(sizes) − 1`.
    - `activation`: a name from `saddlejax.ACTIVATIONS` or any elementwise JAX function. An Equinox module with arrays
      serves too: its values may differ between the lanes of a `vmap`, and one can differentiate by them, but training
      moves the weights only.
    - `key`: a JAX random key; the weights are He-normal, `W_l ~ N(0, 2/n_{l−1})`.
    - `dtype`: of the weights, float32 or float64; by default JAX's default float type.

    `weights` is a tuple of `L` arrays of shape `(fan_out, fan_in)`.

    **Raises:** `ValueError` for fewer than two sizes, sizes below one, an unknown activation or one that does not act
    entry by entry, and for weights in half precision.
    """

    weights: Weights
    activation_parts: ActivationParts

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Activation = "relu",
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype | type | None = None,
    ):
        sizes = _check.layer_sizes("sizes", sizes)
        dtype = jnp.result_type(float) if dtype is None else dtype
        _check.float_type("dtype", dtype)
        self.activation_parts = ActivationParts(activation)
        try:
            keys = jax.random.split(key, len(sizes) - 1)
        except TypeError:
            raise _check.fail("key", "be a JAX random key such as jax.random.key(0)", repr(key)) from None
        shapes = zip(sizes[1:], sizes[:-1], strict=True)
        self.weights = tuple(he_normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True))

    @classmethod
    def from_weights(cls, weights: Sequence[Array], activation: str | Activation = "relu") -> "MLP":
        """The network with given weights, a sequence of `L` arrays of shape `(fan_out, fan_in)`.

        **Raises:** `ValueError` where the shapes of neighbouring layers do not fit, for weights in half precision or
        that are not real, and for activations as `MLP` does.
        """
        arrays = _arrays("weights", weights)
        check_weights("weights", arrays)
        dtype = jnp.result_type(*arrays)
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
        net = cls((1, 1), activation, key=jax.random.key(0))
        return eqx.tree_at(lambda n: n.weights, net, tuple(w.astype(dtype) for w in arrays))

    def matrices(self) -> Weights:
        """The weights."""
        return self.weights

    def __str__(self) -> str:
        sizes = "-".join(map(str, self.sizes))
        return f"MLP {sizes}, {activation_name(self.activation)}, {self.weights[0].dtype}"


def he_normal(key: PRNGKeyArray, shape: tuple[int, int], dtype: jnp.dtype | type) -> Float[Array, "fan_out fan_in"]:
    """The initial weights of a layer, `N(0, 2/fan_in)`."""
    return jnp.sqrt(jnp.asarray(2 / shape[1], dtype)) * standard_normal(key, shape, dtype)


def check_weights(argument: str, weights: Sequence[Array]) -> None:
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


def _arrays(argument: str, weights: Sequence[Array]) -> list[Array]:
    try:
        return [jnp.asarray(w) for w in weights]
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise _check.fail(
            argument, "be a sequence of matrices", f"of type {type(weights).__name__} ({reason})"
        ) from error


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
        "mlp.layers], activation). For other models see 'A network' on the page on extending saddlejax.",
    )


def check_network(net: object, argument: str = "net") -> None:
    """Refuse what is no network, or one that its `weights`, `matrices()` and `activation` do not describe."""
    check_type(net, argument)
    assert isinstance(net, AbstractNetwork)
    name = type(net).__name__
    if type(net).__call__ is not AbstractNetwork.__call__:
        raise _check.fail(
            argument,
            "be the network that its matrices() and its activation describe",
            f"a {name}, which overrides __call__",
            "A flow would follow the network without that. Say by matrices() what it computes.",
        )
    matrices = net.matrices() if isinstance(net, MLP) else eqx.filter_eval_shape(net.matrices)
    shapes, expected = [w.shape for w in net.weights], [m.shape for m in matrices]
    if shapes != expected:
        raise _check.fail(
            argument,
            "have a matrix of the same shape for each of its weights",
            f"a {name} with weights of shapes {shapes} and matrices of shapes {expected}",
            "Layers that share weights are not supported.",
        )
    check_weights(f"{argument}.weights", net.weights)
    for layer, w in enumerate(net.weights):
        _check.float_type(f"{argument}.weights[{layer}]", w.dtype)
    if (unused := _unused_arrays(net)) > 0:
        raise _check.fail(
            argument,
            "hold no floating-point arrays but its weights, those of its activation, and those that matrices() uses",
            f"a {name} with {unused} more, such as biases",
            "They would be left out of what is computed and would not be trained. Networks have no biases here.",
        )
    check_elementwise(net.activation)


def is_perceptron(net: AbstractNetwork) -> bool:
    """Whether a network computes what its `weights`, `matrices()` and `activation` say, and nothing else.

    One that overrides `__call__`, or that holds arrays which `matrices()` does not use, is a model like any other.
    """
    return type(net).__call__ is AbstractNetwork.__call__ and _unused_arrays(net) == 0


def _unused_arrays(net: AbstractNetwork) -> int:
    """How many floating-point arrays a network holds that have no part in what it computes."""
    known = {id(leaf) for leaf in jax.tree.leaves((net.weights, net.activation))}
    others, rest = eqx.partition(net, lambda leaf: eqx.is_inexact_array(leaf) and id(leaf) not in known)
    if not (leaves := jax.tree.leaves(others)):
        return 0
    program = jax.make_jaxpr(lambda others: eqx.combine(others, rest).matrices())(others).jaxpr
    used = {id(variable) for equation in program.eqns for variable in equation.invars}
    used |= {id(variable) for variable in program.outvars}
    return len(leaves) - sum(id(variable) in used for variable in program.invars)


def cast(net: Net, dtype: jnp.dtype | type | str) -> Net:
    """The same network with its floating-point arrays, those of its activation included, in another precision."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, net
    )


def preactivations(net: AbstractNetwork, x: Float[Array, "*batch in"]) -> list[Float[Array, "*batch _"]]:
    """The pre-activations `z_1 … z_L` for a sample or a batch; the last one is the output.

    Matrix products run at full precision whatever the global setting.
    """
    h = x
    zs: list[Array] = []
    for layer, matrix in enumerate(net.matrices()):
        h = net.activation(zs[-1]) if layer > 0 else h
        zs.append(jnp.matmul(h, matrix.T, precision="highest"))
    return zs


@singledispatch
def predict(net: AbstractNetwork, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """The outputs for a sample or a batch. Networks that store their layers in another way register their own."""
    return preactivations(net, x)[-1]


def scale_layers(net: Net, scale: float | Array, layers: Sequence[int] | int | None = None) -> Net:
    """Multiply layers by `scale`, an init scale `ε`.

    **Arguments:**

    - `net`: any network.
    - `scale`: a positive number for all chosen layers, or one for each of them, in the order of `layers`.
    - `layers`: indices from 0, negative ones from the end; by default every layer. Choosing `r` layers of an
      otherwise He-normal network makes a bottleneck of `r` layers.

    **Returns:** a new network; `net` is unchanged.

    **Raises:** `ValueError` for scales that are not positive, or below the smallest number of the weights' type (1e-38 in
    single precision), which would make them zero; for unknown or repeated layers.
    """
    check_type(net)
    _check.positive_number("scale", scale, "An init scale multiplies the weights; use a small positive one.")
    chosen = _check.layer_indices(layers, net.depth)
    least = float(jnp.finfo(jnp.result_type(*net.weights)).tiny)
    if _check.is_concrete(scale) and np.any(np.asarray(scale, float) < least):
        raise _check.fail(
            "scale",
            f"be at least {least:.2g}, the smallest number of the weights' type",
            scale,
            "Smaller ones would make the weights zero. Use a larger scale or weights in double precision.",
        )
    scales = jnp.asarray(scale)
    if scales.ndim > 1 or (scales.ndim == 1 and scales.shape != (len(chosen),)):
        raise _check.fail(
            "scale", f"be a number or {len(chosen)} numbers, one for each chosen layer", f"of shape {scales.shape}"
        )
    scales = jnp.broadcast_to(scales, (len(chosen),))
    weights = list(net.weights)
    for position, layer in enumerate(chosen):
        weights[layer] = weights[layer] * scales[position].astype(weights[layer].dtype)
    return net.with_weights(weights)


def layer_norms(net: AbstractNetwork) -> Float[Array, " layers"]:
    """The Frobenius norms `‖W_l‖_F`, safe from underflow and overflow of the squares."""
    return jnp.stack([safe_norm(w) for w in net.weights])
