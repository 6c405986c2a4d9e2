"""A sweep written down in a TOML file."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from .. import _check, tasks
from ..flow import Escape, Loss, Time
from ..flow.until import AbstractUntil
from ..saddle import escape_direction
from ..tasks.task import Task

TABLES = {
    "task": ("data", "samples"),
    "grid": ("width", "depth", "activation", "bottleneck", "scale", "seed"),
    "flow": ("until", "rtol", "dtype", "max_steps"),
    "direction": ("starts",),
    "run": ("store", "block", "batch", "retries"),
}


def read_specification(path: str | Path) -> tuple[Task, dict[str, Any]]:
    """The task and the further arguments of [`saddlejax.sweep`][] from a file.

    Tables and keys (all but `grid.width` and `grid.depth` may be left out):

    - `[task]`: `data`, "digits" (the default), "openml", a path with MNIST, or an `.npz` file with `x` and
      `y` (see [`saddlejax.tasks.load`][]); `samples`, the first so many.
    - `[grid]`: `width`, `depth`, `activation`, `bottleneck` ("all", a number, or a list of these), `scale`, `seed`, each a
      value or a list; also `scale = {from = 1e-1, to = 1e-5, count = 9}`, spaced geometrically, and `seed = {count = 32}`.
    - `[flow]`: `until`, "escape", `{loss_fraction = 0.5}`, `{time = 1e7}` or `{loss = 0.01}`; `rtol`, `dtype`, `max_steps`.
    - `[direction]` instead of `[flow]`: escape directions; `starts`.
    - `[run]`: `store`, by default next to the file, with the ending .zarr in place of its own; `block`, `batch`, `retries`.

    **Raises:** `ValueError` for what is not TOML, unknown tables or keys, and values that make no sense; `OSError` where
    the file cannot be read.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} must be a TOML file, but {error}.") from None
    for table, keys in content.items():
        if table not in TABLES or not isinstance(keys, dict):
            raise ValueError(f"{path} must hold the tables {', '.join(TABLES)}, but it has {table!r}.")
        for key in keys:
            if key not in TABLES[table]:
                raise ValueError(f"[{table}] in {path} must hold {', '.join(TABLES[table])}, but it has {key!r}.")
    if "flow" in content and "direction" in content:
        raise ValueError(f"{path} must hold one of the tables flow and direction, but it has both.")
    grid = dict(content.get("grid", {}))
    for name in ("width", "depth"):
        if name not in grid:
            raise ValueError(f"[grid] in {path} must hold {name}, but it does not.")
    for name, spread in (("scale", _geometric), ("seed", _counted)):
        if isinstance(grid.get(name), dict):
            grid[name] = spread(grid[name])
    options = dict(content.get("flow", content.get("direction", {})))
    if "until" in options:
        options["until"] = _until(options["until"])
    if "direction" in content:
        options["of"] = escape_direction
    run = {"store": str(path.with_suffix(".zarr")), **content.get("run", {})}
    return tasks.load(**content.get("task", {})), {**grid, **options, **run}


def _geometric(table: dict[str, Any]) -> list[float]:
    if set(table) != {"from", "to", "count"}:
        raise _check.fail("scale", "be a number, a list, or {from = …, to = …, count = …}", table)
    _check.positive_number("scale", [table["from"], table["to"]])
    _check.whole_number("scale.count", table["count"])
    return [float(f"{value:.12g}") for value in np.geomspace(table["from"], table["to"], table["count"])]


def _counted(table: dict[str, Any]) -> list[int]:
    if set(table) != {"count"}:
        raise _check.fail("seed", "be a number, a list, or {count = …}", table)
    _check.whole_number("seed.count", table["count"])
    return list(range(table["count"]))


def _until(until: Any) -> AbstractUntil:
    kinds = {"time": Time, "loss": Loss, "loss_fraction": Escape}
    if until == "escape":
        return Escape()
    if isinstance(until, dict) and len(until) == 1:
        (name, value), *_ = until.items()
        if name in kinds:
            return kinds[name](value)
    raise _check.fail("until", 'be "escape", {loss_fraction = …}, {time = …} or {loss = …}', until)
