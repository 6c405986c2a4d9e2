"""The handwritten digits that come with scikit-learn."""

import jax.numpy as jnp
import numpy as np

from ..losses import cross_entropy, mse
from .task import SampleLoss, Task


def classification_task(inputs: np.ndarray, labels: np.ndarray, classes: int, loss: SampleLoss) -> Task:
    """A task from images and labels: inputs centred and of mean square norm one, targets made to fit the loss.

    Squared error (and any loss that is not cross-entropy) gets one-hot targets with their mean removed, so that the
    escape from the origin is driven by what distinguishes the classes and not by how common they are;
    cross-entropy gets the integer labels.
    """
    x = np.asarray(inputs, dtype=float).reshape(len(inputs), -1)
    x = x - x.mean(axis=0)
    x = x / np.sqrt(np.mean(np.sum(x**2, axis=1)))
    if loss is cross_entropy:
        return Task(jnp.asarray(x), jnp.asarray(labels, dtype=int), loss, out_size=classes)
    one_hot = np.eye(classes)[np.asarray(labels, dtype=int)]
    return Task(jnp.asarray(x), jnp.asarray(one_hot - one_hot.mean(axis=0)), loss)


def digits(loss: SampleLoss = mse) -> Task:
    """Handwritten digits: 1,797 images of 8 × 8 pixels in ten classes, installed with scikit-learn.

    `x` is `(1797, 64)`, centred, of mean square norm one; `y` is `(1797, 10)`, one-hot with its mean removed, or
    the integer labels where `loss` is [`saddlejax.cross_entropy`][].

    Source: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    return classification_task(data.data, data.target, 10, loss)
