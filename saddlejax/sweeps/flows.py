"""Sweeps of gradient flows."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ..flow import Escape, Loss, Save, Status, Time
from ..flow._gradient_flow import KINKED_RTOL, SMOOTH_RTOL, STIFF_RTOL
from ..tasks.task import Task
from .describe import describe_task, identify, random_numbers
from .grid import Grid, argument_values
from .lane import Common, Group, LaneValues, small_layers
from .measures import Variable
from .problem import AbstractProblem, Output, Point, blank
from .programs import one_lane, run_batch, run_in_turn, slots_that_fit

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
        """The measurements of a lane, in the wider of the types that occur."""
        corner = self.grid.points(tuple(slice(0, 1) for _ in self.grid.axes))[0]
        found: dict[str, Output] = {}
        for shapes in (self._shapes({**corner, **one}) for one in self._kinds()):
            for name, variable in self.variables:
                new = Output(tuple(shapes[name].shape), str(shapes[name].dtype), variable)
                old = found.get(name, new)
                shape = tuple(max(pair) for pair in zip(new.shape, old.shape, strict=True))
                dtype = str(np.result_type(new.dtype, old.dtype))
                found[name] = Output(
                    shape, dtype if new.shape == old.shape else str(np.result_type(dtype, "f4")), variable
                )
        return found

    def _kinds(self) -> list[Point]:
        """One point for each program, as far as shapes and types of measurements can differ."""
        depths = self._values("depth")
        one_of_each = [max(depths), *(depth for depth in depths if depth == 1 < max(depths))]
        kinds: list[Point] = [{}]
        for name, values in (
            ("dtype", self._values("dtype")),
            ("width", self._values("width")),
            ("depth", one_of_each),
        ):
            kinds = [{**kind, name: value} for kind in kinds for value in values]
        return kinds

    def _shapes(self, point: Point) -> dict[str, Any]:
        group, common = self.group(point)
        return jax.eval_shape(one_lane(group), common, self.values(point, group))

    def _values(self, name: str) -> list[Any]:
        return argument_values(self.grid, self.fixed, name)

    def group(self, point: Point) -> tuple[Group, Common]:
        """The program of a lane, and what it shares with the other lanes of its depth."""
        point = {**dict(self.fixed), **point}
        depths = [depth for depth in self._values("depth") if (depth == 1) == (point["depth"] == 1)]
        hidden = (point["width"],) * (max(depths) - 1)
        options = {name: point[name] for name in ("solver", "max_steps", "stiff") if point.get(name) is not None}
        group = Group(
            sizes=(self.task.in_size, *hidden, self.task.out_size),
            depths=tuple(sorted(depths)),
            activation=point["activation"],
            dtype=point["dtype"],
            own_rtol=point["rtol"] is not None,
            options=tuple(options.items()),
            variables=self.variables,
        )
        which = jnp.asarray(group.depths.index(point["depth"]), jnp.int32)
        return group, Common(self.task, point["until"], self.save, which)

    def values(self, point: Point, group: Group) -> LaneValues:
        """What distinguishes a lane within its program."""
        point = {**dict(self.fixed), **point}
        rtol = 1.0 if point["rtol"] is None else point["rtol"]
        small = small_layers(point["bottleneck"], point["depth"], len(group.sizes) - 1)
        scale, rtol = np.asarray(point["scale"], group.dtype), np.asarray(rtol, group.dtype)
        return LaneValues(*cast(tuple[jax.Array, ...], (key_data(int(point["seed"])), scale, small, rtol)))

    def run(self, points: Sequence[Point]) -> dict[str, np.ndarray]:
        """The flows of a block, whose lanes share a program: one after another, or in a batch that is refilled."""
        arguments = [{**dict(self.fixed), **point} for point in points]
        values = blank(self.outputs, len(points))
        there = []
        for lane, point in enumerate(arguments):
            if point["bottleneck"] is not None and max(point["bottleneck"]) >= point["depth"]:
                values["status"][lane] = f"no such network: it has no more than {point['depth']} layers"
            else:
                there.append(lane)
        if not there:
            return values
        group, common = self.group(arguments[there[0]])
        lanes = [self.values(arguments[lane], group) for lane in there]
        slots = self.batch or (1 if jax.default_backend() == "cpu" else slots_that_fit(group, common, lanes[0]))
        if slots == 1:
            found: list[dict[str, Any]] = run_in_turn(group, common, lanes)
        else:
            # Flows from small scales take longest; those that begin last should not be the longest ones.
            order = sorted(range(len(lanes)), key=lambda lane: float(lanes[lane].scale))
            there = [there[lane] for lane in order]
            found = run_batch(group, common, [lanes[lane] for lane in order], len(points), slots)
        for lane, measured in zip(there, found, strict=True):
            measured = {**measured, "status": Status._index_to_message[int(measured["status"])]}
            for name, value in measured.items():
                values[name][lane] = value
        return values

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
