"""Sweeps of escape directions."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..saddle import escape_direction
from ..tasks.task import Task
from .describe import describe_task, identify, random_numbers
from .grid import Grid, argument_values
from .measures import Variable, measured
from .problem import AbstractProblem, Output, Point, each_lane

SEEDS = (
    "lane of seed s, depth L: escape_direction(task, [inputs, width, …, width, outputs], activation, starts=starts, "
    "key=jax.random.key(s)) with L weight matrices"
)


@dataclass(frozen=True)
class DirectionProblem(AbstractProblem):
    """The best escape direction for every width, depth, activation and seed of a grid.

    - `fixed`: further arguments of `escape_direction`, and those that do not vary.
    """

    task: Task
    grid: Grid
    variables: tuple[tuple[str, Variable], ...]
    fixed: tuple[tuple[str, Any], ...]

    @functools.cached_property
    def outputs(self) -> dict[str, Output]:
        """The measurements of a lane: shapes and types for the deepest network, without searching."""
        deepest = max(self._values("depth"))
        point = {**self.grid.points(tuple(slice(0, 1) for _ in self.grid.axes))[0], "depth": deepest}
        shapes = jax.eval_shape(lambda: self._measure(point))
        return {
            name: Output(tuple(shapes[name].shape), str(shapes[name].dtype), variable)
            for name, variable in self.variables
        }

    def _values(self, name: str) -> list[Any]:
        return argument_values(self.grid, self.fixed, name)

    def _measure(self, point: Point) -> dict[str, Any]:
        point = {**dict(self.fixed), **point}
        sizes = [self.task.in_size, *[point["width"]] * (point["depth"] - 1), self.task.out_size]
        best = escape_direction(
            self.task, sizes, point["activation"], starts=point["starts"], key=jax.random.key(point["seed"])
        )
        return {name: measured(name, variable.function, best) for name, variable in self.variables}

    def run(self, points: Sequence[Point]) -> dict[str, np.ndarray]:
        """One search after another."""

        def compute(point: Point) -> dict[str, Any]:
            return {**jax.device_get(self._measure(point)), "status": "found"}

        return each_lane(compute, points, self.outputs)

    def specification(self) -> dict[str, Any]:
        """Everything that the numbers depend on."""
        axes = {axis.name: list(axis.labels) for axis in self.grid.axes}
        axes["activation"] = [identify("activation", function) for function in self._values("activation")]
        return {
            "of": "escape_direction",
            "task": describe_task(self.task),
            "random_numbers": random_numbers(),
            "grid": axes,
            **dict(self.fixed),
            "measure": {
                name: identify(f"measure[{name!r}]", one.function) for name, one in self.variables if one.dims is None
            },
        }

    def attributes(self) -> dict[str, str]:
        """Provenance for the attributes of the results."""
        known = {name: str(value) for name, value in self.fixed}
        return {"quantity": "escape direction", "task": str(self.task), **known, "seed_convention": SEEDS}
