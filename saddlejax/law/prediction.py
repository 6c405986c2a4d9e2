"""Predicting the escape of a real network from its small weights: the leading order of the loss, followed to its end."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Float

from .. import _check
from .._host.interrupt import safe_to_interrupt
from .._numerics import power_of_ten
from ..curvature.sharpness import sharpness
from ..flow import Escape, Flow, Save, Status, gradient_flow
from ..flow.result import SMALLEST_DROP
from ..networks.activations import Activation, ActivationParts
from ..networks.mlp import (
    AbstractNetwork,
    AbstractNetworkOfParts,
    Weights,
    cast,
    layer_norms,
    preactivations,
    predict,
    safe_norm,
    scale_layers,
)
from ..saddle.origin import Tangent, pull, tangent
from ..tasks.task import Task, check_fits, match_precision, task_loss, zero_loss
from .bottleneck import chosen_layers, init_scales

FIRST_GUESS = 0.1
MOST_STRIDES = 6
TOLERANCE = 1e-4

LARGEST_ERROR = 0.05
LARGEST_BEND = 0.5
SIGNAL_ROUNDING = 100


class EscapePrediction(eqx.Module):
    """When a network should leave its plateau, what that rests on, and how well this holds.

    - `log_time`: logarithm of the predicted escape time `τ` in the time of `dθ/dt = −∇𝓛`; NaN where `status` is not
      `escaped`: a network that starts beyond the predicted escape has no plateau (`met_at_start`).
    - `learning_rate`: steps of gradient descent are `τ` over it; None where none was given.
    - `layers`: the bottleneck, `r` layers counted from 0, and their `scales` `‖W_l‖/√(2 n_l)`.
    - `speed`: `K`, the signal energy at the end over the product of the bottleneck layers' norms: what
      [`saddlejax.escape_time`][] calls by that name.
    - `drop`: by how much the loss is predicted to fall until then, as a share of its value at zero weights.
    - `status`: how the leading-order flow ended.
    - `gradient_evaluations`: what the prediction cost, on a problem without samples where the activation is smooth.

    The rest are checks of what the prediction assumes; `concerns` puts those that fail into
    words. `g = ∇c(0, y)`, and `h` are the signals of the last hidden layer, with the activation's tangent in place of it.

    - `signal`: `‖E[g hᵀ]‖ / E[‖g‖ ‖h‖]` at the start. Where it is down at rounding the leading order of the loss vanishes.
    - `gradient_error`: `‖∇𝓛 − ∇𝓛_0‖ / ‖∇𝓛_0‖` at the start, over the layers from the bottleneck on.
    - `preactivations`: root mean squares at the start in the hidden layers from the bottleneck on, `(hidden,)`.
    - `bend`: by how much the activation departs there from its tangent at the predicted escape, relative, `(hidden,)`.
    - `growth_rate`: the largest `‖∂𝓛_0/∂W_l‖/‖W_l‖` at the start: a step changes the weights by this times the learning rate.
    - `largest_learning_rate`: `2/λ`, with the largest eigenvalue `λ` of the Hessian at the predicted escape: gradient descent
      is not stable above. None without a learning rate.
    """

    log_time: Float[Array, ""]
    learning_rate: Float[Array, ""] | None
    layers: tuple[int, ...] = eqx.field(static=True)
    scales: Float[Array, " bottleneck"]
    speed: Float[Array, ""]
    drop: Float[Array, ""]
    status: Status
    gradient_evaluations: Array
    signal: Float[Array, ""]
    gradient_error: Float[Array, ""]
    preactivations: Float[Array, " hidden"]
    bend: Float[Array, " hidden"]
    growth_rate: Float[Array, ""]
    largest_learning_rate: Float[Array, ""] | None

    @property
    def assumptions(self) -> list[str]:
        """What the prediction rests on, in words."""
        texts = ["the network's output stays small until the escape, so that only the leading order of the loss counts"]
        if self.layers[0] > 0:
            texts.append("layers before the bottleneck stand still")
        texts.append("the escape is the steepest point of a loss that is quadratic along the network's output")
        if self.bottleneck <= 2:
            texts.append(
                "r ≤ 2: the end of the plateau counts as much as its length; expect errors of several per cent"
            )
        texts.append("the learning rate is small enough for gradient descent to follow the flow (below 2/sharpness)")
        return texts

    @property
    def concerns(self) -> list[str]:
        """The assumptions that do not hold, one sentence each, with numbers; an empty list where all that is checked holds.

        **Raises:** `ValueError` while JAX is tracing, and for a batch of predictions. The fields they are made from, such
        as `signal` and `gradient_error`, can be used there.
        """
        _check.not_traced("EscapePrediction.concerns", prediction=self)
        if jnp.ndim(self.log_time) > 0:
            raise _check.fail(
                "prediction", "be a single one", f"a batch of shape {jnp.shape(self.log_time)}", _ONE_OF_A_BATCH
            )
        if self._has_no_signal:
            return [
                "The signal E[∇c(0, y) hᵀ] in the last hidden features h, which is E[∇c(0, y) xᵀ] times weights for a smooth "
                f"activation, vanishes to rounding ({self.signal:.1e} of E[‖∇c(0, y)‖ ‖h‖]). The leading order of the loss, which "
                "this prediction follows, is then zero: the order of this "
                f"saddle is higher than the number of small layers, {self.bottleneck}, its plateau is longer than "
                "such a number would tell, and nothing is predicted. Measure it with saddlejax.gradient_flow."
            ]
        if bool(self.status == Status.underflow):
            return [
                f"At init scales {self._scales_in_words} the gradient is too small for the precision it was computed in. Outside of "
                "jax.jit and jax.vmap that is double precision, whatever that of the weights. Use larger scales, and "
                "saddlejax.escape_time, the law in closed form, for smaller ones."
            ]
        return [*self._concerns_about_the_start(), *self._concerns_about_the_end()]

    @property
    def _has_no_signal(self) -> bool:
        return bool(self.signal <= SIGNAL_ROUNDING * jnp.finfo(self.signal.dtype).eps)

    @property
    def _scales_in_words(self) -> str:
        return ", ".join(f"{float(s):.3g}" for s in self.scales)

    def _concerns_about_the_start(self) -> list[str]:
        texts = []
        if bool(self.status == Status.met_at_start):
            texts.append("The weights are too large for a plateau: the network starts beyond the predicted escape.")
        elif bool(self.status != Status.escaped):
            texts.append("The flow of the leading order of the loss did not reach an escape.")
        if float(self.gradient_error) > LARGEST_ERROR:
            sizes = ", ".join(f"{float(z):.2g}" for z in self.preactivations)
            where = f", where hidden pre-activations have sizes of {sizes}" if sizes else ""
            texts.append(
                f"The weights are not small enough for these inputs: at the start the gradient of the loss differs by "
                f"{100 * float(self.gradient_error):.3g} % from that of its leading order{where}. Centre and scale the inputs, or "
                "use smaller weights."
            )
        rate = self.learning_rate
        if rate is not None:
            change, rounding = float(rate * self.growth_rate), float(jnp.finfo(self.signal.dtype).eps) / 2
            if change < rounding:
                texts.append(
                    f"In the precision {self.signal.dtype} gradient descent will not move: at the start a step changes the "
                    f"weights by {change:.1e} of their size, which is below the rounding, {rounding:.1e}."
                )
        return texts

    def _concerns_about_the_end(self) -> list[str]:
        if bool(self.status != Status.escaped):
            return []
        texts = []
        if float(jnp.max(self.bend, initial=0)) > LARGEST_BEND:
            texts.append(
                f"At the predicted escape the activation departs from its tangent at zero by {100 * float(jnp.max(self.bend)):.3g} %: "
                "the end of the plateau is not where it was taken to be. Centre and scale the inputs."
            )
        if float(self.drop) < SMALLEST_DROP:
            texts.append(
                f"Until the predicted escape the loss falls by {100 * float(self.drop):.2g} % only: hardly anything is learned "
                "there. Centre and scale the inputs and the targets."
            )
        rate, limit = self.learning_rate, self.largest_learning_rate
        if rate is not None and limit is not None and float(rate) > float(limit):
            texts.append(
                f"The learning rate {float(rate):.3g} is above 2/λ = {float(limit):.3g}, with the largest eigenvalue λ of the "
                "Hessian at the predicted escape: gradient descent does not follow the flow until there."
            )
        return texts

    @property
    def bottleneck(self) -> int:
        """The number `r` of bottleneck layers."""
        return len(self.layers)

    @property
    def time(self) -> Float[Array, ""]:
        """The predicted escape time `τ`, in steps times learning rate; infinite where it overflows."""
        return jnp.exp(self.log_time)

    @property
    def steps(self) -> Float[Array, ""]:
        """The predicted number of steps of gradient descent.

        **Raises:** `ValueError` where no learning rate was given.
        """
        if self.learning_rate is None:
            raise _check.fail("learning_rate", "be given to predict_escape to ask for steps", None)
        return jnp.exp(self.log_time - jnp.log(self.learning_rate))

    def __str__(self) -> str:
        if not _check.is_concrete(self.log_time):
            return "EscapePrediction (being traced)"
        if jnp.ndim(self.log_time) > 0:
            return f"EscapePrediction of shape {jnp.shape(self.log_time)}. {_ONE_OF_A_BATCH}"
        concerns = [f"    {text}" for text in self.concerns]
        layers = f"layers {', '.join(map(str, self.layers))} at init scales {self._scales_in_words}"
        if not np.isfinite(float(self.log_time)):
            status = "no signal in the leading order" if self._has_no_signal else Status[self.status]
            lines = [
                f"Predicted escape: none ({status})",
                f"  bottleneck    r = {self.bottleneck}: {layers}",
                *concerns,
            ]
            return "\n".join(lines)
        lines = [
            "Predicted escape",
            f"  time          {power_of_ten(float(self.log_time), 3)}   (steps × learning rate)",
        ]
        if self.learning_rate is not None:
            log_steps = float(self.log_time - jnp.log(self.learning_rate))
            lines.append(
                f"  steps         {power_of_ten(log_steps, 3)}   at learning rate {float(self.learning_rate):.4g}"
            )
        lines += [
            f"  bottleneck    r = {self.bottleneck}: {layers}",
            f"  speed         {float(self.speed):.4g}",
            f"  loss drop     {100 * float(self.drop):.3g} % at the escape",
            f"  outcome       {Status[self.status]}, {int(self.gradient_evaluations)} gradient evaluations",
            "  assuming that",
            *(f"    {text}" for text in self.assumptions),
            *(["  which does not hold here:", *concerns] if concerns else []),
        ]
        return "\n".join(lines)


_ONE_OF_A_BATCH = "Take one of them: jax.tree.map(lambda a: a[0], prediction)."


@safe_to_interrupt
def predict_escape(
    net: AbstractNetwork,
    task: Task,
    learning_rate: float | Array | None = None,
    layers: Sequence[int] | int | None = None,
) -> EscapePrediction:
    """Predict when gradient descent will carry a network from its small weights off the plateau.

    Near the origin only the leading order `𝓛_0` of the loss moves the weights. The flow of `𝓛_0` is followed in the
    plateau clock to where a loss that is quadratic along the network's output would be steepest: with `K` the slope and
    `q` the curvature of the loss along the output, where `γ = −𝓛_0 = (r−1)/(2r−1) · K²/q`. For smooth activations the
    samples enter this flow through one matrix only, so that its steps cost the same for any number of samples; the checks
    of the assumptions cost one gradient on all samples, and with a learning rate 24 Hessian-vector products.

    Weights are small as long as the pre-activations are: centre and scale the inputs, each to a mean square of one. What
    is predicted is plain gradient descent on all samples. With momentum `m` it takes about `1 − m` times as many steps,
    and a few times `1/(1 − m)` more; minibatches take as many steps as all samples, as long as their noise is small; Adam
    and other methods that rescale the gradient are not predicted, and have hardly any plateau.

    **Arguments:**

    - `net`: a network at its initialisation.
    - `task`: what it will be trained on.
    - `learning_rate`: to have the answer in steps.
    - `layers`: the `r` bottleneck layers, indices from 0; by default those of small init scale, see
      [`saddlejax.bottleneck_layers`][], which raises where that is not clear. To be given under `jax.jit` and `jax.vmap`.

    **Returns:** a [`saddlejax.EscapePrediction`][]; `print` it for the numbers with their assumptions, and with
    the concerns where assumptions do not hold. Made for small weights: the relative error falls with the init scale, and
    is largest where `r ≤ 2`. Computed in double precision, whatever that of the weights; under a transformation in theirs.

    **Raises:** `ValueError` for activations that do not vanish, or have no slope, at zero; for a task without signal at
    zero output, or whose loss does not curve upwards along the outputs; for traced weights without `layers`.
    """
    check_fits(net, task)
    if learning_rate is not None:
        _check.positive_number("learning_rate", learning_rate)
    chosen = chosen_layers(net, layers)
    slopes = tangent(net.activation)
    net, task = match_precision(net, task)
    dtype = task.x.dtype
    rate = None if learning_rate is None else jnp.asarray(learning_rate, dtype)
    arguments = (slopes, chosen, SIGNAL_ROUNDING * float(jnp.finfo(dtype).eps), learning_rate is not None)
    if _check.is_concrete(net, task):
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            prediction = _predict(*in_double(net, task), *arguments)
            prediction = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == jnp.float64 else a, prediction)
    else:
        prediction = _predict(net, task, *arguments)
    return eqx.tree_at(lambda p: p.learning_rate, prediction, rate, is_leaf=lambda leaf: leaf is None)


def in_double(net: AbstractNetwork, task: Task) -> tuple[AbstractNetwork, Task]:
    """Network and task in double precision, which has to be switched on."""
    return cast(net, jnp.float64), task.astype(jnp.float64)


def _predict(
    net: AbstractNetwork,
    task: Task,
    slopes: Tangent,
    chosen: tuple[int, ...],
    least_signal: float,
    with_sharpness: bool,
) -> EscapePrediction:
    pulls = pull(task)
    if _check.is_concrete(pulls) and not np.any(np.asarray(pulls)):
        raise _check.fail(
            "task", "have a loss that outputs of zero do not already minimise", "one whose slope there is zero"
        )
    first = chosen[0]
    small, linear_task = leading_order_problem(net, task, slopes, first)
    signal, error, sizes, growth = _at_start(net, task, small, linear_task, slopes)
    plateau = zero_loss(task)
    # Any guess will do: the direction hardly depends on how far the flow is followed. The first pass finds it, the
    # second the time. A loss of 1 − γ/(2 reach) falls to half of its value at zero weights where γ = reach, 2 reach
    # times slower.
    reach = FIRST_GUESS * jnp.where(plateau > 0, plateau, jnp.sum(jnp.abs(pulls)))
    cost, status = jnp.asarray(0), Status.escaped
    for _ in range(2):
        scaled = Task(linear_task.x, linear_task.y / (2 * reach), one_minus_overlap)
        flow = _follow(small, scaled)
        log_time = flow.log_escape_time - jnp.log(2 * reach)
        cost = cost + flow.stats["gradient_evaluations"]
        status = Status.where(status == Status.escaped, flow.status, status)
        end = net.with_weights([*net.weights[:first], *flow.net.weights])
        escaped = status == Status.escaped
        last, reach = reach, jnp.where(escaped, _steepest(end, task, chosen), reach)
        if _check.is_concrete(reach, escaped) and bool(escaped) and not np.isfinite(float(reach)):
            raise _check.fail(
                "task", "have a loss that curves upwards along the outputs", "one that is flat, or curves downwards"
            )
    status = Status.where(signal > least_signal, status, Status.stationary)
    escaped = status == Status.escaped
    bottleneck = jnp.asarray(chosen)
    return EscapePrediction(
        log_time=jnp.where(escaped, log_time, jnp.nan),
        learning_rate=None,
        layers=chosen,
        scales=init_scales(net)[bottleneck],
        speed=jnp.where(escaped, last / jnp.prod(layer_norms(end)[bottleneck]), jnp.nan),
        drop=jnp.where(escaped, last * (1 - _share_of_optimum(len(chosen)) / 2) / plateau, jnp.nan),
        status=status,
        gradient_evaluations=cost,
        signal=signal,
        gradient_error=error,
        preactivations=sizes,
        bend=_bend(end, task, slopes, first),
        growth_rate=growth,
        largest_learning_rate=2 / _sharpness(end, task) if with_sharpness else None,
    )


_sharpness = eqx.filter_jit(sharpness)


@eqx.filter_jit
def _at_start(
    net: AbstractNetwork, task: Task, small: "UpperLayers", linear_task: Task, slopes: Tangent
) -> tuple[Array, Array, Array, Array]:
    """Signal, error of the gradient, sizes of the pre-activations, rate of growth: see the fields of the prediction."""
    first = net.depth - small.depth
    zs = preactivations(net, task.x)
    features = task.x if first == 0 else net.activation(zs[first - 1])
    h = features if small.depth == 1 else slopes(preactivations(small, features)[-2])
    pulls = pull(task)
    overlap = jnp.matmul(_in_unit(pulls).T, _in_unit(h), precision="highest")
    lengths = jnp.linalg.norm(_in_unit(pulls), axis=1) * jnp.linalg.norm(_in_unit(h), axis=1)
    leading = jax.grad(lambda w: task_loss(small.with_weights(w), linear_task))(small.weights)
    full = jax.grad(lambda w: task_loss(net.with_weights(w), task))(net.weights)[first:]
    norm = lambda arrays: safe_norm(jnp.stack([safe_norm(a) for a in arrays]))  # noqa: E731
    error = norm([a - b for a, b in zip(full, leading, strict=True)]) / norm(leading)
    rates = [safe_norm(g) / safe_norm(w) for g, w in zip(leading, small.weights, strict=True)]
    sizes = [safe_norm(z) / jnp.sqrt(z.size) for z in zs[first:-1]]
    return jnp.linalg.norm(overlap) / jnp.sum(lengths), error, _stack(sizes, error.dtype), jnp.max(jnp.stack(rates))


def _in_unit(array: Array) -> Array:
    """The array in units of its largest entry, whose squares do not underflow."""
    largest = jnp.max(jnp.abs(array))
    return array / jnp.where(largest > 0, largest, 1)


def _stack(numbers: list[Array], dtype: jnp.dtype) -> Array:
    return jnp.stack(numbers) if numbers else jnp.zeros(0, dtype)


@eqx.filter_jit
def _bend(net: AbstractNetwork, task: Task, slopes: Tangent, first: int) -> Float[Array, " hidden"]:
    """`rms(σ(z) − σ_0(z)) / rms(σ_0(z))` in the hidden layers from `first` on."""
    zs = preactivations(net, task.x)[first:-1]
    return _stack([safe_norm(net.activation(z) - slopes(z)) / safe_norm(slopes(z)) for z in zs], task.x.dtype)


@eqx.filter_jit
def _follow(net: AbstractNetwork, task: Task) -> Flow:
    return gradient_flow(net, task, Escape(loss_fraction=0.5), save=Save(steps=False, singular_values=False))


class UpperLayers(AbstractNetworkOfParts):
    """The last layers of a network, with the tangent of its activation; every weight times a fixed multiplier."""

    weights: Weights
    multipliers: Weights
    activation_parts: ActivationParts

    def __init__(self, weights: Weights, multipliers: Weights, activation: Activation):
        self.weights, self.multipliers = weights, multipliers
        self.activation_parts = ActivationParts(activation)

    def matrices(self) -> Weights:
        """The matrices that multiply the signals."""
        return tuple(w * m for w, m in zip(self.weights, self.multipliers, strict=True))


def leading_order_problem(net: AbstractNetwork, task: Task, slopes: Tangent, first: int) -> tuple[UpperLayers, Task]:
    """The layers from the first bottleneck layer on, and the task whose gradient flow is that of `𝓛_0` in them.

    The layers below are a fixed map of the inputs. Above, the activation is its tangent at zero and the loss
    `1 − E⟨r, f⟩` with the pulls `r` of the samples; for a linear tangent only `M = Σ_i r_i h_iᵀ` counts, one sample an input.
    """
    features = task.x if first == 0 else net.activation(preactivations(net, task.x)[first - 1])
    pulls = pull(task)
    if slopes.linear:
        matrix = jnp.matmul(features.T, pulls, precision="highest")
        x, y = jnp.eye(len(matrix), dtype=matrix.dtype), matrix * len(matrix)
    else:
        x, y = features, pulls * task.samples
    multipliers = net.with_weights([jnp.ones_like(w) for w in net.weights]).matrices()
    upper = UpperLayers(net.weights[first:], multipliers[first:], slopes)
    return upper, Task(x, y, one_minus_overlap)


def one_minus_overlap(prediction: Float[Array, " out"], target: Float[Array, " out"]) -> Float[Array, ""]:
    """`1 − ⟨f, y⟩`: linear in the outputs, as every loss is to leading order, and unbounded below."""
    return 1 - jnp.dot(prediction, target, precision="highest")


def _share_of_optimum(bottleneck: int) -> float:
    """`(r−1)/(2r−1)`: where `K y^r − ½ q y^{2r}` is steepest on a ray, as a share of its optimum; for `r = 1` as for 2."""
    r = max(bottleneck, 2)
    return (r - 1) / (2 * r - 1)


@eqx.filter_jit
def _steepest(net: AbstractNetwork, task: Task, layers: tuple[int, ...]) -> Float[Array, ""]:
    """The signal energy at the escape, for a loss quadratic along the outputs; NaN where it does not curve upwards."""
    outputs = predict(net, task.x)
    zero, one = jnp.zeros((), outputs.dtype), jnp.ones((), outputs.dtype)

    def slope(a: Array) -> Array:
        return jax.jvp(lambda b: task.mean_loss(b * outputs), (a,), (one,))[1]

    fall, curvature = jax.jvp(slope, (zero,), (one,))
    upwards = curvature > 0
    return jnp.where(
        upwards, _share_of_optimum(len(layers)) * jnp.square(fall) / jnp.where(upwards, curvature, 1), jnp.nan
    )


def scale_for_steps(
    net: AbstractNetwork,
    task: Task,
    steps: float,
    learning_rate: float,
    layers: Sequence[int] | int | None = None,
) -> float:
    """The factor for the bottleneck layers at which the predicted plateau lasts `steps` steps of gradient descent.

    Any larger factor makes it shorter. Found by following the predictions of [`saddlejax.predict_escape`][] in the
    factor; `saddlejax.scale_layers(net, factor, layers)` applies it. Runs on the host: it cannot be used under `jax.jit`,
    `jax.vmap` or `jax.grad`.

    **Raises:** `ValueError` where no factor between 1e-20 and 1e20 has such a plateau, where nothing can be predicted, and
    for traced arguments.
    """
    _check.not_traced("scale_for_steps", net=net, task=task, steps=steps, learning_rate=learning_rate)
    _check.positive_number("steps", steps)
    _check.positive_number("learning_rate", learning_rate)
    check_fits(net, task)
    chosen = chosen_layers(net, layers)
    target = np.log(steps) + np.log(learning_rate)
    # The time falls with the scale: go to where the plateau is too short, or too long, in growing strides.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        double_net, double_task = in_double(net, task)

        def excess(log_factor: float) -> float:
            scaled = scale_layers(double_net, float(np.exp(log_factor)), chosen)
            return _predicted_log_time(predict_escape(scaled, double_task, layers=chosen)) - target

        here, other, stride = excess(0.0), 0.0, np.log(10.0)
        for _ in range(MOST_STRIDES):
            other += stride if here > 0 else -stride
            if (excess(other) > 0) != (here > 0):
                break
            stride *= 1.5
        else:
            found = np.exp(min(target + excess(other), 700.0)) / learning_rate
            rule = (
                f"be a length that some factor gives the plateau; a factor of {np.exp(other):.0e} gives it {found:.3g}"
            )
            remedy = "With two bottleneck layers the plateau grows like log 1/ε only." if len(chosen) == 2 else ""
            raise _check.fail("steps", rule, steps, remedy)
        bounded = lambda log_factor: max(excess(log_factor), -50.0)  # noqa: E731
        ends = sorted((0.0, other))
        return float(np.exp(scipy.optimize.root_scalar(bounded, bracket=ends, xtol=TOLERANCE, method="brentq").root))


def bottleneck_for_steps(net: AbstractNetwork, task: Task, scale: float, steps: float, learning_rate: float) -> int:
    """The largest number `r` of layers, counted from the input, that may be scaled by `scale` within `steps` steps.

    Runs on the host: it cannot be used under `jax.jit`, `jax.vmap` or `jax.grad`.

    **Arguments:** `net` at its full scale; `scale`, the `ε` of the bottleneck layers; `steps`, the longest plateau that
    is acceptable; `learning_rate`.

    **Returns:** between 0 and the depth; 0 where even one small layer takes longer.

    **Raises:** `ValueError` where nothing can be predicted, for numbers that are not positive, and for traced arguments.
    """
    _check.not_traced("bottleneck_for_steps", net=net, task=task, scale=scale, steps=steps, learning_rate=learning_rate)
    for name, value in (("scale", scale), ("steps", steps), ("learning_rate", learning_rate)):
        _check.positive_number(name, value)
    check_fits(net, task)
    allowed = 0
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        double_net, double_task = in_double(net, task)
        for r in range(1, net.depth + 1):
            prediction = predict_escape(scale_layers(double_net, scale, range(r)), double_task, layers=range(r))
            if _predicted_log_time(prediction) - np.log(learning_rate) > np.log(steps):
                break
            allowed = r
    return allowed


def _predicted_log_time(prediction: EscapePrediction) -> float:
    """The logarithm of the predicted time, `−inf` where there is no plateau; an error where nothing is predicted."""
    if bool(prediction.status == Status.met_at_start):
        return -np.inf
    if bool(prediction.status != Status.escaped):
        raise _check.fail("net", "have an escape that can be predicted", "one without", " ".join(prediction.concerns))
    return float(prediction.log_time)
