"""An active-set ascent of the speed that ends on kinks, for networks of few neurons."""

import numpy as np

from .clarke import near_kinks
from .pieces import Cell, Kinks, Line, Matrices, Problem, flat, run, shaped, unit

_MOST_ITERATIONS = 100


def ascend(weights: Matrices, problem: Problem, distance: float) -> tuple[Matrices, int]:
    """Active-set ascent of the speed; kinks within `distance` are in the active set at the start.

    Each iteration takes a Newton step with the active kinks held, that is, with `z = 0` there. A step that would cross
    other kinks ends where the speed is largest: at one of them, which becomes active, or at the end of the step. A kink
    leaves the active set where the speed rises to one side of it; there the slope that stationarity asks for is not between
    the one-sided slopes.

    **Returns:** the weights, and the number of iterations, each with one gradient and one Hessian.
    """
    weights = unit(weights)
    kinks = near_kinks(weights, problem, distance)
    _, cell_slopes = run(weights, problem, kinks)
    values = np.full(len(kinks), (problem.minus + problem.plus) / 2)
    for iteration in range(_MOST_ITERATIONS):  # noqa: B007
        cell = Cell(weights, problem, kinks.put(cell_slopes, values), kinks)
        if not cell.energy > 0:
            break
        step, change = newton_step(cell)
        length = np.linalg.norm(step)
        step *= min(1, 0.5 / length) if length > 0 else 1
        weights, crossed, blocked = advance(weights, step, problem, kinks, cell_slopes)
        low, high = cell.slope_ranges(problem)
        # A slope outside of the range says that the kink is to leave the active set; how far outside does not matter.
        values = np.clip(values + change, low - (high - low), high + (high - low))
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
    return weights, iteration + 1


def newton_step(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """One Newton step for `∂E/∂θ = μ_l W_l`, `‖W_l‖ = 1`, `z = 0` at the kinks, in the weights and the slopes there.

    In the directions that the constraints leave free, every eigenvalue of the Hessian is replaced by minus its absolute
    value, so that the step ascends and is not drawn to saddle points; next to a maximum it is Newton's step.
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
    cell = Cell(weights, problem, kinks.put(slopes, values), kinks)
    _, signal = cell.kink_values()
    low, high = cell.slope_ranges(problem)
    above, below = (high, low) if problem.plus >= problem.minus else (low, high)
    upward = signal * (above - values)  # rate of the energy when z leaves its kink upwards
    downward = signal * (values - below)
    gain = np.maximum(upward, downward)
    worst = int(np.argmax(gain))
    if gain[worst] <= 1e-12 * np.max(np.abs(signal)):
        return None, 0.0
    return worst, problem.plus if upward[worst] >= downward[worst] else problem.minus
