"""A learning problem: inputs, targets and a loss."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _check
from .._numerics import in_precision
from .losses import cross_entropy, mse

SampleLoss = Callable[[Array, Array], Array]


class Task(eqx.Module):
    """A learning problem with loss `𝓛(θ) = mean_i c(f(x_i), y_i)`.

    **Arguments:**

    - `x`: inputs, shape `(samples, in_size)`, or any shape `(samples, ...)` whose samples a model takes, such as images
      `(samples, channels, height, width)`. Whole numbers become floating-point ones.
    - `y`: targets, shape `(samples, out_size)`, or integer class labels of shape `(samples,)`.
    - `loss`: `c(prediction, target) -> scalar` of one sample: `saddlejax.mse`, `saddlejax.cross_entropy`, or any
      differentiable JAX function.
    - `sample_weights`: weights of the samples, shape `(samples,)`, non-negative with sum one: the loss is then
      `Σ_i p_i c(f(x_i), y_i)`, for instance a quadrature rule. By default all are equal.
    - `out_size`: number of outputs; needed only for integer labels that do not show all classes.

    **Raises:** `ValueError` for empty data, shapes that do not match, NaN or infinity, and half precision.

    **Example:**

    ```python
    images, labels = jnp.ones((20, 1, 8, 8)), jnp.arange(20) % 10
    task = sj.Task(images, labels, sj.cross_entropy)
    print(task)  # Task: 20 samples of shape (1, 8, 8), 10 outputs, loss cross_entropy, float32
    ```
    """

    x: Float[Array, "samples *sample"]
    y: Array
    loss: SampleLoss = eqx.field(static=True)
    sample_weights: Float[Array, " samples"] | None
    out_size: int = eqx.field(static=True)

    def __init__(
        self,
        x: Any,
        y: Any,
        loss: SampleLoss = mse,
        *,
        sample_weights: Any = None,
        out_size: int | None = None,
    ):
        if not callable(loss):
            raise _check.fail("loss", "be a function loss(prediction, target) -> scalar", repr(loss))
        self.x = _as_float(x, "x")
        self.y = _as_target(y, loss)
        self.loss = loss
        self.sample_weights = None if sample_weights is None else _as_float(sample_weights, "sample_weights")
        _check_data(self.x, self.y, loss)
        self.out_size = _out_size(self.y, out_size)
        if self.sample_weights is not None:
            _check_sample_weights(self.sample_weights, self.samples)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.x.shape[0]

    @property
    def in_size(self) -> int:
        """Number of inputs, where `x` is a matrix.

        **Raises:** `ValueError` where a sample is no vector.
        """
        if self.x.ndim != 2:
            raise _check.fail(
                "task.x",
                "be a matrix (samples, in_size), since a perceptron takes vectors",
                f"of shape {self.x.shape}",
                "Flatten the samples by x.reshape(len(x), -1), or use a model that takes them as they are.",
            )
        return self.x.shape[1]

    def mean(self, per_sample: Float[Array, " samples"]) -> Float[Array, ""]:
        """The mean over samples, weighted where the task has sample weights."""
        if self.sample_weights is None:
            return jnp.mean(per_sample)
        return jnp.dot(self.sample_weights.astype(per_sample.dtype), per_sample, precision="highest")

    def mean_loss(self, predictions: Float[Array, "samples out"]) -> Float[Array, ""]:
        """The loss `𝓛` for given outputs, one row a sample."""
        return self.mean(jax.vmap(self.loss)(predictions, self.y))

    def astype(self, dtype: Any) -> "Task":
        """The same task with its floating-point arrays in another precision, float32 or float64."""
        _check.float_type("dtype", dtype)
        return in_precision(self, dtype)

    def __str__(self) -> str:
        name = getattr(self.loss, "__name__", type(self.loss).__name__)
        inputs = f", {self.in_size} inputs" if self.x.ndim == 2 else f" of shape {self.x.shape[1:]}"
        return f"Task: {self.samples} samples{inputs}, {self.out_size} outputs, loss {name}, {self.x.dtype}"


def zero_loss(task: Task) -> Float[Array, ""]:
    """The loss `C(0)` at the origin, where every output is zero: the height of the first plateau."""
    return task.mean_loss(jnp.zeros((task.samples, task.out_size), task.x.dtype))


def _as_float(values: Any, argument: str) -> Array:
    array = values if isinstance(values, jax.Array) else jnp.asarray(np.asarray(values))
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise _check.fail("x and y", "be real", f"of type {array.dtype}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(float)
    _check.float_type(argument, array.dtype)
    return array


def _as_target(y: Any, loss: SampleLoss) -> Array:
    array = y if isinstance(y, jax.Array) else jnp.asarray(np.asarray(y))
    if jnp.issubdtype(array.dtype, jnp.integer) and array.ndim == 1:
        if loss is mse:
            raise _check.fail(
                "y",
                "hold one row of numbers a sample for squared error",
                f"integer labels of shape {array.shape}",
                "Use loss=saddlejax.cross_entropy, or jax.nn.one_hot(y, classes).",
            )
        return array
    return _as_float(array, "y")


def _check_data(x: Array, y: Array, loss: SampleLoss) -> None:
    if x.ndim < 2 or 0 in x.shape:
        raise _check.fail(
            "x",
            "be a non-empty matrix (samples, in_size), or hold samples of another shape, (samples, ...)",
            f"of shape {x.shape}",
            "One number a sample is x[:, None]." if x.ndim == 1 else "",
        )
    labels = jnp.issubdtype(y.dtype, jnp.integer)
    if not labels and (y.ndim != 2 or 0 in y.shape):
        raise _check.fail(
            "y",
            "be a non-empty matrix (samples, out_size), or integer labels (samples,)",
            f"of shape {y.shape} and type {y.dtype}",
            "Labels must be integers (y.astype(int))."
            if loss is cross_entropy
            else "One output a sample is y[:, None].",
        )
    if len(x) != len(y):
        raise _check.fail("y", f"have one row for each of the {len(x)} samples of x", f"of shape {y.shape}")
    _check.finite("x", x, "Remove or fill the samples concerned.")
    if not labels:
        _check.finite("y", y, "Remove or fill the samples concerned.")
    if loss is cross_entropy and not labels and _check.is_concrete(y):
        probabilities = np.asarray(y)
        if not (np.all(probabilities >= 0) and np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)):
            raise _check.fail(
                "y", "hold probabilities that sum to one, for cross-entropy", "other numbers", "Or give integer labels."
            )


def _out_size(y: Array, out_size: int | None) -> int:
    if out_size is not None:
        _check.whole_number("out_size", out_size)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        if out_size not in (None, y.shape[1]):
            raise _check.fail("out_size", f"be {y.shape[1]}, the number of columns of y", out_size)
        return y.shape[1]
    if not _check.is_concrete(y):
        if out_size is None:
            raise _check.fail("out_size", "be given where labels are traced", None)
        return out_size
    lowest, highest = int(np.min(np.asarray(y))), int(np.max(np.asarray(y)))
    if lowest < 0:
        raise _check.fail("y", "hold labels 0, 1, 2, …", f"labels from {lowest} to {highest}")
    if out_size is not None and out_size <= highest:
        raise _check.fail("out_size", f"exceed the largest label, {highest}", out_size)
    return out_size or highest + 1


def _check_sample_weights(weights: Array, samples: int) -> None:
    if weights.shape != (samples,):
        raise _check.fail("sample_weights", f"have shape ({samples},)", f"of shape {weights.shape}")
    if _check.is_concrete(weights):
        total = float(np.sum(np.asarray(weights)))
        if not (np.all(np.asarray(weights) >= 0) and abs(total - 1) < 1e-4):
            raise _check.fail("sample_weights", "be non-negative with sum one", f"weights with sum {total}")
