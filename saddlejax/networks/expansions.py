"""One-sided expansions of an activation at zero, found numerically, with their errors."""

import functools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev

from .activations import Activation
from .elementwise import evaluate

ORDERS = 6
"""Expansions are computed up to this power of `z`."""

TOLERANCE = 64.0
"""Units of rounding within which two numbers count as equal."""

_DEGREE = 10
_REACHES = tuple(2.0**-k for k in range(1, 14, 2))
_NEAR = (2.0**-60, 2.0**-70)
_FACTORIALS = np.cumprod([1.0, *range(1, ORDERS + 1)])


class OneSidedExpansion(eqx.Module):
    """`σ(z) = Σ_k c_k z^k` on one side of zero.

    - `coefficients`: `c_0 … c_6`, in powers of `z` itself on both sides (so `|z|` has `c_1 = −1` on the left); exactly
      zero where no larger than their error; `None` where no polynomial fits the function, however close to zero.
    - `errors`: how far each of them may be off; empty where there are none.
    - `misfit`: the distance from the best polynomial of degree 10, in units of the rounding that is tolerated: above
      one there is no expansion.
    """

    coefficients: tuple[float, ...] | None = eqx.field(static=True)
    errors: tuple[float, ...] = eqx.field(static=True)
    misfit: float = eqx.field(static=True)


def expand(function: Activation) -> tuple[OneSidedExpansion, OneSidedExpansion, float]:
    """The expansions at zero from the left and from the right, and the unit of rounding of the function.

    Two independent estimates. A polynomial in Chebyshev form is fitted to values between 0 and `±h`, for the largest
    `h` from 1/2 to 1/8192 on which it comes within rounding; that decides whether there is an expansion. Nested
    derivatives at two points next to zero are sharper where they agree with each other and with the fit. The estimate
    with the smaller error is kept, coefficient by coefficient.
    """
    nodes, _, _ = _fit_operator()
    points = np.array([-1.0, 1.0])[:, None, None] * np.array(_REACHES)[:, None] * nodes
    values = evaluate(function, points)[0]
    eps = rounding(values)
    derivatives = _derivatives(function)
    left, right = (
        _expand_side(side_values, side, derivative, eps)
        for side_values, side, derivative in zip(values.astype(np.float64), (-1, 1), derivatives, strict=True)
    )
    return left, right, eps


def rounding(values: np.ndarray) -> float:
    """The unit of rounding of computed values: single precision's where all of them are such numbers."""
    if values.dtype == np.float64 and not np.array_equal(values, values.astype(np.float32), equal_nan=True):
        return float(np.finfo(np.float64).eps)
    return float(jnp.finfo(values.dtype if values.dtype != np.float64 else np.float32).eps)


def _expand_side(values: np.ndarray, side: int, derivatives: np.ndarray, eps: float) -> OneSidedExpansion:
    misfit = np.inf
    for reach, row in zip(_REACHES, values, strict=True):
        closeness, fitted, errors = _fit(row, side * reach, eps)
        misfit = min(misfit, closeness)
        if misfit <= 1:
            break
    if misfit > 1:
        return OneSidedExpansion(None, (), float(misfit))
    with np.errstate(invalid="ignore", over="ignore"):
        coefficients = derivatives / _FACTORIALS[:, None]
        exact = coefficients[:, 1]
        spread = np.abs(coefficients[:, 0] - exact) + eps * np.max(np.abs(coefficients), axis=0)[1]
        agree = np.abs(exact - fitted) <= 10 * errors + spread
    # Differentiating a quotient such as sin(z)/z next to zero fails at some order, and at all above it.
    sharper = np.logical_and.accumulate(agree & np.isfinite(spread)) & (spread <= errors)
    best, error = np.where(sharper, exact, fitted), np.where(sharper, spread, errors)
    best = np.where(np.abs(best) <= error, 0.0, best)
    return OneSidedExpansion(tuple(map(float, best)), tuple(map(float, error)), float(misfit))


def _derivatives(function: Activation) -> np.ndarray:
    """Derivatives up to the highest order next to zero, shape `(sides, orders, 2)`; NaN where JAX finds none."""
    points = np.array([-1.0, 1.0])[:, None] * np.array(_NEAR)
    try:
        rows = evaluate(function, points, ORDERS).astype(np.float64)
    except ValueError:
        return np.full((2, ORDERS + 1, 2), np.nan)
    return np.moveaxis(rows, 0, 1)


@functools.cache
def _fit_operator() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes in (0, 1), the map from values there to the fitted polynomial's, and that to its `c_0 … c_6`."""
    nodes = (1 - np.cos(np.pi * (np.arange(48) + 0.5) / 48)) / 2
    basis = chebyshev.chebvander(2 * nodes - 1, _DEGREE)
    inverse = np.linalg.pinv(basis)
    identity = np.eye(_DEGREE + 1)
    rows = [chebyshev.chebval(-1.0, chebyshev.chebder(identity, k)) * 2.0**k for k in range(ORDERS + 1)]
    return nodes, basis @ inverse, np.stack(rows) / _FACTORIALS[:, None] @ inverse


def _fit(values: np.ndarray, reach: float, eps: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Misfit in units of tolerated rounding, coefficients and their errors, of values at the nodes up to `reach`."""
    _, smooth, read_off = _fit_operator()
    size = np.max(np.abs(values))
    if not np.isfinite(size):
        return np.inf, np.full(ORDERS + 1, np.nan), np.full(ORDERS + 1, np.inf)
    residual = np.max(np.abs(smooth @ values - values))
    powers = reach ** np.arange(ORDERS + 1.0)
    errors = max(residual, eps * size) * np.sum(np.abs(read_off), axis=1) / np.abs(powers)
    misfit = residual / (TOLERANCE * eps * size) if size > 0 else 0.0
    return misfit, read_off @ values / powers, errors
