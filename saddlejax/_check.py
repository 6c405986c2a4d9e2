"""Checks of arguments: every message names the argument, the rule, what came, and what to do."""

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_concrete(*trees: Any) -> bool:
    """Whether values can be looked at now, that is, nothing in the trees is being traced."""
    leaves = jax.tree.leaves(trees)
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def not_traced(function: str, **arguments: Any) -> None:
    """Refuse a transformation of a function that runs on the host: traced arguments, and calls that `jax.jit` traces."""
    runs = f"sj.{function} runs on the host and cannot be used under jax.jit, jax.vmap or jax.grad"
    for name, value in arguments.items():
        if not is_concrete(value):
            raise ValueError(
                f"{runs}, but {name} was traced. Call it outside the transformed function, with numbers and arrays whose "
                "values are known."
            )
    if not is_concrete(jnp.zeros(())):
        raise ValueError(
            f"{runs}, but it was called inside a function that JAX traces. Call it outside of that function."
        )


def fail(argument: str, rule: str, got: Any, remedy: str = "") -> ValueError:
    """The error to raise for a bad argument."""
    text = f"{argument} must {rule}, but it was {got}."
    return ValueError(f"{text} {remedy}" if remedy else text)


def warn(text: str) -> None:
    """Warn at the line of the caller's code, outside of this package and of run-time checks of its types, that led here."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in (__package__, "jaxtyping"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def positive_number(argument: str, value: Any, remedy: str = "") -> None:
    """Refuse anything but positive finite real numbers; traced values pass."""
    if not is_concrete(value):
        return
    try:
        if np.asarray(value).dtype.kind in "bcSU":  # truth values, complex numbers and words
            raise TypeError
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise fail(argument, "be a positive number", repr(value), remedy) from None
    if not (np.all(np.isfinite(array)) and np.all(array > 0)):
        raise fail(argument, "be positive and finite", value, remedy)


def tolerance(argument: str, value: Any) -> None:
    """Refuse anything but numbers between zero and one, neither of which is a tolerance; traced values pass."""
    positive_number(argument, value)
    if is_concrete(value) and np.any(np.asarray(value) >= 1):
        raise fail(argument, "be below one", value)


def whole_number(argument: str, value: Any, least: int = 1) -> None:
    """Refuse anything but whole numbers of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise fail(argument, f"be a whole number of at least {least}", repr(value))


def float_type(argument: str, dtype: Any) -> None:
    """Refuse anything but single and double precision."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("float32", "float64"):
        half = "Half precision cannot follow a plateau. " if name in ("float16", "bfloat16") else ""
        remedy = f"{half}Use float32 or float64; arrays are converted by .astype('float32')."
        raise fail(argument, "be in single or double precision", name, remedy)


def at_most_samples(samples: Any, available: int, of: str) -> None:
    """Refuse a number of samples, where one is given, beyond those there are."""
    if samples is not None:
        whole_number("samples", samples)
        if samples > available:
            raise fail("samples", f"be at most {available}, the size of {of}", samples)


def layer_sizes(argument: str, sizes: Any) -> tuple[int, ...]:
    """The sizes of the layers as a tuple, at least input and output, each at least one."""
    if isinstance(sizes, str | int) or not isinstance(sizes, Sequence | np.ndarray):
        raise fail(argument, "be a list of layer sizes such as [64, 100, 10]", repr(sizes))
    if len(sizes) < 2:
        raise fail(
            argument,
            "hold at least two sizes, input and output",
            list(sizes),
            "A network with one weight matrix is [in_size, out_size].",
        )
    for position, size in enumerate(sizes):
        whole_number(f"{argument}[{position}]", size)
    return tuple(int(size) for size in sizes)


def layer_indices(layers: Sequence[int] | np.ndarray | int | None, depth: int) -> tuple[int, ...]:
    """Indices of layers, counted from 0 (negative from the end), in the order given; None means all."""
    if layers is None:
        return tuple(range(depth))
    chosen: tuple[Any, ...] = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not -depth <= layer < depth:
            raise fail(
                "layers",
                f"hold indices between 0 and {depth - 1} (the network has {depth} layers)",
                repr(layers),
            )
    indices = tuple(int(layer) % depth for layer in chosen)
    if len(set(indices)) != len(indices):
        raise fail("layers", "name each layer once", list(chosen))
    return indices


def finite(argument: str, array: Any, remedy: str = "") -> None:
    """Refuse NaN and infinity; traced values pass."""
    if is_concrete(array) and not np.all(np.isfinite(np.asarray(array))):
        bad = int(np.sum(~np.isfinite(np.asarray(array))))
        raise fail(argument, "be finite", f"an array with {bad} NaN or infinite entries", remedy)
