"""From a nearly stationary direction to a stationary one."""

from dataclasses import dataclass
from itertools import product

import numpy as np

from .active_set import ascend
from .clarke import stationarity
from .merge import merge, pad
from .pieces import Matrices, Problem, true_energy, unit

_MOST_UNKNOWNS = 2500  # of the merged network, for dense linear algebra
_ANGLES = (0.3, 0.1, 0.03, 0.01)  # between neurons that are tried as one, in radians
_DISTANCES = (1e-6, 1e-2, 1e-3)  # from kinks that are tried as active
_MOST_TURNS = 400
_NO_SPEED = 1e-12  # relative to the largest conceivable speed


@dataclass(frozen=True)
class Settled:
    """A direction with its residuals; `kinks` counts the pairs of a sample and a neuron that lie on a kink."""

    weights: Matrices
    speed: float
    plain: float
    clarke: float
    kinks: int
    evaluations: int
    turns: int


def polish(problem: Problem, weights: Matrices, speed: float, residual: float, evaluations: int) -> Settled:
    """The stationary direction next to the end of an ascent, of the same shapes.

    Neurons whose incoming weights are nearly parallel are merged, up to a large angle first and then up to smaller ones,
    and the merged network ascends by an active-set method. The result is kept only if its residual is smaller and its
    speed no smaller. Where the speed is zero there is no direction, and the residuals are infinite.
    """
    weights = unit(weights)
    best = Settled(weights, speed, residual, residual, 0, evaluations, 0)
    largest = np.sum(np.linalg.norm(problem.r, axis=1) * np.linalg.norm(problem.x, axis=1))
    turns = 0
    for angle, distance in product(_ANGLES, _DISTANCES):
        small = merge(weights, angle)
        if sum(w.size for w in small) > _MOST_UNKNOWNS:
            break
        small, taken = ascend(small, problem, distance)
        turns += taken
        reached, there = true_energy(small, problem), stationarity(small, problem)
        if there.clarke < best.clarke and reached >= speed * (1 - 1e-9) and reached > _NO_SPEED * largest:
            full = pad(small, [w.shape for w in weights])
            best = Settled(full, reached, there.plain, there.clarke, len(there.kinks), evaluations, turns)
        if best.clarke < 1e-9 or turns > _MOST_TURNS or not max(reached, speed) > _NO_SPEED * largest:
            break
    if not best.speed > _NO_SPEED * largest:
        return Settled(weights, 0.0, np.inf, np.inf, 0, evaluations, turns)
    return Settled(best.weights, best.speed, best.plain, best.clarke, best.kinks, evaluations, turns)
