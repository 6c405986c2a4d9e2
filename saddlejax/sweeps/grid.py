"""The grid of a sweep: named axes, their values, and the blocks in which it is computed and stored."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _check

Block = tuple[slice, ...]


@dataclass(frozen=True)
class Axis:
    """A dimension of the results.

    - `name`: the argument that varies.
    - `values`: what it takes, as Python objects.
    - `labels`: the coordinate: the same as numbers or strings.
    - `together`: whether lanes that differ here may lie in one block.
    - `meaning`: for the attributes of the coordinate.
    """

    name: str
    values: tuple[Any, ...]
    labels: tuple[Any, ...]
    together: bool
    meaning: str

    def __post_init__(self) -> None:
        if len(self.values) == 0:
            raise _check.fail(self.name, "hold at least one value", "empty")
        repeated = [label for label, times in Counter(self.labels).items() if times > 1]
        if repeated:
            raise _check.fail(
                self.name,
                "name each value once",
                f"{list(self.labels)}, with {sorted(repeated)} repeated",
                "A function is known by its __name__: give each one its own, f.__name__ = 'steep'. An object of a class "
                "is known by a property __name__ or the name of its class."
                if self.name == "activation"
                else "",
            )


@dataclass(frozen=True)
class Grid:
    """The product of some axes; a lane is one of its points."""

    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(len(axis.values) for axis in self.axes)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(axis.name for axis in self.axes)

    @property
    def lanes(self) -> int:
        """The number of points."""
        return math.prod(self.shape)

    def block_shape(self, most: int) -> tuple[int, ...]:
        """Blocks of at most so many lanes, as long as possible along the last axes."""
        shape: list[int] = []
        for axis in reversed(self.axes):
            length = min(len(axis.values), most) if axis.together else 1
            # Blocks of equal length waste least.
            length = math.ceil(len(axis.values) / math.ceil(len(axis.values) / length))
            shape.append(length)
            most = max(1, most // length)
        return tuple(reversed(shape))

    def blocks(self, block_shape: Sequence[int]) -> Iterator[Block]:
        """The blocks of the grid; the last ones along an axis may be shorter."""
        starts = [range(0, length, step) for length, step in zip(self.shape, block_shape, strict=True)]
        for corner in itertools.product(*starts):
            ends = zip(corner, block_shape, self.shape, strict=True)
            yield tuple(slice(start, min(start + step, length)) for start, step, length in ends)

    def points(self, block: Block) -> list[dict[str, Any]]:
        """The arguments of every lane of a block, the last axis fastest."""
        values = [axis.values[part] for axis, part in zip(self.axes, block, strict=True)]
        return [dict(zip(self.dims, point, strict=True)) for point in itertools.product(*values)]


def argument_values(grid: Grid, fixed: Sequence[tuple[str, Any]], name: str) -> list[Any]:
    """What an argument takes: the values of its axis, or the one that does not vary."""
    for axis in grid.axes:
        if axis.name == name:
            return list(axis.values)
    return [dict(fixed)[name]]


def size(block: Block) -> tuple[int, ...]:
    """The shape of a block."""
    return tuple(part.stop - part.start for part in block)
