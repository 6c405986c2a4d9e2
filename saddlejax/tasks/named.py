"""Tasks by name, for the command line and for files."""

from .digits import digits
from .mnist import mnist
from .task import Task


def load(data: str = "digits", samples: int | None = None) -> Task:
    """The digits, or MNIST.

    **Arguments:** `data`, "digits", or what [`saddlejax.tasks.mnist`][] takes; `samples`, use the first so many.

    **Raises:** `ValueError` for more samples than there are, and as `mnist` does.
    """
    if data != "digits":
        return mnist(data, samples=samples)
    task = digits()
    if samples is None:
        return task
    if not 1 <= samples <= task.samples:
        raise ValueError(
            f"samples must be at least 1 and at most {task.samples}, the size of the digits, but it was {samples}."
        )
    return Task(task.x[:samples], task.y[:samples])
