"""Telling local optima apart."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

_STATIONARY = 1e-6
_SAME = 1e-7


class Optimum(NamedTuple):
    """A local optimum: its speed, and the number of starts of any kind that ended there."""

    speed: float
    starts: int


def distinct(speeds: Float[Array, " starts"], residuals: Float[Array, " starts"]) -> tuple[Optimum, ...]:
    """The distinct speeds, best first, of the starts that became stationary; equal within a relative `1e-7`.

    Starts with a residual above `1e-6` are left out. Two optima of exactly the same speed count as one.
    """
    optima: list[Optimum] = []
    stationary = np.asarray(residuals) <= _STATIONARY
    for speed in sorted(np.asarray(speeds, float)[stationary], reverse=True):
        if optima and optima[-1].speed - speed <= _SAME * optima[-1].speed:
            optima[-1] = optima[-1]._replace(starts=optima[-1].starts + 1)
        else:
            optima.append(Optimum(float(speed), 1))
    return tuple(optima)
