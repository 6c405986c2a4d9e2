"""Values and slopes of elementwise functions at chosen points, also while JAX is tracing."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .. import _check
from .._numerics import is_array

Function = Callable[[Array], Array]
Result = TypeVar("Result")

_SHAPE = (64, 64)
_REMEDY = "Write it with jax.numpy, acting entry by entry, and not depending on values that are being traced."
_TRACED_REMEDY = (
    "Numbers that JAX traces belong in an array of an Equinox module with a method __call__, and what is decided from "
    "their values must be asked for outside of jit, vmap and grad."
)


class _TracedActivation(ValueError):
    """Raised for an activation whose values cannot be known now, since they depend on what JAX is tracing."""


def remembered(find: Callable[[Function], Result]) -> Callable[[Function], Result]:
    """Keep what was found about a function, unless it cannot be hashed; an Equinox module with arrays is such."""
    keep = functools.lru_cache(maxsize=256)(find)

    @functools.wraps(find)
    def found(function: Function) -> Result:
        return keep(function) if is_hashable(function) else find(function)

    return found


def with_known_numbers(function: Function) -> Function:
    """A function whose traced arrays are replaced by fixed numbers between 0.5 and 0.9; itself where there are none.

    Its kinks, and whether it acts entry by entry, are those of the function for all but special values of its arrays.
    """
    if _check.is_concrete(function):
        return function

    def known(leaf: Any) -> Any:
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.ones(leaf.shape, leaf.dtype)
        return np.linspace(0.57, 0.83, leaf.size, dtype=leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(known, function)


def evaluate(function: Function, z: np.ndarray, order: int = 0) -> np.ndarray:
    """A function and its derivatives by nested forward-mode differentiation, in double precision.

    Works whatever the global precision is, and while something else is being traced. Derivatives are compiled, once for
    all functions that differ in the values of their arrays only.

    **Returns:** shape `(order + 1, *z.shape)`, in the type the function returns for double-precision input.

    **Raises:** `ValueError` where the function is no elementwise real JAX function of its argument alone.
    """
    if not _check.is_concrete(function):
        raise _traced("a function that holds traced arrays")
    if order == 0:
        compute: Callable[..., list[Array]] = _rows
    elif is_hashable(eqx.partition(function, is_array)[1]):
        compute = _compiled_rows
    else:
        compute = lambda _, points, order: jax.jit(lambda z: _rows(function, z, order))(points)  # noqa: E731
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        points = jnp.asarray(z, dtype=jnp.float64)
        try:
            rows = compute(function, points, order)
        except (TypeError, ValueError, NotImplementedError) as error:
            found = f"a function that raised {type(error).__name__}: {str(error).splitlines()[0]}"
            raise _check.fail("activation", "be an elementwise JAX function", found, _REMEDY) from error
        if not _check.is_concrete(rows):
            raise _traced("a function of values that are being traced")
        arrays = [np.asarray(row) for row in rows]
    for array in arrays:
        if array.shape != z.shape or not jnp.issubdtype(array.dtype, jnp.floating):
            found = f"a function that takes shape {z.shape} to shape {array.shape} of type {array.dtype}"
            raise _check.fail("activation", "be an elementwise real JAX function", found, _REMEDY)
    return np.stack(arrays)


def values_and_slopes(function: Function, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`σ(z)` and `σ'(z)` at up to 4,096 points, by a program of one shape, which is compiled once for each function."""
    points = np.zeros(_SHAPE)
    points.flat[: z.size] = z.ravel()
    values, slopes = evaluate(function, points, 1).reshape(2, -1)[:, : z.size]
    return values.reshape(z.shape), slopes.reshape(z.shape)


def check_elementwise(function: Function) -> None:
    """Refuse a function that does not act entry by entry, such as softmax, or that is not real or differentiable.

    Passes a function that depends on values being traced, other than by arrays that it holds: nothing is known of it.
    """
    try:
        _check_known(with_known_numbers(function))
    except _TracedActivation:
        return


@remembered
def _check_known(function: Function) -> None:
    points = np.linspace(-3.1, 2.9, 64 * 64).reshape(_SHAPE)
    kept = np.indices(_SHAPE).sum(axis=0) % 2 == 0
    # Half of the entries move on by one place, between others that change.
    moved = np.where(kept, np.roll(points, 1), 1.1 * points[::-1])
    (values, _), (others, _) = values_and_slopes(function, points), values_and_slopes(function, moved)
    if not np.allclose(others[kept], np.roll(values, 1)[kept], rtol=1e-4, equal_nan=True):
        found = "a function whose value at one entry depends on the others, or on its place"
        raise _check.fail("activation", "be an elementwise JAX function", found, _REMEDY)


def _rows(function: Function, points: Array, order: int) -> list[Array]:
    derivatives = [function]
    for _ in range(order):
        derivatives.append(_derivative(derivatives[-1]))
    return [jnp.asarray(derivative(points)) for derivative in derivatives]


_compiled_rows = eqx.filter_jit(_rows)


def _derivative(function: Function) -> Function:
    return lambda z: jax.jvp(function, (z,), (jnp.ones_like(z),))[1]


def is_hashable(value: Any) -> bool:
    """Whether a value can be a key."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _traced(found: str) -> ValueError:
    return _TracedActivation(str(_check.fail("activation", "have values that are known here", found, _TRACED_REMEDY)))
