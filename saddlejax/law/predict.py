"""Predicting the escape of a model from its small weights."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .. import _check
from .._host.interrupt import safe_to_interrupt
from ..bottleneck import chosen_groups
from ..networks.activation_class import value_at_zero
from ..objective import Problem, as_problem, output_slopes
from ..parameters import Trainable
from ..saddle.order import in_widest
from ..saddle.origin import has_tangent, tangent
from ..tasks.task import Task
from .leading_order import predict_from_leading_order
from .linear_loss import predict_from_linear_loss, predict_from_whole_loss
from .prediction import EscapePrediction


@safe_to_interrupt
def predict_escape(
    model: PyTree,
    task: Task | Callable[[Any], Array],
    learning_rate: float | int | Array | None = None,
    layers: Sequence[int] | int | None = None,
    *,
    where: Callable[[Any], Any] | None = None,
    trainable: Trainable | None = None,
) -> EscapePrediction:
    """Predict when gradient descent will carry a model from its small weights off the plateau.

    As long as the outputs are small, only what is linear in them moves the weights: the loss `C(0) + E⟨∇c(0, y), f(x)⟩`. Its flow
    is followed in the plateau clock to where a loss that is quadratic along the outputs would be steepest: with `K` the
    slope and `q` the curvature of the loss along them and `r` the order of the saddle, where
    `γ = −E⟨∇c(0, y), f⟩ = (r−1)/(2r−1) · K²/q`.

    - A perceptron whose data have a signal, `E[∇c(0, y) hᵀ] ≠ 0` in its last hidden features: `r` is the number of small
      layers, and the activation is replaced by its tangent at zero, which leaves the leading order `𝓛_0` of the loss. For smooth
      activations the samples enter this flow through one matrix only, so that its steps cost the same for any number of
      samples; the checks of the assumptions cost one gradient on all samples.
    - Any other model, and perceptrons without a signal, such as a smooth one on the parity of signs: the model itself is
      followed, on all samples, and `r` is measured as by [`saddlejax.saddle_order`][]. What has a minimum of its own,
      such as the bias of the last layer, is there from the start.
      Where the outputs grow like `ε^d` with `2d ≤ r`, as for GELU with three layers on the parity of signs, what is
      quadratic in them matters from the start, and the loss itself is followed instead.
    - A function `loss(model)`, which knows of no outputs: the flow of the loss itself is followed to its escape. This is
      no cheaper than [`saddlejax.gradient_flow`][].

    With a learning rate 24 Hessian-vector products more.

    Weights are small as long as the pre-activations are: centre and scale the inputs, each to a mean square of one. What
    is predicted is plain gradient descent on all samples. With momentum `m` it takes about `1 − m` times as many steps,
    and a few times `1/(1 − m)` more; minibatches take as many steps as all samples, as long as their noise is small; Adam
    and other methods that rescale the gradient are not predicted, and have hardly any plateau.

    **Arguments:**

    - `model`: any Equinox module at its initialisation.
    - `task`: what it will be trained on, or a function `loss(model) -> scalar`.
    - `learning_rate`: to have the answer in steps.
    - `layers`: the bottleneck layers of a perceptron, indices from 0; by default those of small init scale, see
      [`saddlejax.bottleneck_layers`][], which raises where that is not clear. To be given under `jax.jit` and `jax.vmap`.
    - `where`: the small groups of any model, `lambda m: [m.conv1.weight, …]`; by default all of them.
    - `trainable`: which arrays move, as for [`saddlejax.gradient_flow`][].

    **Returns:** a [`saddlejax.EscapePrediction`][]; `print` it for the numbers with their assumptions, and with
    the concerns where assumptions do not hold. Made for small weights: the relative error falls with the init scale, and
    is largest where `r ≤ 2`. Computed in double precision, whatever that of the weights; under a transformation in theirs.

    **Raises:** `ValueError` for perceptrons whose activation does not vanish at zero; for a task without signal at
    zero output, or whose loss does not curve upwards along the outputs; for traced weights of a perceptron without
    `layers`; and as [`saddlejax.gradient_flow`][] does for models and losses that do not fit.

    **Example:** `predict_escape(sj.scale_layers(model, 1e-3), task, learning_rate=0.1).steps`
    """
    if learning_rate is not None:
        _check.positive_number("learning_rate", learning_rate)
    problem = as_problem(model, task, trainable)
    small = chosen_groups(problem, layers, where)
    dtype = problem.parameters.arrays[0].dtype
    rate = None if learning_rate is None else jnp.asarray(learning_rate, dtype)
    prediction = in_widest(lambda problem: predicted(problem, small, trainable, learning_rate is not None), problem)
    return eqx.tree_at(lambda p: p.learning_rate, prediction, rate, is_leaf=lambda leaf: leaf is None)


def predicted(
    problem: Problem, small: tuple[int, ...], trainable: Trainable | None, with_sharpness: bool
) -> EscapePrediction:
    """The prediction in the precision of the problem, by the cheapest of the ways that holds for it."""
    task, model = problem.task, problem.model
    if task is None:
        return predict_from_whole_loss(problem, small, trainable, with_sharpness)
    slopes_at_zero = output_slopes(task)
    if _check.is_concrete(slopes_at_zero) and not np.any(np.asarray(slopes_at_zero)):
        raise _check.fail(
            "task", "have a loss that outputs of zero do not already minimise", "one whose slope there is zero"
        )
    if problem.perceptron:
        # An activation that does not vanish at zero is refused here; one without a slope there has an order of its own.
        sloped = value_at_zero(model.activation) != 0 or has_tangent(model.activation)
        slopes = tangent(model.activation) if sloped else None
        prediction = slopes and predict_from_leading_order(model, task, slopes, small, with_sharpness)
        if prediction is not None:
            return prediction
    return predict_from_linear_loss(problem, small, trainable, with_sharpness)
