"""The public call: follow the gradient flow of a network on a task."""

import dataclasses

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._host.threads import one_blas_thread
from ..networks.activation_class import classify_activation, slope_jumps, value_at_zero
from ..networks.mlp import AbstractNetwork
from ..tasks.task import Task, check_fits, match_precision
from .integrate import Integration, integrate, smallest_share
from .method import AbstractMethod, Explicit, Exponential
from .record import Save
from .result import Flow, trim
from .rounding import least_factor
from .status import Status
from .task_reference import TaskReference
from .until import AbstractUntil, Escape

SMOOTH_RTOL = 1e-4
KINKED_RTOL = 2e-4
KINKED_MIN_STEP = 2e-3
STIFF_RTOL = 1e-2
KRYLOV_SIZE = 48


@safe_to_interrupt
def gradient_flow(
    net: AbstractNetwork,
    task: Task,
    until: AbstractUntil | None = None,
    *,
    rtol: float | Array | None = None,
    save: Save | None = None,
    solver: dfx.AbstractERK | None = None,
    max_steps: int = 4096,
    stiff: bool = False,
) -> Flow:
    """Follow the gradient flow `dθ/dt = −∇𝓛(θ)` in the plateau clock.

    In this clock, `dθ/ds = −τ∇𝓛` and `dt/ds = τ` with `1/τ² = Σ_l ‖∂𝓛/∂W_l‖²/‖W_l‖²`, a plateau of any length takes a
    number of steps that grows like `log 1/ε` in the init scale `ε`.

    **Arguments:**

    - `net`: a network, such as [`saddlejax.MLP`][]. Its weights may be traced or batched by `vmap`.
    - `task`: a [`saddlejax.Task`][] of as many inputs and outputs.
    - `until`: [`saddlejax.Escape`][] (the default, `Escape()`, is the steepest point of the first descent),
      [`saddlejax.Time`][] or [`saddlejax.Loss`][].
    - `rtol`: the error of a step relative to each layer, by default 1e-4, or 2e-4 where the slope of the activation
      jumps. Where the escape time is asked for, errors in the layers are multiplied by a weight between 1/20 and
      1 that falls as the plateau passes: late on it they hardly change the escape time, so that steps may be longer.
    - `save`: what to keep on the way, see [`saddlejax.Save`][].
    - `solver`: an explicit diffrax solver whose last stage is the first of the next step. By default `Tsit5` for smooth
      activations and `Bosh3` for kinked ones.
    - `max_steps`: the most steps to attempt.
    - `stiff`: for flows through many saddles. On later plateaus the directions already learned bound an explicit step
      while nothing happens; the exponential method of [`saddlejax.ExponentialRosenbrock`][] is not bound by them, and
      its work grows like `log 1/ε` there too. By default `rtol` is then 1e-2, relative to the singular values of a layer
      that the error perturbs, which gives crossing times to about 1e-3. Not differentiable. Where the slope of the
      activation jumps it changes nothing: at kinks the exponential method needs many times the work of the
      explicit one.

    **Returns:** a [`saddlejax.Flow`][]. Its `status` tells how the flow ended; the escape time is NaN unless it escaped.
    Works under `jax.jit`, `jax.vmap`, `jax.grad` and `jax.jvp`.

    **Raises:** `ValueError` for arguments that do not fit, and where the target is already met at the start (under a
    transformation that is the outcome `met_at_start`). **Warns** where the activation is not zero at zero: the origin
    is then no saddle.
    """
    check_fits(net, task)
    if until is None:
        until = Escape()
    if not isinstance(until, AbstractUntil):
        raise _check.fail("until", "be saddlejax.Escape(), Time(t) or Loss(value)", repr(until))
    if not isinstance(save, Save | None):
        raise _check.fail("save", "be saddlejax.Save(...), such as Save(weights=True)", repr(save))
    _check.whole_number("max_steps", max_steps)
    kinked = net.depth > 1 and slope_jumps(net.activation)
    if rtol is None:
        rtol = KINKED_RTOL if kinked else STIFF_RTOL if stiff else SMOOTH_RTOL
    _check.positive_number("rtol", rtol)
    if _check.is_concrete(rtol) and np.any(np.asarray(rtol) >= 1):
        raise _check.fail("rtol", "be below one", rtol)
    if not isinstance(stiff, bool):
        raise _check.fail("stiff", "be True or False", repr(stiff))
    if stiff and solver is not None:
        raise _check.fail("solver", "be left alone where stiff=True, which brings its own", repr(solver))
    solver = solver or (dfx.Bosh3() if kinked else dfx.Tsit5())
    if not (
        isinstance(solver, dfx.AbstractERK) and isinstance(solver.tableau, dfx.ButcherTableau) and solver.tableau.fsal
    ):
        raise _check.fail(
            "solver", "be an explicit first-same-as-last diffrax solver: Tsit5, Dopri5, Dopri8 or Bosh3", repr(solver)
        )
    _warn_where_origin_is_no_saddle(net)
    net, task = match_precision(net, task)
    dtype = task.x.dtype
    until, save = jax.tree.map(lambda a: jnp.asarray(a, dtype), (until, save or Save()))
    min_step = jnp.asarray(KINKED_MIN_STEP if kinked else 0.0, dtype)
    rtol = jnp.asarray(rtol, dtype)
    method: AbstractMethod = Explicit(solver)
    if stiff and not kinked:
        known = _check.is_concrete(net.activation)
        conserves = net.depth == 1 or (known and classify_activation(net.activation).letter == "A")
        method = Exponential(rtol, KRYLOV_SIZE, conserves)
    arguments = (net, task, until, save, rtol, min_step, method, max_steps)
    if isinstance(method, Exponential) and _check.is_concrete(arguments):
        # Its small eigenproblems would have threads of the linear algebra wait for each other, for most of the time.
        with one_blas_thread():
            end = jax.block_until_ready(_run(*arguments))
    else:
        end = _run(*arguments)
    flow = _flow(end, until, rtol, f"{method.describe()} in the plateau clock")
    if _check.is_concrete(flow):
        if bool(end.status == Status.met_at_start):
            raise _check.fail(
                "until",
                "not be met at the start",
                f"{until.describe()}, and the loss starts at {float(flow.losses[0]):.6g}",
                "Start from smaller weights (saddlejax.scale_layers) or set a target further on.",
            )
        flow = dataclasses.replace(trim(flow, int(end.row_count)), reference=TaskReference(task))
        _warn_where_rounding_matters(flow, end)
    return flow


