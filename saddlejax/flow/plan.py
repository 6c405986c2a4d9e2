"""The arguments of a flow, checked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .. import _check
from ..networks.activation_class import slope_jumps
from ..networks.network import AbstractNetwork
from ..objective import Problem, as_problem
from ..parameters import Trainable
from ..tasks.task import Task
from .clock import checked_until
from .integrate import Steps
from .record import Save
from .solvers import PlateauSolver
from .units import places_of
from .until import AbstractUntil

SMOOTH_RTOL = 1e-4
KINKED_RTOL = 2e-4
KINKED_MIN_STEP = 2e-3
STIFF_RTOL = 1e-2


class FlowOptions(NamedTuple):
    """Where a flow ends, what it keeps, and how it takes steps."""

    until: AbstractUntil
    save: Save
    steps: Steps


class FlowPlan(NamedTuple):
    """A flow in one precision: what it lowers, where it ends, what it keeps, and how it takes steps."""

    problem: Problem
    until: AbstractUntil
    save: Save
    steps: Steps


def checked_options(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    until: AbstractUntil | None,
    rtol: float | Array | None,
    save: Save | None,
    solver: dfx.AbstractERK | None,
    max_steps: int,
    stiff: bool | None,
) -> FlowOptions:
    """The options of a flow, or an error that says which one does not fit. Steps are explicit unless `stiff`."""
    until = checked_until(until)
    if not isinstance(save, Save | None):
        raise _check.fail("save", "be saddlejax.Save(...), such as Save(weights=True)", repr(save))
    _check.whole_number("max_steps", max_steps)
    if not isinstance(stiff, bool | None):
        raise _check.fail("stiff", "be True, False or None", repr(stiff))
    if stiff and solver is not None:
        raise _check.fail("solver", "be left alone where stiff=True, which brings its own", repr(solver))
    jumps = kinked(model)
    slides = not until.asks_for_escape and has_places(model, task)
    explicit = PlateauSolver(solver or (dfx.Bosh3() if jumps or slides else dfx.Tsit5())).solver
    exponential = bool(stiff) and (slides or not jumps)
    if rtol is None:
        rtol = KINKED_RTOL if jumps or slides else STIFF_RTOL if exponential else SMOOTH_RTOL
    _check.tolerance("rtol", rtol)
    steps = Steps(
        explicit=None if exponential else explicit,
        rtol=jnp.asarray(rtol, float),
        min_step=jnp.asarray(KINKED_MIN_STEP if jumps and not slides else 0.0),
        patience=jnp.asarray(jnp.inf),
        to_escape=until.asks_for_escape,
        slides=slides,
        max_steps=max_steps,
    )
    return FlowOptions(until, save or Save(), steps)


def in_one_precision(
    model: PyTree, task: Task | Callable[[Any], Array], trainable: Trainable | None, options: FlowOptions
) -> FlowPlan:
    """The flow of a model with checked options.

    **Raises:** `ValueError` for models and losses that do not fit, see [`saddlejax.objective.as_problem`][].
    """
    problem = as_problem(model, task, trainable)
    dtype = jnp.result_type(*problem.parameters.arrays)
    return FlowPlan(problem, *jax.tree.map(lambda a: jnp.asarray(a, dtype), options))


def plan_flow(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    until: AbstractUntil | None = None,
    *,
    trainable: Trainable | None = None,
    rtol: float | Array | None = None,
    save: Save | None = None,
    solver: dfx.AbstractERK | None = None,
    max_steps: int = 4096,
    stiff: bool | None = None,
) -> FlowPlan:
    """The plan of a flow with the arguments of [`saddlejax.gradient_flow`][]."""
    options = checked_options(model, task, until, rtol, save, solver, max_steps, stiff)
    return in_one_precision(model, task, trainable, options)


def kinked(model: PyTree) -> bool:
    """Whether a model is a perceptron whose activation has jumps in its slope."""
    return isinstance(model, AbstractNetwork) and model.depth > 1 and slope_jumps(model.activation)


def has_places(model: PyTree, task: Task | Callable[[Any], Array]) -> bool:
    """Whether a flow of a model on a task can follow kinks of its activations: false where it cannot be called on that."""
    if not isinstance(task, Task):
        return False
    try:
        return len(places_of(model, task)) > 0
    except Exception:  # what is wrong is told where the model is checked
        return False
