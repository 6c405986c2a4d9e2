"""The results of a sweep: kept in memory, and as a dataset."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from .describe import versions
from .grid import Axis, Block, Grid, size
from .problem import AbstractProblem, blank

if TYPE_CHECKING:
    import xarray as xr

STATUS = "status"


class MemoryStore:
    """Results kept in memory."""

    def __init__(self, problem: AbstractProblem, block_shape: Sequence[int]):
        self.block_shape = tuple(block_shape)
        self.problem = problem
        grid = problem.grid
        values = blank(problem.outputs, grid.lanes)
        self.values = {name: value.reshape(*grid.shape, *value.shape[1:]) for name, value in values.items()}

    def missing(self) -> list[Block]:
        """The blocks yet to compute."""
        return list(self.problem.grid.blocks(self.block_shape))

    def write(self, block: Block, values: dict[str, np.ndarray]) -> None:
        """Keep the results of a block."""
        for name, value in values.items():
            self.values[name][block] = value.reshape(*size(block), *value.shape[1:])

    def dataset(self) -> "xr.Dataset":
        """All results."""
        return assemble(self.problem, self.values, provenance(self.problem))


def assemble(problem: AbstractProblem, values: dict[str, np.ndarray], attributes: dict[str, Any]) -> "xr.Dataset":
    """The results as a dataset."""
    import xarray as xr  # here, since it takes long

    grid = problem.grid
    data = {
        name: (dims(grid, name, output.variable.dims, output.shape), values[name], attributes_of(output.variable))
        for name, output in problem.outputs.items()
    }
    words = np.asarray(values[STATUS].tolist(), dtype=str)
    coordinates = {axis.name: (axis.name, labels(axis), {"long_name": axis.meaning}) for axis in grid.axes}
    return xr.Dataset({STATUS: (grid.dims, words, {"long_name": "outcome"}), **data}, coordinates, attrs=attributes)


def provenance(problem: AbstractProblem) -> dict[str, str]:
    """The attributes of the results."""
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    return {**problem.attributes(), **versions(), "begun": begun}


def dims(grid: Grid, name: str, own: tuple[str, ...] | None, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The names of the axes of a variable, its own ones last."""
    return (*grid.dims, *(own if own is not None else [f"{name}_{axis}" for axis in range(len(shape))]))


def attributes_of(variable: Any) -> dict[str, Any]:
    """Meaning and unit of a variable."""
    return {"long_name": variable.meaning, "units": variable.units}


def labels(axis: Axis) -> np.ndarray:
    """The labels of an axis."""
    return np.asarray(axis.labels)
