"""Any model as groups of parameters: its trainable arrays, one vector of all of them, and the model back again."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from . import _check
from .networks.checks import is_perceptron

Trainable = Callable[[Any], bool] | PyTree
"""Which arrays of a model move: a filter as of `equinox.partition`, a function of a leaf or a tree of truth values."""


class GroupShapes(NamedTuple):
    """The shapes of the groups that a vector holds one after another. Neighbours of one shape are passed over together."""

    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """The number of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def join(self, arrays: Sequence[Array]) -> Float[Array, " parameters"]:
        """The vector of given arrays."""
        return jnp.concatenate([array.reshape(-1) for array in arrays])

    def split(self, joined: Float[Array, " parameters"]) -> tuple[Array, ...]:
        """The arrays in a vector."""
        return tuple(part[0].reshape(self.shapes[groups.start]) for groups, part in self._parts(joined, 1))

    def inner(self, a: Float[Array, " parameters"], b: Float[Array, " parameters"]) -> Float[Array, " groups"]:
        """The inner product of two vectors, group by group."""
        return jnp.concatenate([jnp.sum(part, axis=1) for _, part in self._parts(a * b)])

    def map(
        self, function: Callable[..., Array], factors: Float[Array, " groups"], *joined: Float[Array, " parameters"]
    ) -> Float[Array, " parameters"]:
        """An elementwise function of a number for each group and of the entries of vectors, `function(factor, *entries)`."""
        parts = zip(*[self._parts(vector) for vector in joined], strict=True)
        return jnp.concatenate(
            [function(factors[run[0][0], None], *(part for _, part in run)).reshape(-1) for run in parts]
        )

    def _parts(self, joined: Array, most: int | None = None) -> Iterator[tuple[slice, Array]]:
        """Runs of at most so many groups of one shape: which ones, and their entries, a row each."""
        first = begin = 0
        for shape, run in itertools.groupby(self.shapes):
            left = len(list(run))
            while left:
                count = min(left, most or left)
                end = begin + count * math.prod(shape)
                yield slice(first, first + count), joined[begin:end].reshape(count, -1)
                first, begin, left = first + count, end, left - count


class Parameters(eqx.Module):
    """A model taken apart into the arrays that move, its groups, and the rest of it.

    - `arrays`: the groups, in the order of the leaves of the model: the layers of a perceptron.
    - `rest`: the model without them: frozen arrays, whole numbers, functions.
    - `names`: where each group is in the model, such as `layers[0].bias`.
    """

    arrays: tuple[Array, ...]
    rest: PyTree
    structure: Any = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, model: PyTree, trainable: Trainable | None = None) -> "Parameters":
        """The parameters of a model.

        By default all its floating-point arrays move; of a perceptron, such as [`saddlejax.MLP`][], its `weights`, while
        the arrays of its activation stay as they are.

        **Raises:** `ValueError` where the model has no array that moves.
        """
        moving, rest = eqx.partition(model, trainable_filter(model) if trainable is None else trainable)
        moving, other = eqx.partition(moving, eqx.is_inexact_array)
        rest = eqx.combine(rest, other)
        paths, structure = jax.tree_util.tree_flatten_with_path(moving)
        if not paths:
            raise _check.fail(
                "model",
                "have at least one floating-point array that moves",
                f"a {type(model).__name__} without",
                "Arrays move; Python numbers, whole numbers and static fields do not.",
            )
        names = tuple(jax.tree_util.keystr(path).lstrip(".") for path, _ in paths)
        return cls(tuple(array for _, array in paths), rest, structure, names)

    @property
    def shapes(self) -> GroupShapes:
        """The shapes of the groups."""
        return GroupShapes(tuple(array.shape for array in self.arrays))

    @property
    def model(self) -> PyTree:
        """The model itself."""
        return self.with_arrays(self.arrays)

    def with_arrays(self, arrays: Sequence[Any]) -> PyTree:
        """The model with other arrays in the places of the groups."""
        return eqx.combine(jax.tree.unflatten(self.structure, list(arrays)), self.rest)

    def indices(self, where: Callable[[Any], Any]) -> tuple[int, ...]:
        """Which groups a function of the model returns, such as `lambda m: [m.conv1.weight, m.head]`, in its order.

        **Raises:** `ValueError` where it fails, or returns anything else, nothing, or an array more than once.
        """
        places = self.with_arrays([_Place(index) for index in range(len(self.arrays))])
        rule = "be a function that returns parameter arrays of the model, or modules of them"
        remedy = f"For instance lambda m: [m.{self.names[0]}]. The arrays that move are {', '.join(self.names)}."
        try:
            found = jax.tree.leaves(where(places)) if callable(where) else [where]
        except Exception as error:
            raise _check.fail("where", rule, f"one that failed ({type(error).__name__}: {error})", remedy) from error
        strange = [part for part in found if not isinstance(part, _Place)]
        if strange or not found:
            raise _check.fail(
                "where", rule, f"one that returns {type(strange[0]).__name__ if strange else 'none'}", remedy
            )
        indices = tuple(place.index for place in found)
        if len(set(indices)) != len(indices):
            raise _check.fail("where", "return each array once", f"one that returns {len(indices)} with repetitions")
        return indices


class _Place:
    """What stands for a group while a user's function picks groups out of a model."""

    def __init__(self, index: int):
        self.index = index


def trainable_filter(model: PyTree) -> Trainable:
    """Which leaves of a model move by default: see [`saddlejax.parameters.Parameters`][]."""
    if not is_perceptron(model):
        return eqx.is_inexact_array
    nothing = jax.tree.map(lambda _: False, model)
    return eqx.tree_at(lambda net: net.weights, nothing, replace=tuple(True for _ in model.weights))


def rank(shape: tuple[int, ...]) -> int:
    """The largest rank that a group of this shape can have, as a matrix `(shape[0], rest)`; one for vectors and numbers."""
    return 1 if len(shape) < 2 else min(shape[0], math.prod(shape[1:]))
