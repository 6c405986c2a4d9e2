"""What a flow lowers: the loss of a model on a task, or any function of a model."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from . import _check
from ._numerics import in_precision
from .networks.checks import check_weights, is_perceptron
from .parameters import Parameters, Trainable
from .tasks.task import Task, zero_loss


class AbstractObjective(eqx.Module):
    """A loss of a model, with the height of its first plateau.

    All matrix products run at full precision, whatever the global setting.
    """

    @abc.abstractmethod
    def loss(self, model: PyTree) -> Float[Array, ""]:
        """The loss `𝓛`."""

    @abc.abstractmethod
    def plateau(self) -> Float[Array, ""]:
        """The height of the first plateau: the loss where the model puts out zero, or where its parameters are zero."""

    @abc.abstractmethod
    def has_signal(self) -> Array:
        """Whether something drives a model away from the origin, as far as that can be told without a model."""


class TaskObjective(AbstractObjective):
    """The mean loss of a model over the samples of a task."""

    task: Task

    def loss(self, model: PyTree) -> Float[Array, ""]:
        return task_loss(model, self.task)

    def plateau(self) -> Float[Array, ""]:
        return zero_loss(self.task)

    def has_signal(self) -> Array:
        return jnp.any(output_slopes(self.task) != 0)


class LossObjective(AbstractObjective):
    """A function `loss(model) -> scalar`; its plateau is the loss of the model with all parameters at zero."""

    function: Callable[[Any], Array]
    at_zero: Float[Array, ""]

    def loss(self, model: PyTree) -> Float[Array, ""]:
        with jax.default_matmul_precision("highest"):
            return self.function(model)

    def plateau(self) -> Float[Array, ""]:
        return self.at_zero

    def has_signal(self) -> Array:
        return jnp.asarray(True)


def outputs(model: PyTree, x: Float[Array, "samples ..."]) -> Float[Array, "samples out"]:
    """What a model puts out for every sample, one row each: what its `__call__` returns."""
    with jax.default_matmul_precision("highest"):
        return jax.vmap(model)(x)


def task_loss(model: PyTree, task: Task) -> Float[Array, ""]:
    """The loss `𝓛` of a model on a task."""
    return task.mean_loss(outputs(model, task.x))


def output_slopes(task: Task) -> Float[Array, "samples out"]:
    """The slope of the loss in the outputs, `∂𝓛/∂f(x_i) = p_i ∇c(0, y_i)`, at outputs of zero."""
    return jax.grad(task.mean_loss)(jnp.zeros((task.samples, task.out_size), task.x.dtype))


class Problem(eqx.Module):
    """A model and what it lowers, checked and in one precision: what all computations with any model start from."""

    parameters: Parameters
    objective: AbstractObjective
    perceptron: bool = eqx.field(static=True)
    """Whether the groups are the layers of a perceptron."""

    @property
    def model(self) -> PyTree:
        """The model."""
        return self.parameters.model

    @property
    def task(self) -> Task | None:
        """The task, where the objective is that of one."""
        return self.objective.task if isinstance(self.objective, TaskObjective) else None

    @property
    def lowered(self) -> Task | Callable[[Any], Array]:
        """What the problem was made of, beside the model: the task, or the function `loss(model)`."""
        objective = self.objective
        assert isinstance(objective, TaskObjective | LossObjective)
        return objective.task if isinstance(objective, TaskObjective) else objective.function

    def loss(self, arrays: tuple[Array, ...]) -> Float[Array, ""]:
        """The loss as a function of the groups."""
        return self.objective.loss(self.parameters.with_arrays(arrays))


def as_problem(model: PyTree, task: Task | Callable[[Any], Array], trainable: Trainable | None = None) -> Problem:
    """A model with a task, or with a loss of its own, as a problem; in the wider of their floating-point types.

    **Raises:** `ValueError` where the model cannot be called on a sample of the task, or does not return what the task
    needs; where it depends on a random key or a state; where the loss is no real scalar, or is not finite.
    """
    parameters = Parameters.of(model, trainable)
    perceptron = trainable is None and is_perceptron(model)
    if perceptron:
        check_weights("model.weights", parameters.arrays)
    for name, array in zip(parameters.names, parameters.arrays, strict=True):
        _check.float_type(f"model.{name}", array.dtype)
        _check.finite(f"model.{name}", array)
    if isinstance(task, Task):
        dtype = jnp.result_type(task.x, *parameters.arrays)
        parameters, task = in_precision(parameters, dtype), task.astype(dtype)
        _check_outputs(parameters.model, task)
        return Problem(parameters, TaskObjective(task), perceptron)
    if not callable(task):
        raise _check.fail("task", "be a saddlejax.Task, or a function loss(model) -> scalar", type(task).__name__)
    parameters = in_precision(parameters, jnp.result_type(*parameters.arrays))
    objective = LossObjective(task, jnp.zeros(()))
    _check_loss(objective, parameters)
    at_zero = objective.loss(parameters.with_arrays([jnp.zeros_like(a) for a in parameters.arrays]))
    return Problem(parameters, LossObjective(task, at_zero), perceptron)


def _check_outputs(model: PyTree, task: Task) -> None:
    """Refuse a model that cannot be called on one sample, or whose output is not that of the task."""
    name = type(model).__name__
    if not callable(model):
        raise _check.fail(
            "model",
            "map a sample to an output by its __call__ where a task is given",
            f"a {name}, which cannot be called",
            "Give a function loss(model) -> scalar in place of the task.",
        )
    sample = jax.ShapeDtypeStruct(task.x.shape[1:], task.x.dtype)
    try:
        output = eqx.filter_eval_shape(model, sample)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise _check.fail(
            "model",
            f"map one sample of shape {sample.shape} to an output",
            f"a {name}, whose call failed ({type(error).__name__}: {reason})",
            _remedy(model),
        ) from error
    shape = getattr(output, "shape", None)
    if shape is None:
        raise _check.fail(
            "model", "return one array for a sample", f"a {name} that returns a {type(output).__name__}", _remedy(model)
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise _check.fail("model", "return real numbers", f"a {name} that returns {output.dtype}")
    if shape != (task.out_size,):
        raise _check.fail(
            "model",
            f"return an array of shape ({task.out_size},) for one sample, as the task needs",
            f"a {name} that maps a sample of shape {sample.shape} to shape {shape}",
            "A model maps one sample, not a batch: saddlejax takes jax.vmap of it.",
        )


def _remedy(model: PyTree) -> str:
    """What to do with a model that needs more than a sample."""
    parts = jax.tree.leaves(model, is_leaf=lambda part: isinstance(part, eqx.Module) and part is not model)
    kinds = {type(part) for part in _modules(parts)}
    if eqx.nn.Dropout in kinds:
        return "Dropout needs a random key; but the loss of a gradient flow is a fixed function: pass eqx.nn.inference_mode(model)."
    if eqx.nn.BatchNorm in kinds:
        return (
            "Batch normalisation has a state and mixes samples. Write a function loss(model) -> scalar that passes the state, "
            "with eqx.nn.inference_mode(model), or use a normalisation of single samples such as eqx.nn.LayerNorm."
        )
    return (
        "It must depend on the sample alone, not on a random key or a state: use eqx.nn.inference_mode(model), or wrap the "
        "call in a function loss(model) -> scalar."
    )


def _modules(parts: list[Any]) -> list[Any]:
    """All modules within a list of parts, whatever their depth."""
    found = []
    for part in parts:
        if isinstance(part, eqx.Module):
            found.append(part)
            found += _modules(
                jax.tree.leaves(list(vars(part).values()), is_leaf=lambda leaf: isinstance(leaf, eqx.Module))
            )
    return found


def _check_loss(objective: AbstractObjective, parameters: Parameters) -> None:
    """Refuse a loss that is no finite real scalar."""
    try:
        value = eqx.filter_eval_shape(lambda p: objective.loss(p.model), parameters)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise _check.fail(
            "task",
            "be a saddlejax.Task, or a function loss(model) -> scalar that JAX can trace",
            f"a function that failed on the model ({type(error).__name__}: {reason})",
        ) from error
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != ():
        raise _check.fail("loss", "return a scalar", f"a function that returns {shape or type(value).__name__}")
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise _check.fail("loss", "return a real number", f"a function that returns {dtype}")
