"""The task of a flow, known to it but no part of its data."""

import jax

from ..tasks.task import Task


class TaskReference:
    """A task that goes along with a flow as long as the flow is passed on as it is.

    It has no leaves: a flow that is stacked, sliced, mapped over, returned by `jit` or pickled neither copies the data set
    nor remembers which one it was.
    """

    def __init__(self, task: Task | None = None):
        self.task = task

    def __reduce__(self) -> tuple:
        return TaskReference, ()


jax.tree_util.register_pytree_node(TaskReference, lambda _: ((), None), lambda _, __: TaskReference())
