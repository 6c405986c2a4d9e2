"""Sweeps of gradient flows."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..flow import Escape, Loss, Save, Status, Time
from ..flow._gradient_flow import KINKED_RTOL, SMOOTH_RTOL, STIFF_RTOL
from ..tasks.task import Task
from .describe import describe_task, identify, random_numbers
from .grid import Grid, argument_values
from .lane import Common, LaneValues, Structure, initial_weights
from .measures import Variable
from .problem import AbstractProblem, Output, Point, blank, common_output, record
from .programs import one_lane, run_batch, run_one_by_one, slots_that_fit

SEEDS = (
    "lane of seed s, depth L: MLP([inputs, width, …, width, outputs], activation, key=jax.random.key(s), dtype=dtype) "
    "with L weight matrices; scale_layers(net, scale, layers) with the layers of the bottleneck"
)

DEFAULT_TOLERANCES = f"{SMOOTH_RTOL:g} for smooth activations ({STIFF_RTOL:g} where stiff), {KINKED_RTOL:g} where the slope jumps at zero"


@dataclass(frozen=True)
class FlowProblem(AbstractProblem):
    """The flow of every network of a grid.

    - `task`, `grid`: the axes are width, depth, activation, bottleneck, scale, seed, rtol, until, dtype and such
      further arguments of `gradient_flow` as `solver`.
    - `variables`: what to measure, by name.
    - `save`: the rows kept for custom measurements.
    - `fixed`: the arguments that do not vary.
    - `batch`: how many lanes run together; by default one on a CPU, and what fits in memory on an accelerator.
    """

    task: Task
    grid: Grid
    variables: tuple[tuple[str, Variable], ...]
    save: Save
    fixed: tuple[tuple[str, Any], ...]
    batch: int | None = None

    @functools.cached_property
    def outputs(self) -> dict[str, Output]:
        """The measurements of a lane, with room for those of every network, in the wider of the types that occur."""
        corner = self.grid.points(tuple(slice(0, 1) for _ in self.grid.axes))[0]
        varying = ("dtype", "width", "depth")  # what shapes and types of measurements depend on
        kinds = itertools.product(*[self._values(name) for name in varying])
        found = [self._shapes({**corner, **dict(zip(varying, kind, strict=True))}) for kind in kinds]
        return {
            name: common_output(name, variable, [shapes[name] for shapes in found]) for name, variable in self.variables
        }

    def _shapes(self, point: Point) -> dict[str, Any]:
        structure = self.structure(point)
        lane = self.values(point, structure)
        weights = jax.eval_shape(functools.partial(initial_weights, structure.sizes, structure.dtype), lane)
        return jax.eval_shape(one_lane(structure), self.common(point), weights, lane.rtol)

    def _values(self, name: str) -> list[Any]:
        return argument_values(self.grid, self.fixed, name)

    def structure(self, point: Point) -> Structure:
        """What the program of a lane is compiled for."""
        point = {**dict(self.fixed), **point}
        hidden = [point["width"]] * (point["depth"] - 1)
        options = {name: point[name] for name in ("solver", "max_steps", "stiff") if point.get(name) is not None}
        return Structure(
            sizes=(self.task.in_size, *hidden, self.task.out_size),
            activation=point["activation"],
            dtype=point["dtype"],
            own_rtol=point["rtol"] is not None,
            options=tuple(options.items()),
            variables=self.variables,
        )

    def common(self, point: Point) -> Common:
        """What a lane shares with the others of its block."""
        return Common(self.task, {**dict(self.fixed), **point}["until"], self.save)

    def values(self, point: Point, structure: Structure) -> LaneValues:
        """What distinguishes a lane within its program."""
        point = {**dict(self.fixed), **point}
        layers, depth = point["bottleneck"], point["depth"]
        small = np.isin(np.arange(depth), np.arange(depth) if layers is None else layers)
        scale = np.asarray(point["scale"], structure.dtype)
        rtol = np.asarray(1.0 if point["rtol"] is None else point["rtol"], structure.dtype)
        return LaneValues(key_data(int(point["seed"])), scale, small, rtol)

    def run(self, points: Sequence[Point]) -> dict[str, np.ndarray]:
        """The flows of a block, whose lanes share a program: one after another, or in a batch that is refilled."""
        arguments = [{**dict(self.fixed), **point} for point in points]
        results = blank(self.outputs, len(points))
        there = []
        for lane, point in enumerate(arguments):
            if point["bottleneck"] is not None and max(point["bottleneck"]) >= point["depth"]:
                results["status"][lane] = f"no such network: it has no more than {point['depth']} layers"
            else:
                there.append(lane)
        if not there:
            return results
        structure, common = self.structure(arguments[there[0]]), self.common(arguments[there[0]])
        values = [self.values(arguments[lane], structure) for lane in there]
        alone = jax.default_backend() == "cpu" or not keeps_ends_only(self.save)
        slots = self.batch or (1 if alone else slots_that_fit(structure, common, values[0]))
        if slots == 1:
            found = run_one_by_one(structure, common, values)
        else:
            # Flows from small scales take longest; those that begin last should not be the longest ones.
            order = sorted(range(len(values)), key=lambda lane: float(values[lane].scale))
            there = [there[lane] for lane in order]
            found = run_batch(structure, common, [values[lane] for lane in order], len(points), slots)
        for lane, measurements in zip(there, found, strict=True):
            record(results, lane, {**measurements, "status": Status[measurements["status"]]})
        return results

    def specification(self) -> dict[str, Any]:
        """Everything that the numbers depend on."""
        axes = {axis.name: list(axis.labels) for axis in self.grid.axes}
        for name in ("activation", "until", "solver"):
            if name in axes:
                axes[name] = [_identity(name, value) for value in self._values(name)]
        known = {name: _identity(name, value) for name, value in self.fixed}
        measures = {
            name: identify(f"measure[{name!r}]", one.function) for name, one in self.variables if one.dims is None
        }
        return {
            "of": "gradient_flow",
            "task": describe_task(self.task),
            "random_numbers": random_numbers(),
            "grid": axes,
            **known,
            "save": str(jax.tree.map(lambda a: np.asarray(a).tolist(), self.save)),
            "measure": measures,
        }

    def attributes(self) -> dict[str, str]:
        """Provenance for the attributes of the results."""
        known = {name: str(_plain(name, value)) for name, value in self.fixed if value is not None}
        if None in self._values("rtol"):
            known["rtol"] = DEFAULT_TOLERANCES
        return {"quantity": "gradient flow", "task": str(self.task), **known, "seed_convention": SEEDS}


def keeps_ends_only(save: Save) -> bool:
    """Whether only the first and the last row of a flow are kept, as in a batch."""
    return save.times is None and not save.steps


def _plain(name: str, value: Any) -> Any:
    if name == "until":
        return value.describe()
    if name == "solver":
        return None if value is None else type(value).__name__
    return value


def _identity(name: str, value: Any) -> Any:
    """The value of an argument as the store knows it."""
    if name in ("activation", "solver") and value is not None:
        return identify(name, value)
    if name == "until" and type(value) not in (Escape, Loss, Time):
        return f"{value.describe()}: {identify(name, value)}"
    return _plain(name, value)


@functools.lru_cache(maxsize=4096)
def key_data(seed: int) -> np.ndarray:
    """The data of `jax.random.key(seed)`."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))
