"""From the ends of the ascents to directions with residuals: the part of the search that runs on the host, in NumPy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._host.stopping import check_stopped
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
    """Polish the end of every ascent and pick the best.

    **Arguments:** `x`, the inputs; `r`, minus the gradients of the loss at zero output, each times the weight of its
    sample; then the ends of three ascents, with a leading axis of starts: `narrow`, of the problem in which all layers have
    rank one; `shallow`, of the network of three layers (or None); `full`, of the network itself.

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
        deep = deepen(below.weights, problem, search)
        found.append((polish(problem, deep, true_energy(deep, problem), np.inf, below.evaluations), THREE_LAYERS))
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
    """The ends of the ascents one by one: weights, speed, residual and evaluations."""
    weights, speeds, residuals, evaluations = climbs
    for i in range(len(speeds)):
        check_stopped()
        yield [np.asarray(w[i], float) for w in weights], float(speeds[i]), float(residuals[i]), int(evaluations[i])


def deepen(weights: Matrices, problem: Problem, search: Search) -> Matrices:
    """A network of three layers made deeper by inserting layers of one neuron and weight one, at no smaller a speed.

    The speed is `Σ_j ‖W_2[j]‖ ‖W_3[:, j]‖ c_j`, with `c_j` the speed if the last hidden layer consisted of neuron `j`
    alone. By Cauchy–Schwarz it is at most the largest `c_j`, so that only that neuron is kept. For ReLU its signal passes
    further layers of one neuron and weight one unchanged: an optimal speed never falls with depth (Bantzis, Simon &
    Jacot, arXiv:2505.21722).
    """
    first, second, last = merge(weights, 1e-6)
    alone = [[first, second[j : j + 1], last[:, j : j + 1]] for j in range(len(second))]
    first, second, last = unit(max(alone, key=lambda one: true_energy(one, problem)))
    deep = [first, second, *([np.ones((1, 1))] * (search.depth - 3)), last]
    return pad(deep, list(zip(search.sizes[1:], search.sizes[:-1], strict=True)))
