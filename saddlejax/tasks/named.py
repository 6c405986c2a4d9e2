"""Tasks by name, for the command line and for files."""

from pathlib import Path

import numpy as np

from .. import _check
from ._digits import classification_task, digits
from ._mnist import NPZ_KEYS, named_mnist, read_npz
from .losses import mse
from .task import Task

OWN = ("x", "y")


def load(data: str = "digits", samples: int | None = None) -> Task:
    """The digits, MNIST, or a problem of one's own, with squared error.

    **Arguments:**

    - `data`: "digits"; what [`saddlejax.tasks.mnist`][] takes; or an `.npz` file with arrays `x` and `y`, one row a
      sample. Where `y` is integer, of shape `(samples,)`, it is the classes, from 0: inputs are centred and scaled, and
      targets one-hot with their mean removed, as for [`saddlejax.tasks.digits`][]. Otherwise it is the targets of a
      regression, and both are taken as they are; one output a sample may be of shape `(samples,)`.
    - `samples`: use the first so many.

    **Raises:** `ValueError` for more samples than there are, for arrays that do not fit, and as `mnist` does.
    """
    if data == "digits":
        task = digits()
        _check.at_most_samples(samples, task.samples, "the digits")
        return Task(task.x[:samples], task.y[:samples])
    if Path(data).suffix == ".npz":
        pair, x, y = read_npz("data", Path(data), OWN, NPZ_KEYS["train"])
        if pair == OWN:
            return _own(Path(data), x, y, samples)
    return named_mnist("data", data, "train", samples, mse)


def _own(path: Path, x: np.ndarray, y: np.ndarray, samples: int | None) -> Task:
    if len(x) != len(y):
        raise ValueError(f"data: {path} must hold as many rows of y as of x, but they are {len(y)} and {len(x)}.")
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise ValueError(f"data: {path} must hold real numbers, but {name} is of type {array.dtype}.")
    _check.at_most_samples(samples, len(x), str(path))
    x, y = x[:samples], y[:samples]
    if y.ndim == 1 and y.dtype.kind != "f":
        return classification_task(x, y, source=f"data: {path}")
    return Task(x.astype(float), y.reshape(len(y), -1).astype(float))