@eqx.filter_jit
def _run(
    net: AbstractNetwork,
    task: Task,
    until: AbstractUntil,
    save: Save,
    rtol: Array,
    min_step: Array,
    method: AbstractMethod,
    max_steps: int,
) -> Integration:
    return integrate(net, task, until, save, rtol, min_step, method=method, max_steps=max_steps)


def _flow(end: Integration, until: AbstractUntil, rtol: Array, method: str) -> Flow:
    rows = end.rows
    return Flow(
        status=end.status,
        log_escape_time=jnp.where(end.status == Status.escaped, end.log_time, jnp.nan),
        steps=rows.steps,
        log_times=rows.log_time,
        losses=rows.loss,
        gradient_norms=rows.gradient_norm,
        layer_norms=rows.layer_norms,
        singular_values=rows.singular_values,
        imbalance=rows.imbalance,
        imbalance_residual=end.imbalance_residual,
        weights=rows.weights,
        net=end.net,
        stats={
            "steps": end.steps,
            "rejected_steps": end.rejected_steps,
            "gradient_evaluations": end.gradient_evaluations,
            "hessian_vector_products": end.hessian_vector_products,
        },
        resolved=~(end.dormant_lost | end.cancels | (end.status == Status.below_rounding)),
        until=until,
        rtol=rtol,
        method=method,
    )


def _warn_where_rounding_matters(flow: Flow, end: Integration) -> None:
    dtype, shapes = flow.losses.dtype, [w.shape for w in flow.net.weights]
    finer = " Or use double precision." if dtype == jnp.float32 else ""
    factor = least_factor(np.asarray(flow.layer_norms[0]), np.asarray(flow.layer_norms[-1]), shapes)
    remedy = f"Start from weights at least {factor:.2g} times as large.{finer}"
    if bool(end.dormant_lost):
        _check.warn(
            "After the first escape something has grown that had been smaller than the rounding of what was learned beside "
            f"it in {dtype}: the times of later plateaus are those of rounding errors. {remedy}"
        )
    if bool(flow.status == Status.below_rounding):
        _check.warn(
            f"The flow stopped where the gradient is nothing but rounding in {dtype}: what is still to be learned is too "
            f"small beside what has been learned. {remedy}"
        )
    if bool(end.cancels):
        smallest = float(smallest_share(flow.rtol))
        _check.warn(
            "The flow passed close to a saddle on a path on which the layers cancel to less than "
            f"{smallest:.1g} of themselves, which {dtype} cannot resolve at this rtol: when it left is not known. "
            f"Start elsewhere, or from weights that do not nearly cancel.{finer}"
        )


def _warn_where_origin_is_no_saddle(net: AbstractNetwork) -> None:
    if not _check.is_concrete(net.activation):
        return
    at_zero = value_at_zero(net.activation)
    if net.depth > 1 and at_zero != 0:
        _check.warn(
            f"The activation is {at_zero:.3g} at zero, not 0: the origin is then no saddle, since the last layer has a "
            "gradient there. The flow is computed all the same, but the escape laws do not apply to it."
        )
