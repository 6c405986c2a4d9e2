"""Training in discrete steps with any optax optimiser, recorded like a flow."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from .. import _check
from .._host.interrupt import safe_to_interrupt
from ..gradient import gradient
from ..networks.mlp import AbstractNetwork
from ..norm_imbalance import sum_neurons
from ..tasks.task import Task, check_fits, match_precision, task_loss
from . import Flow, Status
from .descent_record import Minibatches, Peak, Seen, flow_time, gradient_norm, look


@safe_to_interrupt
def gradient_descent(
    net: AbstractNetwork,
    task: Task,
    optimiser: optax.GradientTransformation,
    steps: int,
    *,
    every: int | None = None,
    batch_size: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Flow:
    """Train a network in discrete steps, and record what a gradient flow records.

    **Arguments:**

    - `net`, `task`: as for a flow; computed in the wider of their two floating-point types.
    - `optimiser`: any optax optimiser, such as `optax.sgd(0.1)`, `optax.adam(1e-3)`. Keep and pass the same object to
      avoid compiling again.
    - `steps`: how many.
    - `every`: steps between two rows of the record; by default such that there are about 500.
    - `batch_size`: samples a step, drawn without replacement, shuffled again after each pass through the data; a rest
      smaller than a batch is left out of that pass. By default all samples.
    - `key`: a JAX random key, needed for minibatches.

    **Returns:** a [`saddlejax.Flow`][] with a row every `every` steps, the start included.

    - Its times are the flow time the steps stand for, `t = Σ_k η_k`, `η_k = max(0, −⟨u_k, g_k⟩ / ‖g_k‖²)`, with the
      update `u_k` and the gradient `g_k` it was computed from. For plain SGD `η_k` is the learning rate, under any
      schedule; for momentum `β` it tends to `η/(1 − β)` where the gradient hardly changes; for Adam it is whatever
      length of flow the step covers. A step uphill advances the time by nothing.
    - `imbalance_residual` compares with `Σ_k η_k dΔ_l/dt`. For plain SGD every step adds
      `η² (‖∂𝓛/∂W_{l+1}‖² − ‖∂𝓛/∂W_l‖²)` to the difference: the error of discretisation alone. For other optimisers it
      is also their departure from the flow.
    - The escape is the first local maximum of `‖∇𝓛‖` on all samples, as of a flow, if there was a plateau before it that
      the optimiser had to wait on: the maximum comes after at least ten steps, and the first half of them covered less
      than three quarters of the flow time until then. Steps of gradient descent cover half of it. Steps whose size does
      not follow the gradient, as those of Adam and Muon, cover nearly all of it at once, where the gradient is small:
      the flow would have waited on a plateau, and they do not. A fall from the start is no maximum, nor are changes below one
      percent. Looked for at every step if all samples are used, else at every row. Training goes on after it.
      `status` is `escaped`; `no_plateau` where the maximum has no plateau before it; `steps_taken` where there was no
      maximum; `non_finite`.
    - `stats`: `steps`, `gradient_evaluations` (on minibatches too; a line search makes more, not counted), `escape_step`,
      −1 without an escape, and `peak_step`, that of the maximum with or without a plateau, −1 where there is none.

    **Raises:** `ValueError` for a network that does not fit the task, an optimiser that is not one, numbers out of
    range, minibatches without a key, and minibatches of a task with sample weights.
    """
    check_fits(net, task)
    net, task = match_precision(net, task)
    _check_arguments(task, optimiser, steps, every, batch_size, key)
    every = max(1, steps // 500) if every is None else min(every, steps)
    batches = None if batch_size is None or key is None else Minibatches(batch_size, key)
    return _descend(net, task, optimiser, steps, every, batches)


class _State(NamedTuple):
    """Between two steps; `span` and `change` are the flow time and `∫ dΔ/dt` since the last row, `time` that row's."""

    net: AbstractNetwork
    memory: Any
    order: Array
    peak: Peak
    time: Array
    span: Array
    change: Array


