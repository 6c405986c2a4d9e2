"""Predicting the escape of a real network from its small weights: the leading order of the loss, followed to its end."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Float

from . import _check
from ._interrupt import safe_to_interrupt
from .activations import Activation
from .bottleneck import chosen_layers, init_scales
from .flow import Escape, Flow, Save, Status, gradient_flow
from .flow.result import power_of_ten
from .networks import AbstractNetwork, Weights, layer_norms, preactivations, predict, scale_layers
from .saddle.origin import Tangent, pull, tangent
from .tasks.task import Task, check_fits, match_precision, zero_loss

FIRST_GUESS = 0.1
MOST_STRIDES = 6
TOLERANCE = 1e-4


class EscapePrediction(eqx.Module):
    """When a network should leave its plateau, and what that rests on.

    - `log_time`: logarithm of the predicted escape time `τ` in the time of `dθ/dt = −∇𝓛`; NaN where `status` is not
      `escaped`: a network that starts beyond the predicted escape has no plateau (`met_at_start`).
    - `learning_rate`: steps of gradient descent are `τ` over it; None where none was given.
    - `layers`: the bottleneck, `r` layers counted from 0, and their `scales` `‖W_l‖/√(2 n_l)`.
    - `speed`: `K`, the signal energy at the end over the product of the bottleneck layers' norms: what
      [`saddlejax.escape_time`][] calls by that name.
    - `drop`: by how much the loss is predicted to fall until then, as a share of its value at zero weights.
    - `status`: how the leading-order flow ended.
    - `gradient_evaluations`: what the prediction cost, on a problem without samples where the activation is smooth.
    """

    log_time: Float[Array, ""]
    learning_rate: Float[Array, ""] | None
    layers: tuple[int, ...] = eqx.field(static=True)
    scales: Float[Array, " bottleneck"]
    speed: Float[Array, ""]
    drop: Float[Array, ""]
    status: Status
    gradient_evaluations: Array

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
        if not np.isfinite(float(self.log_time)):
            return f"Predicted escape: none ({Status[self.status]}); the layers are too large for a plateau"
        scales = ", ".join(f"{float(s):.3g}" for s in self.scales)
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
            f"  bottleneck    r = {self.bottleneck}: layers {', '.join(map(str, self.layers))} at init scales {scales}",
            f"  speed         {float(self.speed):.4g}",
            f"  loss drop     {100 * float(self.drop):.3g} % at the escape",
            f"  outcome       {Status[self.status]}, {int(self.gradient_evaluations)} gradient evaluations",
            "  assuming that",
            *(f"    {text}" for text in self.assumptions),
        ]
        return "\n".join(lines)


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
    samples enter through one matrix only, so that a prediction costs the same for any number of samples.

    **Arguments:**

    - `net`: a network at its initialisation.
    - `task`: what it will be trained on.
    - `learning_rate`: to have the answer in steps.
    - `layers`: the `r` bottleneck layers, indices from 0; by default those of small init scale, see `saddlejax.bottleneck_layers`.

    **Returns:** a [`saddlejax.prediction.EscapePrediction`][]; `print` it for the numbers with their assumptions. Made for
    small weights: the relative error falls with the init scale, and is largest where `r ≤ 2`.

    **Raises:** `ValueError` for activations that do not vanish, or have no slope, at zero; for a task without signal at
    zero output.
    """
    check_fits(net, task)
    if learning_rate is not None:
        _check.positive_number("learning_rate", learning_rate)
    chosen = chosen_layers(net, layers)
    slopes = tangent(net.activation)
    net, task = match_precision(net, task)
    if _check.is_concrete(task.x, task.y) and not np.any(np.asarray(pull(task))):
        raise _check.fail("task", "pull the outputs away from zero", "one whose loss has no slope at zero output")
    small, linear_task = leading_order_problem(net, task, slopes, chosen[0])
    dtype = task.x.dtype
    reach = zero_loss(task) * FIRST_GUESS
    cost = jnp.asarray(0)
    for _ in range(2):
        # The direction hardly depends on how far the flow is followed: the first pass finds it, the second the time.
        # A loss of 1 − γ/(2 reach) falls to half of its value at zero weights where γ = reach, 2 reach times slower.
        scaled = Task(linear_task.x, linear_task.y / (2 * reach), one_minus_overlap)
        flow = _follow(small, scaled)
        log_time = flow.log_escape_time - jnp.log(2 * reach)
        cost = cost + flow.stats["gradient_evaluations"]
        last, reach = reach, _steepest(flow.net, net, task, chosen)
    norms = layer_norms(net.with_weights([*net.weights[: chosen[0]], *flow.net.weights]))
    return EscapePrediction(
        log_time=log_time,
        learning_rate=None if learning_rate is None else jnp.asarray(learning_rate, dtype),
        layers=chosen,
        scales=init_scales(net)[jnp.asarray(chosen)],
        speed=last / jnp.prod(norms[jnp.asarray(chosen)]),
        drop=last * (1 - _share_of_optimum(len(chosen)) / 2) / zero_loss(task),
        status=flow.status,
        gradient_evaluations=cost,
    )


