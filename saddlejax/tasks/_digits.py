"""The handwritten digits that come with scikit-learn."""

import jax.numpy as jnp
import numpy as np

from .. import _check
from .losses import cross_entropy, mse
from .task import SampleLoss, Task


def classification_task(
    inputs: np.ndarray,
    labels: np.ndarray,
    classes: int | None = None,
    loss: SampleLoss = mse,
    *,
    source: str = "labels",
) -> Task:
    """A task from images and labels: inputs centred and of mean square norm one, targets made to fit the loss.

    Squared error (and any loss that is not cross-entropy) gets one-hot targets with their mean removed, so that the
    escape from the origin is driven by what distinguishes the classes and not by how common they are;
    cross-entropy gets the integer labels.

    **Arguments:** `inputs`, one row a sample, of any shape; `labels`, whole numbers from 0, one a sample; `classes`,
    their number, by default one more than the largest label; `source`, what to name the data in errors.

    **Raises:** `ValueError` for other labels, and for inputs that are all the same, of which nothing is left.
    """
    labels = _whole_labels(labels, len(inputs), classes, source)
    classes = int(labels.max()) + 1 if classes is None else classes
    x = np.asarray(inputs, dtype=float).reshape(len(inputs), -1)
    x = x - x.mean(axis=0)
    size = np.sqrt(np.mean(np.sum(x**2, axis=1)))
    if not size > 0:
        raise _check.fail("samples", "differ, since their mean is subtracted", f"{len(x)} equal images", "Take more.")
    x = x / size
    if loss is cross_entropy:
        return Task(jnp.asarray(x), jnp.asarray(labels), loss, out_size=classes)
    one_hot = np.eye(classes)[labels]
    return Task(jnp.asarray(x), jnp.asarray(one_hot - one_hot.mean(axis=0)), loss)


def _whole_labels(labels: np.ndarray, samples: int, classes: int | None, source: str) -> np.ndarray:
    """Labels as integers, where nothing is lost by it."""
    labels = np.asarray(labels)
    rule = "whole numbers from 0" + ("" if classes is None else f" to {classes - 1}")
    remedy = "Real targets, for regression, are the array y of an .npz file with x and y, or of saddlejax.Task(x, y)."
    if labels.shape != (samples,):
        raise ValueError(
            f"{source} must have labels of shape ({samples},), {rule}, but they were of shape {labels.shape}. {remedy}"
        )
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"{source} must have labels that are {rule}, but they were of type {labels.dtype}. {remedy}")
    highest = np.inf if classes is None else classes - 1
    wrong = labels[(labels != np.floor(labels)) | (labels < 0) | (labels > highest)]
    if wrong.size:
        raise ValueError(f"{source} must have labels that are {rule}, but {wrong.size} were not: {wrong[0]}. {remedy}")
    return labels.astype(int)


def digits(loss: SampleLoss = mse) -> Task:
    """Handwritten digits: 1,797 images of 8 × 8 pixels in ten classes, installed with scikit-learn.

    `x` is `(1797, 64)`, centred, of mean square norm one; `y` is `(1797, 10)`, one-hot with its mean removed, or
    the integer labels where `loss` is [`saddlejax.cross_entropy`][].

    Source: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    return classification_task(data.data, data.target, 10, loss)
