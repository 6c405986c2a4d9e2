"""From climbs to certified directions: the host's part of the search, in NumPy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._stopping import check_stopped
from .merge import merge, pad
from .origin import Tangent
from .pieces import Matrices, Problem, true_energy, unit
from .polish import polish
from .rank_one import chain_tangent, embed

RANDOM, RANK_ONE, THREE_LAYERS = 0, 1, 2


@dataclass(frozen=True)
class Search:
    """What the host needs to know that is not an array: the sizes of the layers and the activation's slopes."""

    sizes: tuple[int, ...]
    slopes: Tangent

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.sizes) - 1


def settle(search: Search, x, r, narrow, shallow, full) -> dict[str, Any]:
    """Polish every climb and pick the best.

    **Arguments:** inputs and pulls; then three climbs with a leading axis of starts: of the rank-one problem, of the
    network of three layers (or None), of the network itself.

    **Returns:** arrays of fixed shapes: see [`saddlejax.saddle.EscapeDirection`][].
    """
    x, r = np.asarray(x, float), np.asarray(r, float)
    problem = Problem(x, r, *search.slopes)
    chain, sign = chain_tangent(search.slopes, search.depth)
    rank_one = [polish(Problem(x, r, *chain), *start) for start in lanes(narrow)]
    rank_one.sort(key=lambda one: -one.speed)
    found = [(polish(problem, *start), RANDOM) for start in lanes(full)]
    embedded = embed(rank_one[0].weights, search.sizes, sign)
    found.append((polish(problem, embedded, rank_one[0].speed, np.inf, rank_one[0].evaluations), RANK_ONE))
    if shallow is not None:
        below = max((polish(problem, *start) for start in lanes(shallow)), key=lambda one: one.speed)
        lifted = lift(below.weights, problem, search)
        found.append((polish(problem, lifted, true_energy(lifted, problem), np.inf, below.evaluations), THREE_LAYERS))
    found.sort(key=lambda one: -one[0].speed)
    best, _ = found[0]
    return {
        "weights": tuple(best.weights),
        "kinks": np.asarray(best.kinks),
        "speeds": np.asarray([one.speed for one, _ in found]),
        "residuals": np.asarray([one.clarke for one, _ in found]),
        "plain_residuals": np.asarray([one.plain for one, _ in found]),
        "gradient_evaluations": np.asarray([one.evaluations for one, _ in found]),
        "polish_evaluations": np.asarray([one.turns for one, _ in found]),
        "start_kinds": np.asarray([kind for _, kind in found]),
        "rank_one_speeds": np.asarray([one.speed for one in rank_one]),
    }


def lanes(climbs) -> Iterator[tuple[Matrices, float, float, int]]:
    """The starts of a climb one by one: weights, speed, residual and evaluations."""
    weights, speeds, residuals, evaluations = climbs
    for i in range(len(speeds)):
        check_stopped()
        yield [np.asarray(w[i], float) for w in weights], float(speeds[i]), float(residuals[i]), int(evaluations[i])


def lift(weights: Matrices, problem: Problem, search: Search) -> Matrices:
    """A network of three layers made deeper by numbers one before its last layer, at no smaller a speed.

    The speed is `Σ_j ‖W_2[j]‖ ‖W_3[:, j]‖ c_j`, with `c_j` the speed if the last hidden layer were neuron `j` alone; so
    the best of them alone is at least as fast. Its signal passes a 1 × 1 identity unchanged where the slope above
    zero is one: an optimal speed never falls with depth (Bantzis, Simon & Jacot, arXiv:2505.21722).
    """
    first, second, last = merge(weights, 1e-6)
    alone = [[first, second[j : j + 1], last[:, j : j + 1]] for j in range(len(second))]
    first, second, last = unit(max(alone, key=lambda one: true_energy(one, problem)))
    deep = [first, second, *([np.ones((1, 1))] * (search.depth - 3)), last]
    return pad(deep, list(zip(search.sizes[1:], search.sizes[:-1], strict=True)))
