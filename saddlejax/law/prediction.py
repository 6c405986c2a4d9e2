"""A predicted escape: the numbers, what they rest on, and which of that does not hold, in words."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check
from .._numerics import power_of_ten
from ..flow import Status
from ..flow.result import SMALLEST_DROP

LEADING_ORDER = "the leading order of the loss"
LINEAR_LOSS = "the part of the loss that is linear in the outputs"
WHOLE_LOSS = "the loss itself"

SIGNAL_ROUNDING = 100
LARGEST_ERROR = 0.05
LARGEST_BEND = 0.5


class EscapePrediction(eqx.Module):
    """When a model should leave its plateau, what that rests on, and how well this holds.

    - `log_time`: logarithm of the predicted escape time `τ` in the time of `dθ/dt = −∇𝓛`; NaN where `status` is not
      `escaped`: a model that starts beyond the predicted escape has no plateau (`met_at_start`).
    - `learning_rate`: steps of gradient descent are `τ` over it; None where none was given.
    - `order`: the order `r` of the saddle; the number of small layers of a perceptron whose data have a signal, otherwise
      measured as by [`saddlejax.saddle_order`][]; NaN where there is none.
    - `followed`: what was followed to the escape: the leading order of the loss, the part of the loss that is linear in the outputs, or the
      loss itself; see [`saddlejax.predict_escape`][].
    - `layers`: the small groups of parameters, counted from 0: the bottleneck of a perceptron. `names`: what they are called
      in a model that is no perceptron, otherwise None.
    - `scales`: their init scales, `‖W_l‖/√(2 n_l)` with `n_l` rows, and the root mean square of groups with fewer than two axes.
    - `speed`: `K` of `dy/dt = K y^{r−1}`, what [`saddlejax.escape_time`][] calls by that name, at the end. For a perceptron it is the
      signal energy there over the product of the bottleneck layers' norms; for other models `y` is the root mean
      square of the norms of the small groups; NaN for a loss without outputs.
    - `drop`: by how much the loss is predicted to fall until then, as a share of its value on the plateau.
    - `status`: how the flow that was followed ended.
    - `gradient_evaluations`: what the prediction cost, on a problem without samples for a perceptron whose activation is smooth.

    The rest are checks of what the prediction assumes; `concerns` puts those that fail into
    words. `g = ∇c(0, y)`, and `h` are the signals of the last hidden layer, with the activation's tangent in place of it.

    - `signal`: `‖E[g hᵀ]‖ / E[‖g‖ ‖h‖]` at the start for a perceptron; `|E⟨g, f⟩| / E|⟨g, f⟩|` for other models. Where it is
      down at rounding the leading order of the loss vanishes. NaN for a loss without outputs.
    - `gradient_error`: `‖∇𝓛 − ∇𝓛_0‖ / ‖∇𝓛_0‖` at the start, with `𝓛_0` what is followed, over the layers from the bottleneck on, or over the
      small groups.
    - `preactivations`: of a perceptron: root mean squares at the start in the hidden layers from the bottleneck on, `(hidden,)`.
    - `bend`: by how much the activation departs there from its tangent at the predicted escape, relative, `(hidden,)`;
      empty where the model itself was followed, with all that it computes.
    - `growth_rate`: the largest `‖∂𝓛_0/∂W_l‖/‖W_l‖` at the start: a step changes the weights by this times the learning rate.
    - `largest_learning_rate`: `2/λ`, with the largest eigenvalue `λ` of the Hessian at the predicted escape: gradient descent
      is not stable above. None without a learning rate.
    """

    log_time: Float[Array, ""]
    learning_rate: Float[Array, ""] | None
    order: Float[Array, ""]
    followed: str = eqx.field(static=True)
    layers: tuple[int, ...] = eqx.field(static=True)
    names: tuple[str, ...] | None = eqx.field(static=True)
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
        if self.followed == WHOLE_LOSS:
            return ["the model follows the gradient flow of its loss, which was itself followed to the escape"]
        if self.followed == LEADING_ORDER:
            texts = [
                "the network's output stays small until the escape, so that only the leading order of the loss counts"
            ]
            if self.layers[0] > 0:
                texts.append("layers before the bottleneck stand still")
        else:
            texts = [
                "the model's output stays small until the escape, so that only the part of the loss that is linear in it counts",
                "what has a minimum of its own, such as the bias of the last layer, is there from the start",
            ]
        texts.append("the escape is the steepest point of a loss that is quadratic along the network's output")
        if _check.is_concrete(self.order) and jnp.ndim(self.order) == 0 and float(self.order) <= 2:
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
        if self._has_no_order:
            return [
                "The data give the small parameters no signal: no whole power of their scale stands above rounding, so that the order "
                "of this saddle is not known, and nothing is predicted. Measure the escape with saddlejax.gradient_flow."
            ]
        if self._has_no_signal:
            return [
                "The signal E[∇c(0, y) hᵀ] in the last hidden features h, which is E[∇c(0, y) xᵀ] times weights for a smooth "
                f"activation, vanishes to rounding ({self.signal:.1e} of E[‖∇c(0, y)‖ ‖h‖]). The leading order of the loss, which "
                "predictions under jax.jit and jax.vmap follow, is then zero: the order of this "
                f"saddle is higher than the number of small layers, {self.bottleneck}, its plateau is longer than "
                "such a number would tell, and nothing is predicted. Outside of them predict_escape measures the order."
            ]
        if bool(self.status == Status.underflow):
            return [
                f"At init scales {self._scales_in_words} the gradient is too small for the precision it was computed in. Outside of "
                "jax.jit and jax.vmap that is double precision, whatever that of the weights. Use larger scales, and "
                "saddlejax.escape_time, the law in closed form, for smaller ones."
            ]
        return [*self._concerns_about_the_start(), *self._concerns_about_the_end()]

    @property
    def _has_no_order(self) -> bool:
        return bool(jnp.isnan(self.order))

    @property
    def _has_no_signal(self) -> bool:
        return self.followed == LEADING_ORDER and bool(
            self.signal <= SIGNAL_ROUNDING * jnp.finfo(self.signal.dtype).eps
        )

    @property
    def _scales_in_words(self) -> str:
        return ", ".join(f"{float(s):.3g}" for s in self.scales)

    def _concerns_about_the_start(self) -> list[str]:
        texts = []
        if bool(self.status == Status.met_at_start):
            texts.append("The weights are too large for a plateau: the model starts beyond the predicted escape.")
        elif bool(self.status != Status.escaped):
            texts.append(f"The flow of {self.followed} did not reach an escape.")
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
        """The number of small layers, or of small groups of parameters."""
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
        known = "unknown" if self._has_no_order else str(int(self.order))
        groups = f"layers {', '.join(map(str, self.layers))}" if self.names is None else ", ".join(self.names)
        small = f"r = {known}: {groups} at init scales {self._scales_in_words}"
        if not np.isfinite(float(self.log_time)):
            lost = self._has_no_order or self._has_no_signal
            status = "no signal in the leading order" if lost else Status[self.status]
            lines = [
                f"Predicted escape: none ({status})",
                f"  bottleneck    {small}",
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
            f"  bottleneck    {small}",
            f"  speed         {float(self.speed):.4g}",
            f"  loss drop     {100 * float(self.drop):.3g} % at the escape",
            f"  outcome       {Status[self.status]}, {int(self.gradient_evaluations)} gradient evaluations",
            "  assuming that",
            *(f"    {text}" for text in self.assumptions),
            *(["  which does not hold here:", *concerns] if concerns else []),
        ]
        return "\n".join(lines)


_ONE_OF_A_BATCH = "Take one of them: jax.tree.map(lambda a: a[0], prediction)."
