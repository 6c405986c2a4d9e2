"""The public call: follow the gradient flow of a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._host.threads import one_blas_thread
from ..networks.activation_class import value_at_zero
from ..networks.network import AbstractNetwork
from ..parameters import Parameters, Trainable
from ..tasks.task import Task
from .assemble import record
from .changing import STIFF_STEPS, follow, follow_on, stopped_for_other_steps
from .integrate import Integration, integrate
from .memory import smallest_share
from .plan import FlowOptions, checked_options, in_one_precision, kinked
from .record import Save
from .result import Flow, trim
from .rounding import least_factor
from .status import AS_ASKED, Status
from .task_reference import TaskReference
from .until import AbstractUntil


@safe_to_interrupt
def gradient_flow(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    until: AbstractUntil | None = None,
    *,
    trainable: Trainable | None = None,
    rtol: float | int | Array | None = None,
    save: Save | None = None,
    solver: dfx.AbstractERK | None = None,
    max_steps: int = 4096,
    stiff: bool | None = None,
    throw: bool = False,
) -> Flow:
    """Follow the gradient flow `dθ/dt = −∇𝓛(θ)` of a model in the plateau clock.

    In this clock, `dθ/ds = −τ∇𝓛` and `dt/ds = τ` with `1/τ² = Σ_g ‖∂𝓛/∂θ_g‖²/‖θ_g‖²` over the arrays `θ_g` of the model, a
    plateau of any length takes a number of steps that grows like `log 1/ε` in the init scale `ε`. Integrated by
    `diffrax.diffeqsolve`; [`saddlejax.plateau_clock`][] has the parts.

    ```python
    flow = saddlejax.gradient_flow(eqx.nn.MLP(64, 10, 24, 2, jax.numpy.tanh, key=key), saddlejax.tasks.digits())
    print(flow)
    ```

    **Arguments:**

    - `model`: any Equinox module that maps one sample to an output, such as [`saddlejax.MLP`][] or `eqx.nn.MLP`. Its
      arrays may be traced or batched by `vmap`.
    - `task`: a [`saddlejax.Task`][] whose samples the model takes, or a function `loss(model) -> scalar`.
    - `until`: [`saddlejax.Escape`][] (the default, `Escape()`, is the steepest point of the first descent),
      [`saddlejax.Time`][] or [`saddlejax.Loss`][].
    - `trainable`: which arrays move, as a filter of `equinox.partition`: by default all floating-point arrays of a model,
      and the `weights` of a perceptron.
    - `rtol`: the error of a step relative to each array, by default 1e-4, or 2e-4 where slopes of activations jump. Where the
      escape time is asked for, errors in the arrays are multiplied by a weight between 1/20 and 1 that falls as the plateau
      passes: late on it they hardly change the escape time, so that steps may be longer. The weight is one where a bias has
      found a minimum of its own.
    - `save`: what to keep on the way, see [`saddlejax.Save`][].
    - `solver`: an explicit diffrax solver whose last stage is the first of the next step. By default `Tsit5`, and `Bosh3`
      where slopes of activations jump.
    - `max_steps`: the most steps to attempt.
    - `stiff`: whether to take exponential steps, those of [`saddlejax.ExponentialRosenbrock`][], which directions that decay
      fast do not bound, as they bound explicit ones on later plateaus or where a bias relaxes. By default the flow chooses,
      and changes from explicit to exponential steps and back by what it meets. The tolerance of exponential steps is
      relative to the singular values of an array that the error perturbs: 1e-2 by default, which gives crossing times to
      about 1e-3; `rtol` where `stiff=True`, a hundred times as much where the flow chooses. Exponential steps are not
      differentiable: under `jax.jit`, `jax.vmap`, `jax.grad` and `jax.jvp` the default takes explicit ones only.
    - `throw`: whether to raise a `RuntimeError` where the flow does not end as it was asked to.

    Flows to any other end than `Escape` slide along the kinks of activations, see [`saddlejax.kinked`][] and
    [`saddlejax.SlidingSolver`][]; both kinds of step then have the tolerance `rtol` relative to each array, and derivatives are
    not available. Flows to the first escape take explicit steps across kinks.

    **Returns:** a [`saddlejax.Flow`][]. Its `status` tells how the flow ended; the escape time is NaN unless it escaped.
    Works under `jax.jit`, `jax.vmap`, `jax.grad` and `jax.jvp`.

    **Raises:** `ValueError` for arguments that do not fit: a model whose output has another shape than the task needs, that
    has no array to move, that depends on a random key or a state; a loss that is no real scalar or not finite at the start;
    and where the target is already met at the start (under a transformation that is the outcome `met_at_start`).
    **Warns** where the activation of a perceptron is not zero at zero: the origin is then no saddle.
    """
    options = checked_options(model, task, until, rtol, save, solver, max_steps, stiff)
    _warn_where_origin_is_no_saddle(model)
    alone = _check.is_concrete(model, task, options)
    slides = options.steps.slides
    chooses = stiff is None and alone and (slides or not kinked(model))
    if chooses:
        options = options._replace(steps=dataclasses.replace(options.steps, patience=jnp.asarray(float(STIFF_STEPS))))
    try:
        if chooses and slides:
            # Explicit steps are taken again later on: in the same program as the first ones.
            plan = in_one_precision(model, task, trainable, options)
            found, stretches = follow(plan)
            flow = record(plan, found, stretches)
        elif alone and (options.steps.explicit is None or slides):
            # Its small eigenproblems would have threads of the linear algebra wait for each other, for most of the time.
            with one_blas_thread():
                flow, found = jax.block_until_ready(_run(model, task, trainable, options))
        else:
            flow, found = _run(model, task, trainable, options)
    except jax.errors.UnexpectedTracerError as error:
        if not slides:
            raise
        raise _check.fail(
            "model",
            "call activations with kinks outside of jax.jit and control flow, where a flow can follow their kinks",
            f"a {type(model).__name__} that calls one within",
            "Take the jit away, since the flow compiles the model anyway; or call a function that is not recognised, such as "
            "lambda z: jnp.maximum(z, 0), whose kinks are then not followed.",
        ) from error
    if _check.is_concrete(found):
        if chooses and not slides and stopped_for_other_steps(found.stretch):
            plan = in_one_precision(model, task, trainable, options)
            found, stretches = follow_on(plan, found)
            flow = record(plan, found, stretches)
        flow = _finish(flow, model, task, found)
    return _checked_outcome(flow) if throw else flow


@eqx.filter_jit
def _run(
    model: PyTree, task: Task | Callable[[Any], Array], trainable: Trainable | None, options: FlowOptions
) -> tuple[Flow, Integration]:
    plan = in_one_precision(model, task, trainable, options)
    found = integrate(*plan)
    return record(plan, found, [found.stretch]), found


def _checked_outcome(flow: Flow) -> Flow:
    """The flow, or an error where it did not end as it was asked to."""
    failed = ~jnp.any(jnp.stack([flow.status == outcome for outcome in AS_ASKED]), axis=0)
    if not _check.is_concrete(failed):
        return eqx.error_if(flow, failed, "A flow did not end as it was asked to; see its status with throw=False.")
    if bool(failed):
        raise RuntimeError(f"The flow did not end as asked, at {flow.target}: {Status[flow.status]}.\n{flow}")
    return flow


def _finish(flow: Flow, model: PyTree, task: Task | Callable[[Any], Array], found: Integration) -> Flow:
    """What only a single call outside of transformations does: errors and warnings, and rows cut to those there are."""
    until = flow.until
    assert until is not None
    if bool(flow.status == Status.non_finite):
        _check_finite(model, found)
    if bool(found.status == Status.met_at_start):
        raise _check.fail(
            "until",
            "not be met at the start",
            f"{until.describe()}, and the loss starts at {float(found.stretch.first.loss):.6g}",
            "Start from smaller weights (saddlejax.scale_layers) or set a target further on.",
        )
    cut = trim(flow, int(np.sum(np.asarray(flow.steps) >= 0)))
    flow = dataclasses.replace(cut, reference=TaskReference(task if isinstance(task, Task) else None))
    _warn_where_rounding_matters(flow, found)
    return flow


def _check_finite(model: PyTree, found: Integration) -> None:
    """Refuse arrays of a model, or a loss at the start, that are not finite."""
    parameters = Parameters.of(model)
    for name, array in zip(parameters.names, parameters.arrays, strict=True):
        _check.finite(f"model.{name}", array)
    loss = float(found.stretch.first.loss)
    if not np.isfinite(loss):
        raise _check.fail(
            "task",
            "have a finite loss at the start",
            f"one whose loss there is {loss}",
            "Look at the outputs of the model: its weights, or those outputs, are too large for the loss.",
        )


def _warn_where_rounding_matters(flow: Flow, found: Integration) -> None:
    memory = found.stretch.state.memory
    dtype, smallest = flow.losses.dtype, float(smallest_share(flow.rtol))
    lost, below, cancels = memory.dormant_lost > 0, flow.status == Status.below_rounding, memory.least_share < smallest
    if not (lost or below or cancels):
        return
    finer = " Or use double precision." if dtype == jnp.float32 else ""
    factor = least_factor(np.asarray(found.first.scales.log_sizes), np.asarray(found.stretch.last.group_norms))
    remedy = f"Start from weights at least {factor:.2g} times as large.{finer}"
    if lost:
        _check.warn(
            "After the first escape something has grown that had been smaller than the rounding of what was learned beside "
            f"it in {dtype}: the times of later plateaus are those of rounding errors. {remedy}"
        )
    if below:
        _check.warn(
            f"The flow stopped where the gradient is nothing but rounding in {dtype}: what is still to be learned is too "
            f"small beside what has been learned. {remedy}"
        )
    if cancels:
        _check.warn(
            "The flow passed close to a saddle on a path on which the layers cancel to less than "
            f"{smallest:.1g} of themselves, which {dtype} cannot resolve at this rtol: when it left is not known. "
            f"Start elsewhere, or from weights that do not nearly cancel.{finer}"
        )


def _warn_where_origin_is_no_saddle(model: PyTree) -> None:
    if not isinstance(model, AbstractNetwork) or not _check.is_concrete(model.activation):
        return
    at_zero = value_at_zero(model.activation)
    if model.depth > 1 and at_zero != 0:
        _check.warn(
            f"The activation is {at_zero:.3g} at zero, not 0: the origin is then no saddle, since the last layer has a "
            "gradient there. The flow is computed all the same, but the escape laws do not apply to it."
        )
