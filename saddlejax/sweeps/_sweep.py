"""The public call: a grid of flows or escape directions."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices

from .. import _check
from .._host.threads import available_cores
from ..flow import Escape, Save, gradient_flow
from ..flow.until import AbstractUntil
from ..networks.activations import Activation, activation_name, resolve_activation
from ..saddle import escape_direction
from ..tasks.task import Task
from .directions import DirectionProblem
from .execute import Progress, execute
from .flows import FlowProblem, keeps_ends_only
from .grid import Axis, Grid
from .identity import described
from .measures import DIRECTION_VARIABLES, FLOW_VARIABLES, custom
from .problem import AbstractProblem
from .programs import MOST_SLOTS
from .results import MemoryStore

if TYPE_CHECKING:
    import xarray as xr

    from .store import ZarrStore

Measure = Callable[[Any], Any]
MOST_LANES = 64
BATCHES_A_BLOCK = 8


def sweep(
    task: Task,
    *,
    width: int | Sequence[int],
    depth: int | Sequence[int],
    activation: str | Activation | Sequence[str | Activation] = "relu",
    bottleneck: Any = None,
    scale: float | Iterable[float] | None = None,
    seed: int | Iterable[int] = 0,
    of: Callable[..., Any] = gradient_flow,
    measure: dict[str, Measure] | None = None,
    store: str | Path | None = None,
    executor: Executor | None = None,
    block: int | None = None,
    batch: int | None = None,
    retries: int = 2,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options: Any,
) -> "xr.Dataset":
    """Gradient flows, or escape directions, over a grid of networks.

    Every argument of the grid is a value or a list of values; the results have a dimension for each list. Runs on the
    host: not under `jax.jit`, `jax.vmap` or `jax.grad`.

    **Arguments:**

    - `task`: a [`saddlejax.Task`][].
    - `width`, `depth`: size of the hidden layers, and number of weight matrices.
    - `activation`: names or elementwise JAX functions.
    - `bottleneck`: which layers start small: a number `r` (the first `r`), a tuple of indices, or None for all of them.
      Where a network has fewer layers its lane says so in `status`.
    - `scale`: the init scale `ε` of these layers, by default 1.
    - `seed`: the network of seed `s` is `MLP(sizes, activation, key=jax.random.key(s))`.
    - `of`: `saddlejax.gradient_flow` (the default) or `saddlejax.escape_direction`, which takes neither `bottleneck`
      nor `scale`.
    - `options`: further arguments of `of`. For flows `until`, `rtol`, `dtype`, `max_steps`, `solver`, `stiff`, each a
      value or a list, and `save` ([`saddlejax.Save`][], by default the first and the last row; a batch keeps no more); for directions `starts`.
    - `measure`: functions of the final [`saddlejax.Flow`][] or of the escape direction, by name. They are traced by JAX;
      where the shape of what they return depends on the depth or the width, it is filled up with NaN.
    - `store`: a folder for a Zarr store. Results are written block by block; called again after any interruption, the
      sweep goes on where it stopped, and with longer lists (values added at their ends) it computes what is new.
      `xarray.open_zarr(store)` reads it at any time. A store tells functions apart by what they compute: by their code
      and all the values that it refers to, but for files, the environment and random numbers. A function of which that
      cannot be known is refused.
    - `executor`: any `concurrent.futures.Executor`, such as Dask's `client.get_executor()`, or a `ProcessPoolExecutor`
      with `mp_context=multiprocessing.get_context("spawn")`: JAX does not survive a fork, and a pool of forked processes
      is refused. By default the cores, or the accelerators, of this machine.
    - `block`: the most lanes in a block, the unit of storage and of work handed out. Chosen from the size of the grid
      by default; a store keeps the one it began with.
    - `batch`: how many flows run together under `vmap`, finished ones replaced by waiting ones; by default one on a CPU
      (each core has its own) and as many as fit in half of its memory on an accelerator.
    - `retries`: how often a block whose computation was lost is tried again before its lanes are recorded as failed.
    - `on_progress`: called with a `Progress` (`from saddlejax.sweeps import Progress`) after every block.

    **Returns:** an `xarray.Dataset` with dimensions `activation`, `depth`, `bottleneck`, `scale`, `seed` (of length one
    where one value was given) and those of other lists; `status` in words; the measurements (those that
    `from saddlejax.sweeps import FLOW_VARIABLES, DIRECTION_VARIABLES` describes) and those of `measure`, with meaning and
    unit; versions, device, tolerances and the convention of seeds in its attributes. In the coordinate `bottleneck`, 0
    stands for all layers.

    **Raises:** `ValueError` for a grid or options that make no sense, and for a store that holds another sweep: the
    message says what differs; for traced arguments. `OSError` where the store cannot be written: nothing already written is lost.
    """
    grid = {"width": width, "depth": depth, "activation": activation, "scale": scale, "seed": seed}
    _check.not_traced("sweep", task=task, **grid, **options)
    if not isinstance(task, Task):
        raise _check.fail("task", "be a saddlejax.Task", type(task).__name__)
    loss = described(task.loss)
    task = task if loss is task.loss else dataclasses.replace(task, loss=loss)
    if block is not None:
        _check.whole_number("block", block)
    if batch is not None:
        _check.whole_number("batch", batch)
    _check.whole_number("retries", retries, least=0)
    if of is gradient_flow:
        problem: AbstractProblem = _flows(
            task, width, depth, activation, bottleneck, scale, seed, measure, options, batch
        )
    elif of is escape_direction:
        if bottleneck is not None or scale is not None:
            raise _check.fail("scale and bottleneck", "be left out: escape directions have unit layers", "given")
        problem = _directions(task, width, depth, activation, seed, measure, options)
    else:
        raise _check.fail("of", "be saddlejax.gradient_flow or saddlejax.escape_direction", repr(of))
    block_shape = problem.grid.block_shape(block or _most_lanes(problem.grid.lanes, batch))
    if jax.process_count() > 1:
        return _on_several_hosts(problem, store, block_shape, retries, on_progress)
    results = MemoryStore(problem, block_shape) if store is None else _on_disk(store, problem, block_shape)
    execute(problem, results, executor, retries, on_progress)
    return results.dataset()


def _on_several_hosts(
    problem: AbstractProblem,
    store: str | Path | None,
    block_shape: Sequence[int],
    retries: int,
    on_progress: Callable[[Progress], None],
) -> "xr.Dataset":
    """Every process of `jax.distributed` computes its share of the blocks, into a store that all of them reach."""
    if store is None:
        raise _check.fail("store", "be a folder that all processes reach, where JAX runs as several", store)
    if jax.process_index() == 0:
        _on_disk(store, problem, block_shape)
    sync_global_devices("saddlejax sweep: store created")
    results = _on_disk(store, problem, block_shape)
    execute(problem, results, None, retries, on_progress)
    sync_global_devices("saddlejax sweep: all blocks written")
    return results.dataset()


def _on_disk(path: str | Path, problem: AbstractProblem, block_shape: Sequence[int]) -> "ZarrStore":
    from .store import ZarrStore  # Zarr takes long to import

    return ZarrStore(path, problem, block_shape)


def _most_lanes(lanes: int, batch: int | None) -> int:
    """Blocks small enough that all cores stay busy to the end, and few enough for one file each.

    A batch needs many times as many lanes as it has slots, or else it spends its time running dry.
    """
    if batch is not None:
        return BATCHES_A_BLOCK * batch
    if jax.default_backend() != "cpu":
        return BATCHES_A_BLOCK * MOST_SLOTS
    return max(1, min(MOST_LANES, math.ceil(lanes / (8 * available_cores()))))


def _flows(
    task: Task,
    width: Any,
    depth: Any,
    activation: Any,
    bottleneck: Any,
    scale: Any,
    seed: Any,
    measure: dict[str, Measure] | None,
    options: dict[str, Any],
    batch: int | None,
) -> FlowProblem:
    known = ("until", "rtol", "dtype", "max_steps", "solver", "stiff")
    _refuse_unknown(options, ("width", *ALWAYS, *known, "save", "measure"), "gradient_flow")
    given = {name: options[name] for name in known if name in options}
    dtypes = [str(jnp.result_type(task.x.dtype, float))] if given.get("dtype") is None else _listed(given["dtype"])
    for value in dtypes:
        if jnp.dtype(value) == jnp.float64 and jnp.result_type(float) != jnp.float64:
            raise _check.fail(
                "dtype", "be float32 while double precision is off", value, 'jax.config.update("jax_enable_x64", True)'
            )
    if _is_list(given.get("rtol")) and None in _listed(given["rtol"]):
        raise _check.fail("rtol", "be a number, a list of numbers, or None alone", given["rtol"])
    axes = {
        "until": _axis("until", _listed(given.get("until") or Escape()), _until, "where the flow ends"),
        "solver": _axis(
            "solver", _listed(given.get("solver")), lambda s: "default" if s is None else type(s).__name__, "integrator"
        ),
        "dtype": _axis("dtype", [str(jnp.dtype(value)) for value in dtypes], str, "precision"),
        "max_steps": _axis(
            "max_steps", _listed(given.get("max_steps")), lambda n: 4096 if n is None else int(n), "most steps"
        ),
        "stiff": _axis("stiff", _listed(given.get("stiff")), bool, "whether the integrator is made for stiff flows"),
        **_shape_axes(task, width, depth, activation),
        "bottleneck": _bottleneck_axis(bottleneck, _listed(depth)),
        "rtol": _axis("rtol", _listed(given.get("rtol")), _rtol, "tolerance of the integration", together=True),
        "scale": _axis(
            "scale", _listed(1.0 if scale is None else scale), _scale, "init scale ε of the small layers", together=True
        ),
        "seed": _seed_axis(seed),
    }
    grid, fixed = _split(
        axes, lists={name for name in ("width", *known) if _is_list({"width": width, **given}.get(name))}
    )
    variables = custom(measure, FLOW_VARIABLES)
    save = options.get("save") or Save(steps=False, singular_values=False)
    if (batch or 1) > 1 and not keeps_ends_only(save):
        raise _check.fail("save", "be Save(steps=False) where flows run in a batch", "one that keeps more rows")
    return FlowProblem(task, grid, tuple(variables.items()), save, fixed, batch)


def _directions(
    task: Task,
    width: Any,
    depth: Any,
    activation: Any,
    seed: Any,
    measure: dict[str, Measure] | None,
    options: dict[str, Any],
) -> DirectionProblem:
    _refuse_unknown(options, ("width", "depth", "activation", "seed", "starts", "measure"), "escape_direction")
    starts = options.get("starts", 16)
    _check.whole_number("starts", starts)
    axes = {**_shape_axes(task, width, depth, activation), "seed": _seed_axis(seed, together=True)}
    grid, fixed = _split(axes, lists={"width"} if _is_list(width) else set())
    variables = custom(measure, DIRECTION_VARIABLES)
    return DirectionProblem(task, grid, tuple(variables.items()), (*fixed, ("starts", starts)))


ALWAYS = ("activation", "depth", "bottleneck", "scale", "seed")


def _split(axes: dict[str, Axis], lists: set[str]) -> tuple[Grid, tuple[tuple[str, Any], ...]]:
    """The dimensions of the results, and the arguments that do not vary."""
    varying = tuple(axis for name, axis in axes.items() if name in ALWAYS or name in lists)
    fixed = tuple((name, axis.values[0]) for name, axis in axes.items() if axis not in varying)
    return Grid(varying), fixed


def _shape_axes(task: Task, width: Any, depth: Any, activation: Any) -> dict[str, Axis]:
    functions = [described(resolve_activation(one)) for one in _listed(activation)]
    return {
        "width": _axis("width", _listed(width), _whole("width"), "size of the hidden layers"),
        "activation": _axis("activation", functions, activation_name, "activation of the hidden layers"),
        "depth": _axis("depth", _listed(depth), _whole("depth"), "number of weight matrices"),
    }


def _axis(name: str, values: Sequence[Any], label: Callable[[Any], Any], meaning: str, together: bool = False) -> Axis:
    labels = tuple(label(value) for value in values)
    plain = labels if name in ("width", "depth", "scale", "seed") else tuple(values)
    return Axis(name, plain, labels, together, meaning)


def _seed_axis(seed: Any, together: bool = True) -> Axis:
    return _axis(
        "seed", _listed(seed), _whole("seed", least=0), "number s of the random key jax.random.key(s)", together
    )


def _bottleneck_axis(bottleneck: Any, depths: Sequence[Any]) -> Axis:
    alone = bottleneck is None or isinstance(bottleneck, str | tuple)
    values = [_layers(one) for one in ([bottleneck] if alone else _listed(bottleneck))]
    deepest = max(int(one) for one in depths)
    for layers in values:
        if layers is not None and max(layers) >= deepest:
            raise _check.fail("bottleneck", f"choose among the {deepest} layers of the deepest network", bottleneck)
    first = all(layers is None or layers == tuple(range(len(layers))) for layers in values)
    if first:
        labels = tuple(0 if layers is None else len(layers) for layers in values)
        return Axis("bottleneck", tuple(values), labels, True, "number r of small layers, the first r; 0: all layers")
    words = tuple("all" if layers is None else ",".join(map(str, layers)) for layers in values)
    return Axis("bottleneck", tuple(values), words, True, "indices of the small layers")


def _layers(bottleneck: Any) -> tuple[int, ...] | None:
    if bottleneck is None or bottleneck == "all":
        return None
    if isinstance(bottleneck, tuple | list) and len(bottleneck) > 0:
        for layer in bottleneck:
            _check.whole_number("bottleneck", layer, least=0)
        if len(set(bottleneck)) != len(bottleneck):
            raise _check.fail("bottleneck", "name each layer once", bottleneck)
        return tuple(sorted(int(layer) for layer in bottleneck))
    _check.whole_number("bottleneck", bottleneck)
    return tuple(range(int(bottleneck)))


def _until(until: Any) -> str:
    if not isinstance(until, AbstractUntil):
        raise _check.fail("until", "be saddlejax.Escape(), Time(t) or Loss(value)", repr(until))
    return until.describe()


def _scale(scale: Any) -> float:
    _check.positive_number("scale", scale, "An init scale multiplies the weights; use a small positive one.")
    return float(scale)


def _rtol(rtol: Any) -> float | None:
    if rtol is None:
        return None
    _check.tolerance("rtol", rtol)
    return float(rtol)


def _whole(name: str, least: int = 1) -> Callable[[Any], int]:
    def checked(value: Any) -> int:
        value = value.item() if isinstance(value, jax.Array | np.ndarray) and np.ndim(value) == 0 else value
        _check.whole_number(name, value, least=least)
        return int(value)

    return checked


def _is_list(values: Any) -> bool:
    """Whether an argument holds several values rather than one."""
    if isinstance(values, str | AbstractUntil) or not isinstance(values, Iterable):
        return False
    return getattr(values, "ndim", 1) > 0


def _listed(values: Any) -> list[Any]:
    """A list of values from one value or many."""
    return list(values) if _is_list(values) else [values]


def _refuse_unknown(options: dict[str, Any], known: Sequence[str], function: str) -> None:
    for name in options:
        if name not in known:
            raise TypeError(f"sweep() of {function} has no argument {name!r}; it takes {', '.join(known)}.")
