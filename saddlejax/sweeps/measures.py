"""What a sweep measures of every lane, with meaning and unit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import _check
from ..flow import Flow
from ..saddle import EscapeDirection, low_rank_margin
from .identity import described

LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
TIME_UNIT = "time of dθ/dt = −∇𝓛 (gradient-descent steps × learning rate)"


@dataclass(frozen=True)
class Variable:
    """A measurement: how to get it from the result of a lane, the names of its own axes, its meaning and unit."""

    function: Callable[[Any], Array]
    meaning: str
    units: str = "1"
    dims: tuple[str, ...] | None = ()


@dataclass(frozen=True)
class Field:
    """A field of a result; of its rows the one with index `row`, where given. (A class, so that it can be pickled.)"""

    name: str
    row: int | None = None

    def __call__(self, result: Any) -> Array:
        """The field of a result."""
        value = getattr(result, self.name)
        return value if self.row is None else value[self.row]


@dataclass(frozen=True)
class Stat:
    """A count from the `stats` of a flow."""

    name: str

    def __call__(self, flow: Flow) -> Array:
        """The count of a flow."""
        return flow.stats[self.name]


def singular_ratio(best: EscapeDirection) -> Array:
    """`σ2/σ1` of every layer."""
    return jnp.stack([v[1] / v[0] if v.size > 1 else jnp.zeros_like(v[0]) for v in best.singular_values])


def direction_margin(best: EscapeDirection) -> Array:
    """`(σ1/σ2)/l^(1/4)` of every layer."""
    return low_rank_margin(best.weights)


def direction_work(best: EscapeDirection) -> Array:
    """The gradients spent on all starts."""
    return jnp.sum(best.gradient_evaluations)


FLOW_VARIABLES = {
    "log_escape_time": Variable(
        Field("log_escape_time"), "natural logarithm of the escape time; NaN unless escaped", f"log {TIME_UNIT}"
    ),
    "log_time": Variable(
        Field("log_times", -1), "natural logarithm of the time at the end of the flow", f"log {TIME_UNIT}"
    ),
    "initial_loss": Variable(Field("losses", 0), "loss at the start", "loss"),
    "final_loss": Variable(Field("losses", -1), "loss at the end of the flow", "loss"),
    "gradient_norm": Variable(Field("gradient_norms", -1), "norm of the gradient at the end of the flow"),
    "layer_norms": Variable(
        Field("layer_norms", -1),
        "Frobenius norms of the layers at the end of the flow; NaN beyond the depth",
        dims=("layer",),
    ),
    "imbalance_error": Variable(
        Field("imbalance_error"),
        "largest relative violation of the imbalance identity over the rows kept: the numerical error",
    ),
    "resolved": Variable(
        Field("resolved"), "whether the flow depends on nothing that is smaller than rounding, see saddlejax.Flow"
    ),
    "steps": Variable(Stat("steps"), "accepted steps", "steps"),
    "rejected_steps": Variable(Stat("rejected_steps"), "rejected steps", "steps"),
    "gradient_evaluations": Variable(Stat("gradient_evaluations"), "gradients spent", "gradients"),
    "hessian_vector_products": Variable(
        Stat("hessian_vector_products"), "Hessian-vector products spent", "Hessian-vector products"
    ),
}
"""Of the final record of a gradient flow, whose last row is the end."""


DIRECTION_VARIABLES = {
    "speed": Variable(Field("speed"), "escape speed s of the best direction found", "1 / time (unit layers)"),
    "residual": Variable(Field("residual"), "distance from stationarity over s"),
    "upper_bound": Variable(Field("upper_bound"), "upper bound of the speed at any width", "1 / time (unit layers)"),
    "proven_bound": Variable(Field("proven_bound"), "upper bound that needs no search", "1 / time (unit layers)"),
    "rank_one_speed": Variable(
        Field("rank_one_speed"), "best speed with all layers of rank one", "1 / time (unit layers)"
    ),
    "kinks": Variable(Field("kinks"), "pairs of a sample and a neuron on the kink of the activation", "pairs"),
    "low_rank_margin": Variable(
        direction_margin, "(σ1/σ2) / l^(1/4) of layer l; NaN beyond the depth", dims=("layer",)
    ),
    "singular_ratio": Variable(singular_ratio, "σ2/σ1 of every layer; NaN beyond the depth", dims=("layer",)),
    "gradient_evaluations": Variable(direction_work, "gradients spent on all starts", "gradients"),
}
"""Of an escape direction."""


def measured(name: str, function: Callable[[Any], Array], result: Any) -> Array:
    """The measurement of a result whose values may not be known yet.

    **Raises:** `ValueError` where the function looks at values while JAX traces it.
    """
    try:
        return jnp.asarray(function(result))
    except LOOKS_AT_VALUES as error:
        raise ValueError(
            f"measure[{name!r}] must be a function that JAX can trace, but it looks at the values of its argument "
            f"({type(error).__name__}). Write it with jax.numpy: jnp.where in place of if, no float(), int(), item() or "
            "NumPy. Or keep what it needs by a measure of its own, and look at the values in the results."
        ) from None


def custom(measure: dict[str, Callable[[Any], Array]] | None, known: dict[str, Variable]) -> dict[str, Variable]:
    """The measurements of a user added to the known ones."""
    if not isinstance(measure, dict | None):
        raise _check.fail(
            "measure", "be a dictionary of functions by name", repr(measure), "Write measure={'top': function}."
        )
    added = {}
    for name, function in (measure or {}).items():
        if not isinstance(name, str) or not name.isidentifier() or name in (*known, "status"):
            raise ValueError(
                f"measure must name new measurements by identifiers, but it has {name!r}. Taken are status, "
                f"{', '.join(known)}."
            )
        if not callable(function):
            raise ValueError(f"measure[{name!r}] must be a function of the result of a lane, but it was {function!r}.")
        meaning = (getattr(function, "__doc__", None) or "custom measurement").strip().splitlines()[0]
        added[name] = Variable(described(function), meaning, "", None)
    return {**known, **added}
