"""Stationarity on kinks: the residual against the Clarke subdifferential.

The speed is piecewise smooth, and its maxima tend to lie where some samples are exactly on the kink of a neuron. There
`∇𝓛_0` is no single vector; a direction is stationary if `s ρ ∈ −∂𝓛_0(ρ)`, that is, if slopes between the one-sided ones
can be chosen at those kinks for which the residual vanishes (Clarke, *Optimization and Nonsmooth Analysis*, 1983).
"""

from dataclasses import dataclass

import numpy as np
import scipy

from .pieces import Cell, Kinks, Matrices, Problem, flat, run

_ON_KINK = 1e-10  # |z| over ‖w‖ ‖h‖ below which a sample lies on a kink


@dataclass(frozen=True)
class Stationarity:
    """How far a direction is from `s ρ ∈ −∂𝓛_0(ρ)`.

    - `plain`: `‖−∇𝓛_0(ρ) − s ρ‖ / s` with the slopes that automatic differentiation takes at a kink.
    - `clarke`: the least over slopes between the one-sided ones at the kinks.
    - `kinks`: the places of the kinks; `slopes`: the slopes chosen there.
    """

    plain: float
    clarke: float
    kinks: Kinks
    slopes: np.ndarray


def near_kinks(weights: Matrices, problem: Problem, distance: float) -> Kinks:
    """The kinks within a distance `|z| ≤ distance · ‖w‖ ‖h‖`.

    Left out are neurons whose incoming or outgoing weights are zero, and samples whose signal `h` is zero. At most as many
    kinks as there are weights are returned, the nearest ones: more cannot be held at once, and with many samples they
    would fill the memory.
    """
    h, rows, distances = problem.x, [], []
    scale = np.linalg.norm(problem.x, axis=1)
    for layer, w in enumerate(weights[:-1]):
        z = h @ w.T
        sizes = np.linalg.norm(h, axis=1)
        lengths = np.linalg.norm(w, axis=1)
        active = (lengths > 1e-9) & (np.linalg.norm(weights[layer + 1], axis=0) > 1e-9)
        close = (np.abs(z) <= distance * sizes[:, None] * lengths) & active & (sizes > 1e-9 * scale)[:, None]
        samples, neurons = np.nonzero(close)
        rows.append(np.stack([np.full_like(samples, layer), samples, neurons], axis=1))
        distances.append(np.abs(z[samples, neurons]) / (sizes[samples] * lengths[neurons]))
        h = problem.slopes(z) * z
        h[samples, neurons] = 0
    if not rows:
        return Kinks()
    nearest = np.argsort(np.concatenate(distances), kind="stable")[: sum(w.size for w in weights)]
    return Kinks(np.concatenate(rows)[np.sort(nearest)])


def stationarity(weights: Matrices, problem: Problem) -> Stationarity:
    """Plain and Clarke residual of unit-norm layers."""
    kinks = near_kinks(weights, problem, _ON_KINK)
    _, slopes = run(weights, problem, kinks)
    theta = flat(weights)

    def off(values: np.ndarray) -> tuple[Cell, np.ndarray]:
        cell = Cell(weights, problem, kinks.put(slopes, values), kinks)
        return cell, (cell.gradient - cell.energy * theta) / abs(cell.energy)

    values = np.full(len(kinks), problem.minus)
    if not Cell(weights, problem, slopes, kinks).energy > 0:
        return Stationarity(np.inf, np.inf, kinks, values)
    cell, miss = off(values)
    plain = clarke = float(np.linalg.norm(miss))
    if len(kinks) == 0:
        return Stationarity(plain, clarke, kinks, values)
    low, high = cell.slope_ranges(problem)
    best, trial = values, (low + high) / 2
    for _ in range(5):  # the gradient is linear in the slopes of one layer, bilinear in those of two
        cell, miss = off(trial)
        effect = (cell.kink_values()[1][:, None] * cell.kink_jacobian() / abs(cell.energy)).T
        trial = scipy.optimize.lsq_linear(effect, effect @ trial - miss, bounds=(low, high), tol=1e-14).x
        error = float(np.linalg.norm(off(trial)[1]))
        if error >= clarke:
            break
        clarke, best = error, trial
    return Stationarity(plain, clarke, kinks, best)
