"""Stationarity on kinks: the residual against the Clarke subdifferential, and the active-set ascent that reaches it."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import lsq_linear

from .merge import merge, pad
from .pieces import Cell, Kinks, Line, Matrices, Problem, flat, run, shaped, true_energy, unit

_ON_KINK = 1e-10  # |z| over ‖w‖ ‖h‖ below which a sample lies on a kink
_MOST_UNKNOWNS = 2000
_TURNS = 150


@dataclass(frozen=True)
class Stationarity:
    """How far a direction is from `s ρ ∈ −∂𝓛_0(ρ)`.

    - `plain`: `‖−∇𝓛_0(ρ) − s ρ‖ / s` with the slopes that automatic differentiation takes at a kink.
    - `clarke`: the least over slopes between the one-sided ones at the kinks.
    - `slopes`: those slopes; `kinks`: the places they belong to.
    """

    plain: float
    clarke: float
    kinks: Kinks
    slopes: np.ndarray


def near_kinks(weights: Matrices, problem: Problem, distance: float) -> Kinks:
    """The kinks within a distance `|z| ≤ distance · ‖w‖ ‖h‖`, but for those of neurons that see or do nothing."""
    h, rows = problem.x, []
    scale = np.linalg.norm(problem.x, axis=1)
    for layer, w in enumerate(weights[:-1]):
        z = h @ w.T
        sizes = np.linalg.norm(h, axis=1)
        lengths = np.linalg.norm(w, axis=1)
        active = (lengths > 1e-9) & (np.linalg.norm(weights[layer + 1], axis=0) > 1e-9)
        close = (np.abs(z) <= distance * sizes[:, None] * lengths) & active & (sizes > 1e-9 * scale)[:, None]
        samples, neurons = np.nonzero(close)
        rows.append(np.stack([np.full_like(samples, layer), samples, neurons], axis=1))
        h = problem.slopes(z) * z
        h[samples, neurons] = 0
    return Kinks(np.concatenate(rows) if rows else None)


def stationarity(weights: Matrices, problem: Problem) -> Stationarity:
    """Plain and Clarke residual of unit-norm layers."""
    kinks = near_kinks(weights, problem, _ON_KINK)
    low, high = sorted((problem.minus, problem.plus))
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
    best, trial = values, np.full(len(kinks), (low + high) / 2)
    for _ in range(5):  # the gradient is linear in the slopes of one layer, bilinear in those of two
        cell, miss = off(trial)
        effect = (cell.kink_values()[1][:, None] * cell.kink_jacobian() / abs(cell.energy)).T
        trial = lsq_linear(effect, effect @ trial - miss, bounds=(low, high), tol=1e-14).x
        error = float(np.linalg.norm(off(trial)[1]))
        if error >= clarke:
            break
        clarke, best = error, trial
    return Stationarity(plain, clarke, kinks, best)


def polish(weights: Matrices, problem: Problem) -> tuple[Matrices, Stationarity]:
    """The Clarke-stationary direction next to a nearly stationary one, of the same shapes.

    Neurons that do the same are merged, then an active-set method ascends: Newton's method on the kinks held, breaking
    at the kinks that lie in the way, dropping those whose slope leaves the range between the one-sided ones or where
    the speed rises to a side. What does not end with a smaller residual at no smaller speed is not taken.
    """
    weights = unit(weights)
    best, found = weights, stationarity(weights, problem)
    floor = true_energy(weights, problem) * (1 - 1e-9)
    for angle, distance in product((0.3, 0.1, 0.03, 0.01), (1e-6, 1e-2, 1e-3)):
        small = merge(weights, angle)
        if sum(w.size for w in small) > _MOST_UNKNOWNS:
            break
        small = ascend(small, problem, distance)
        reached = stationarity(small, problem)
        if reached.clarke < found.clarke and true_energy(small, problem) >= floor:
            best, found = pad(small, [w.shape for w in weights]), reached
        if found.clarke < 1e-9:
            break
    return best, found


def ascend(weights: Matrices, problem: Problem, distance: float) -> Matrices:
    """Active-set ascent over the activation cells from a network of few neurons; kinks within `distance` start held."""
    weights = unit(weights)
    kinks = near_kinks(weights, problem, distance)
    _, cell_slopes = run(weights, problem, kinks)
    values = np.full(len(kinks), (problem.minus + problem.plus) / 2)
    for _ in range(_TURNS):
        cell = Cell(weights, problem, kinks.put(cell_slopes, values), kinks)
        if not cell.energy > 0:
            break
        step, change = newton_step(cell)
        length = np.linalg.norm(step)
        step *= min(1, 0.5 / length) if length > 0 else 1
        weights, crossed, blocked = advance(weights, step, problem, kinks, cell_slopes)
        values = values + change
        if blocked is not None:
            kinks = Kinks(np.vstack([kinks.rows, blocked]))
            values = np.append(values, (problem.minus + problem.plus) / 2)
        if crossed:
            _, cell_slopes = run(weights, problem, kinks)
        elif blocked is None and length < 1e-7:
            drop, side = worst_kink(weights, problem, kinks, cell_slopes, values)
            if drop is None:
                if length < 1e-13:
                    break
                continue
            layer, sample, neuron = kinks.rows[drop]
            cell_slopes[layer][sample, neuron] = side
            kinks = Kinks(np.delete(kinks.rows, drop, axis=0))
            values = np.delete(values, drop)
    return weights


def newton_step(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """One Newton step for `∂E/∂θ = μ_l W_l`, `‖W_l‖ = 1`, `z = 0` at the kinks, in the weights and the slopes there.

    Along the constraints the Hessian's eigenvalues are taken with a negative sign, so that the step ascends and passes
    saddles; next to a maximum it is Newton's.
    """
    weights, theta = cell.weights, flat(cell.weights)
    depth = len(weights)
    normals = np.zeros((depth, theta.size))
    starts = np.cumsum([0] + [w.size for w in weights])
    for layer in range(depth):
        normals[layer, starts[layer] : starts[layer + 1]] = theta[starts[layer] : starts[layer + 1]]
    z, signal = cell.kink_values()
    jacobian = cell.kink_jacobian()
    constraints = np.vstack([normals, jacobian])
    left, sizes, right = np.linalg.svd(constraints)
    rank = int(np.sum(sizes > 1e-10 * sizes[0]))
    missing = np.concatenate([0.5 * (1 - np.sum(normals**2, axis=1)), -z])
    back = right[:rank].T @ ((left[:, :rank].T @ missing) / sizes[:rank])
    hessian = cell.hessian() - cell.energy * np.eye(theta.size)
    slope = cell.gradient - cell.energy * theta + hessian @ back
    along = right[rank:].T
    curvatures, axes = np.linalg.eigh(along.T @ hessian @ along)
    curvatures = np.maximum(np.abs(curvatures), 1e-6 * cell.energy)
    step = back + along @ (axes @ ((axes.T @ (along.T @ slope)) / curvatures))
    multipliers = np.vstack([-normals, signal[:, None] * jacobian]).T
    rest = cell.gradient - cell.energy * theta + hessian @ step
    return step, np.linalg.lstsq(multipliers, -rest, rcond=1e-12)[0][depth:]


def advance(
    weights: Matrices, step: np.ndarray, problem: Problem, kinks: Kinks, slopes: list[np.ndarray]
) -> tuple[Matrices, bool, np.ndarray | None]:
    """The best point of a step: its end, a shorter one, or a kink on the way.

    Returns the weights there, whether kinks were crossed, and the kink to hold from now on if the step ends on one.
    """
    line = Line(weights, shaped(step, weights), problem)
    before, _ = run(weights, problem, kinks)
    after, _ = run(line.at(1.0), problem, kinks)
    met = []
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        away = np.where(slopes[layer] == problem.plus, -1.0, 1.0) * new > 1e-14
        _, samples, neurons = kinks.at(layer)
        away[samples, neurons] = False
        for sample, neuron in np.argwhere(away):
            start, stop = old[sample, neuron], new[sample, neuron]
            share = start / (start - stop) if start * stop < 0 else 0.0
            met.append((share, layer, sample, neuron))
    if not met:
        share, start = 1.0, line.energy(0.0)
        while share > 1e-3 and line.energy(share) < start * (1 - 1e-12):
            share /= 2
        return unit(line.at(share)), False, None
    met.sort()
    chosen = sorted({int(i) for i in np.linspace(0, len(met) - 1, min(len(met), 24))})
    candidates = [(line.energy(met[i][0]), i) for i in chosen]
    candidates.append((line.energy(1.0), len(met)))
    _, best = max(candidates)
    if best == len(met):
        return unit(line.at(1.0)), True, None
    return unit(line.at(met[best][0])), best > 0, np.asarray(met[best][1:])


def worst_kink(
    weights: Matrices, problem: Problem, kinks: Kinks, slopes: list[np.ndarray], values: np.ndarray
) -> tuple[int | None, float]:
    """The kink whose release raises the speed fastest, and the slope of the side to leave to; None if there is none."""
    if len(kinks) == 0:
        return None, 0.0
    _, signal = Cell(weights, problem, kinks.put(slopes, values), kinks).kink_values()
    upward = signal * (problem.plus - values)  # rate of the energy when z leaves its kink upwards
    downward = signal * (values - problem.minus)
    gain = np.maximum(upward, downward)
    worst = int(np.argmax(gain))
    if gain[worst] <= 1e-12 * np.max(np.abs(signal)):
        return None, 0.0
    return worst, problem.plus if upward[worst] >= downward[worst] else problem.minus