@eqx.filter_jit
def _descend(
    net: AbstractNetwork,
    task: Task,
    optimiser: optax.GradientTransformation,
    steps: int,
    every: int,
    batches: Minibatches | None,
) -> Flow:
    optimiser = optax.with_extra_args_support(optimiser)
    dtype = net.weights[0].dtype
    rows = -(-steps // every)
    zero, zeros = jnp.zeros((), dtype), jnp.zeros((net.depth - 1,), dtype)

    def step(state: _State, taken: Array) -> _State:
        order, batch = (state.order, task) if batches is None else batches.draw(task, state.order, taken)
        at = gradient(state.net, batch)
        weights = state.net.weights
        updates, memory = optimiser.update(
            at.weights,
            state.memory,
            weights,
            value=at.loss,
            grad=at.weights,
            value_fn=lambda w: task_loss(state.net.with_weights(w), batch),
        )
        span = flow_time(updates, at.weights)
        return _State(
            net=state.net.with_weights(optax.apply_updates(weights, updates)),
            memory=memory,
            order=order,
            peak=state.peak.see(gradient_norm(at), taken, state.time + state.span) if batches is None else state.peak,
            time=state.time,
            span=state.span + span,
            change=state.change + span * sum_neurons(at.neuron_rates, dtype),
        )

    def interval(state: _State, row: Array) -> tuple[_State, tuple[Array, Array, Array, Seen]]:
        def one(state: _State, taken: Array) -> tuple[_State, None]:
            # The last interval may be shorter than the others.
            return jax.lax.cond(taken < steps, step, lambda state, taken: state, state, taken), None

        state, _ = jax.lax.scan(one, state, row * every + jnp.arange(every))
        taken, span, change = jnp.minimum((row + 1) * every, steps), state.span, state.change
        seen = look(state.net, task)
        # Summed interval by interval: in single precision a running sum over all steps would stall.
        state = state._replace(time=state.time + span, span=zero, change=zeros)
        if batches is not None:
            state = state._replace(peak=state.peak.see(seen.gradient_norm, taken, state.time))
        return state, (taken, state.time, change, seen)

    first = look(net, task)
    order = jnp.arange(task.samples)
    start = _State(net, optimiser.init(net.weights), order, Peak.start(first.gradient_norm), zero, zero, zeros)
    end, later = jax.lax.scan(interval, start, jnp.arange(rows))

    taken, times, changes, seen = jax.tree.map(
        lambda one, more: jnp.concatenate([one[None], more]), (jnp.zeros_like(later[0][0]), zero, zeros, first), later
    )
    predicted = jnp.cumsum(changes, axis=0)
    squares = jnp.square(seen.layer_norms)
    drift = seen.imbalance - seen.imbalance[0] - predicted
    peak = end.peak
    finite = jnp.all(jnp.isfinite(seen.loss)) & jnp.all(jnp.isfinite(seen.layer_norms))
    escaped = peak.passed & peak.after_plateau & finite
    status = Status.where(
        peak.passed, Status.where(peak.after_plateau, Status.escaped, Status.no_plateau), Status.steps_taken
    )
    return Flow(
        status=Status.where(finite, status, Status.non_finite),
        log_escape_time=jnp.where(escaped, jnp.log(peak.time), jnp.nan),
        steps=taken,
        log_times=jnp.log(times),
        losses=seen.loss,
        gradient_norms=seen.gradient_norm,
        layer_norms=seen.layer_norms,
        singular_values=seen.singular_values,
        imbalance=seen.imbalance,
        imbalance_residual=drift / (squares[:, 1:] + squares[:, :-1]),
        weights=None,
        net=end.net,
        stats={
            "steps": jnp.asarray(steps),
            "gradient_evaluations": jnp.asarray(steps + rows + 1),
            "escape_step": jnp.where(escaped, peak.step, -1),
            "peak_step": jnp.where(peak.passed & finite, peak.step, -1),
        },
        resolved=jnp.asarray(True),
        until=None,
        rtol=None,
        method="discrete steps of an optax optimiser: the imbalance error is their departure from gradient flow",
    )


def _check_arguments(
    task: Task, optimiser: Any, steps: int, every: int | None, batch_size: int | None, key: PRNGKeyArray | None
) -> None:
    if not (callable(getattr(optimiser, "init", None)) and callable(getattr(optimiser, "update", None))):
        raise _check.fail("optimiser", "be an optax optimiser", repr(optimiser), "For instance optax.sgd(0.1).")
    _check.whole_number("steps", steps)
    if every is not None:
        _check.whole_number("every", every)
    if batch_size is None:
        return
    _check.whole_number("batch_size", batch_size)
    if batch_size > task.samples:
        raise _check.fail("batch_size", f"be at most the {task.samples} samples of the task", batch_size)
    if key is None:
        raise _check.fail("key", "be a JAX random key where batch_size is given", None, "Pass key=jax.random.key(0).")
    if task.sample_weights is not None:
        raise _check.fail(
            "batch_size",
            "be left out for a task with sample weights",
            batch_size,
            "Its samples are a quadrature rule that a minibatch would break.",
        )