@eqx.filter_jit
def _follow(net: AbstractNetwork, task: Task) -> Flow:
    return gradient_flow(net, task, Escape(loss_fraction=0.5), save=Save(steps=False, singular_values=False))


class UpperLayers(AbstractNetwork):
    """The last layers of a network, with the tangent of its activation; every weight times a fixed multiplier."""

    weights: Weights
    multipliers: Weights
    activation: Activation = eqx.field(static=True)

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
    return UpperLayers(weights=net.weights[first:], multipliers=multipliers[first:], activation=slopes), Task(
        x, y, one_minus_overlap
    )


def one_minus_overlap(prediction: Float[Array, " out"], target: Float[Array, " out"]) -> Float[Array, ""]:
    """`1 − ⟨f, y⟩`: linear in the outputs, as every loss is to leading order, and unbounded below."""
    return 1 - jnp.dot(prediction, target, precision="highest")


def _share_of_optimum(bottleneck: int) -> float:
    """`(r−1)/(2r−1)`: where `K y^r − ½ q y^{2r}` is steepest on a ray, as a share of its optimum; for `r = 1` as for 2."""
    r = max(bottleneck, 2)
    return (r - 1) / (2 * r - 1)


def _steepest(upper: AbstractNetwork, net: AbstractNetwork, task: Task, layers: tuple[int, ...]) -> Float[Array, ""]:
    """The signal energy at the escape, for a loss quadratic along the present outputs."""
    outputs = predict(net.with_weights([*net.weights[: layers[0]], *upper.weights]), task.x)
    zero, one = jnp.zeros((), outputs.dtype), jnp.ones((), outputs.dtype)

    def slope(a: Array) -> Array:
        return jax.jvp(lambda b: task.mean_loss(b * outputs), (a,), (one,))[1]

    fall, curvature = jax.jvp(slope, (zero,), (one,))
    return _share_of_optimum(len(layers)) * jnp.square(fall) / jnp.where(curvature > 0, curvature, 1)


def scale_for_steps(
    net: AbstractNetwork,
    task: Task,
    steps: float,
    learning_rate: float,
    layers: Sequence[int] | int | None = None,
) -> float:
    """The factor for the bottleneck layers at which the predicted plateau lasts `steps` steps of gradient descent.

    Any larger factor makes it shorter. Found by following the predictions of [`saddlejax.predict_escape`][] in the
    factor; `saddlejax.scale_layers(net, factor, layers)` applies it.

    **Raises:** `ValueError` where no factor between 1e-20 and 1e20 has such a plateau.
    """
    _check.positive_number("steps", steps)
    _check.positive_number("learning_rate", learning_rate)
    chosen = chosen_layers(net, layers)
    target = np.log(steps) + np.log(learning_rate)

    def excess(log_factor: float) -> float:
        scaled = scale_layers(net, float(np.exp(log_factor)), chosen)
        value = float(predict_escape(scaled, task, layers=chosen).log_time) - target
        return value if np.isfinite(value) else -np.inf

    # The time falls with the scale: go to where the plateau is too short, or too long, in growing strides.
    here, other, stride = excess(0.0), 0.0, np.log(10.0)
    for _ in range(MOST_STRIDES):
        other += stride if here > 0 else -stride
        if (excess(other) > 0) != (here > 0):
            break
        stride *= 1.5
    else:
        longest = np.exp(min(target + excess(other), 700.0)) / learning_rate
        remedy = "With two bottleneck layers the plateau grows like log 1/ε only." if len(chosen) == 2 else ""
        reach = (
            f"be a length that the plateau has at some scale: at {np.exp(other):.0e} times this one it is {longest:.3g}"
        )
        raise _check.fail("steps", reach, steps, remedy)
    bounded = lambda log_factor: max(excess(log_factor), -50.0)  # noqa: E731
    ends = sorted((0.0, other))
    return float(np.exp(scipy.optimize.root_scalar(bounded, bracket=ends, xtol=TOLERANCE, method="brentq").root))


def bottleneck_for_steps(net: AbstractNetwork, task: Task, scale: float, steps: float, learning_rate: float) -> int:
    """The largest number `r` of layers, counted from the input, that may be scaled by `scale` within `steps` steps.

    **Arguments:** `net` at its full scale; `scale`, the `ε` of the bottleneck layers; `steps`, the longest plateau that
    is acceptable; `learning_rate`.

    **Returns:** between 0 and the depth; 0 where even one small layer takes longer.
    """
    _check.positive_number("steps", steps)
    allowed = 0
    for r in range(1, net.depth + 1):
        layers = tuple(range(r))
        prediction = predict_escape(scale_layers(net, scale, layers), task, learning_rate, layers)
        if not float(prediction.steps) <= steps:
            break
        allowed = r
    return allowed
