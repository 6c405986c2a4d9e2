"""Activations whose slope jumps, as named places of a model: what passes them can be seen there, and changed."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, PyTree

from .activations import ACTIVATIONS, Activation
from .elementwise import check_elementwise, is_hashable

FOUND_BY_NAME = (
    jax.nn.relu,
    jax.nn.relu6,
    jax.nn.leaky_relu,
    jax.nn.hard_tanh,
    jax.nn.hard_sigmoid,
    jax.nn.hard_silu,
    jax.nn.selu,
    jnp.abs,
    *(ACTIVATIONS[name] for name in ("relu", "leaky_relu", "abs", "selu", "relu6", "hard_tanh")),
)
"""Functions with kinks that are recognised where a model holds them."""


AtPlace = Callable[[Activation, Array], Array]
"""What is put in the place of an activation: a function of it and of its inputs for all samples, `(samples, *shape)`."""


class Kinked(eqx.Module):
    """An activation whose kinks a flow follows, see [`saddlejax.kinked`][]."""

    function: Activation

    def __call__(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The function itself."""
        return applied(self.function, z)


def kinked(function: Activation) -> Kinked:
    """An activation whose kinks a flow follows, in a model of one's own.

    A gradient flow *slides* along the kinks of its activations, the places where their slope jumps, with slopes between
    those of the two sides. A flow can follow that where it knows where kinks are: those of perceptrons, and of every
    activation that a model holds as an attribute, such as `eqx.nn.MLP(..., activation=jax.nn.relu)`. Wrap what is called
    by name in a `__call__`:

    ```python
    relu = saddlejax.kinked(jax.nn.relu)


    class Net(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.Linear

        def __call__(self, x):
            return self.second(relu(self.first(x)))
    ```

    The value is that of the function. It may be called in several places, and within `jax.vmap`, but not within `jax.jit`,
    `jax.checkpoint`, `jax.lax.scan` or other control flow inside of the model. Maxima (`jnp.maximum` of two outputs, max
    pooling) are not followed.

    **Arguments:** `function`: an elementwise JAX function, such as `jax.nn.relu`, `jax.nn.hard_tanh` or one's own.

    **Raises:** `ValueError` where it does not act entry by entry.
    """
    check_elementwise(function)
    return function if isinstance(function, Kinked) else Kinked(function)


def applied(activation: Activation, z: Array) -> Array:
    """An activation at a place of a model: its values, or what is put there while a model is looked at."""
    looks = _looks()
    if not looks:
        return activation(z)
    at_place, token = looks[-1]

    # A model maps one sample, in which an activation may sit within further maps, over neurons for instance. Each map
    # passes on its whole axis, until that of the samples is reached, which is the one that the token has.
    @custom_vmap
    def place(z: Array, token: Array) -> Array:
        del token
        return activation(z)

    @place.def_vmap
    def whole_axis(size: int, batched: list[bool], z: Array, token: Array) -> tuple[Array, bool]:
        z = z if batched[0] else jnp.broadcast_to(z, (size, *z.shape))
        return (at_place(activation, z) if batched[1] else place(z, token)), True

    return place(z, token)


def outputs_seen(model: PyTree, x: Float[Array, "samples ..."], at_place: AtPlace) -> Float[Array, "samples out"]:
    """What a model puts out for all samples, with something else in the places of its activations.

    Places are activations of perceptrons, what is wrapped by [`saddlejax.kinked`][], and known functions with kinks that
    the model holds; they come in the order in which the model calls them.
    """
    model = jax.tree.map(_named, model)

    def one(x: Array, token: Array) -> Array:
        with _looking(at_place, token):
            return model(x)

    with jax.default_matmul_precision("highest"):
        return jax.vmap(one)(x, jnp.zeros(len(x), x.dtype))


def _named(leaf: Any) -> Any:
    """A leaf of a model; a known function with kinks as a place."""
    known = callable(leaf) and is_hashable(leaf) and any(leaf is function for function in FOUND_BY_NAME)
    return Kinked(leaf) if known else leaf


_state = threading.local()


def _looks() -> list[tuple[AtPlace, Array]]:
    """What is being put in the places of activations in this thread, the innermost last."""
    if not hasattr(_state, "looks"):
        _state.looks = []
    return _state.looks


@contextlib.contextmanager
def _looking(at_place: Callable[..., Array], token: Array) -> Iterator[None]:
    _looks().append((at_place, token))
    try:
        yield
    finally:
        _looks().pop()
