"""What a sweep computes: the interface of a problem, and the outcome of a block of its lanes."""

import abc
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._host.stopping import check_stopped
from .grid import Grid
from .measures import Variable

Point = dict[str, Any]
FAILED = "failed: "


class Output(NamedTuple):
    """A measurement as it is stored: shape and type for one lane, and what it means."""

    shape: tuple[int, ...]
    dtype: str
    variable: Variable


class AbstractProblem(abc.ABC):
    """A grid of lanes and the way to compute some of them. Can be pickled, so that any machine can do it."""

    grid: Grid

    @property
    @abc.abstractmethod
    def outputs(self) -> dict[str, Output]:
        """The measurements of a lane."""

    @abc.abstractmethod
    def run(self, points: Sequence[Point]) -> dict[str, np.ndarray]:
        """The measurements of the lanes of a block, stacked, and their `status` in words."""

    @abc.abstractmethod
    def specification(self) -> dict[str, Any]:
        """Everything that the numbers depend on, in the types of JSON."""

    @abc.abstractmethod
    def attributes(self) -> dict[str, str]:
        """Provenance for the attributes of the results."""


def blank(outputs: dict[str, Output], lanes: int, status: str = "") -> dict[str, np.ndarray]:
    """Measurements that are not there: NaN, or −1 for counts."""
    values = {
        name: np.full((lanes, *output.shape), fill_value(output.dtype), output.dtype)
        for name, output in outputs.items()
    }
    return {**values, "status": np.full(lanes, status, dtype=object)}


def record(values: dict[str, np.ndarray], lane: int, measured: dict[str, Any]) -> None:
    """Enter the measurements of a lane. An array that is smaller than its place begins there; the rest stays as it is."""
    for name, value in measured.items():
        place: tuple[Any, ...] = (lane, *(slice(length) for length in np.shape(value)))
        values[name][place] = value


def common_output(name: str, variable: Variable, found: Sequence[jax.ShapeDtypeStruct]) -> Output:
    """A measurement with room for all the shapes that it has; numbers that have to be filled up with NaN are floating-point ones.

    **Raises:** `ValueError` where the shapes differ in the number of axes.
    """
    shapes = [one.shape for one in found]
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(
            f"measure[{name!r}] must return an array with the same number of axes for every network, but its shapes were "
            f"{sorted(set(shapes))}."
        )
    dtype = jnp.result_type(*[one.dtype for one in found])
    if len(set(shapes)) > 1 and not jnp.issubdtype(dtype, jnp.inexact):
        dtype = jnp.result_type(float)
    return Output(tuple(map(max, zip(*shapes, strict=True))), str(dtype), variable)


def fill_value(dtype: str) -> Any:
    """What stands for a number that is not there."""
    kind = np.dtype(dtype).kind
    return {"f": np.nan, "c": np.nan, "i": -1, "b": False}.get(kind, 0)


def each_lane(
    compute: Callable[[Point], dict[str, Any]], points: Sequence[Point], outputs: dict[str, Output]
) -> dict[str, np.ndarray]:
    """One lane after another; one that raises is recorded with its error and does not harm the others."""
    values = blank(outputs, len(points))
    for lane, point in enumerate(points):
        check_stopped()
        try:
            record(values, lane, compute(point))
        except Exception as error:
            values["status"][lane] = failure(error)
    return values


def failure(error: BaseException) -> str:
    """The outcome of a lane that raised, in one line."""
    return FAILED + " ".join(traceback.format_exception_only(error)[0].split())[:500]
