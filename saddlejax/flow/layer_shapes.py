"""The matrices of all layers in one vector: a step of the flow is then a few passes over it, not a few per layer."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..networks.mlp import Weights


class LayerShapes(NamedTuple):
    """The shapes of the layers that a vector holds one after another. Neighbours of one shape are passed over together."""

    shapes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """The number of all weights."""
        return sum(math.prod(shape) for shape in self.shapes)

    def join(self, matrices: Sequence[Array]) -> Float[Array, " weights"]:
        """The vector of given matrices."""
        return jnp.concatenate([matrix.reshape(-1) for matrix in matrices])

    def split(self, joined: Float[Array, " weights"]) -> Weights:
        """The matrices in a vector."""
        return tuple(part[0].reshape(self.shapes[layers.start]) for layers, part in self._parts(joined, 1))

    def inner(self, a: Float[Array, " weights"], b: Float[Array, " weights"]) -> Float[Array, " layers"]:
        """The inner product of two vectors, layer by layer."""
        return jnp.concatenate([jnp.sum(part, axis=1) for _, part in self._parts(a * b)])

    def map(
        self, function: Callable[..., Array], factors: Float[Array, " layers"], *joined: Float[Array, " weights"]
    ) -> Float[Array, " weights"]:
        """An elementwise function of a number for each layer and of the entries of vectors, `function(factor, *entries)`."""
        parts = zip(*[self._parts(vector) for vector in joined], strict=True)
        return jnp.concatenate(
            [function(factors[run[0][0], None], *(part for _, part in run)).reshape(-1) for run in parts]
        )

    def _parts(self, joined: Array, most: int | None = None) -> Iterator[tuple[slice, Array]]:
        """Runs of at most so many layers of one shape: which ones, and their entries, a row each."""
        first = begin = 0
        for (rows, columns), run in itertools.groupby(self.shapes):
            left = len(list(run))
            while left:
                count = min(left, most or left)
                end = begin + count * rows * columns
                yield slice(first, first + count), joined[begin:end].reshape(count, -1)
                first, begin, left = first + count, end, left - count
