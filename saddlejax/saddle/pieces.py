"""A piecewise linear network inside one activation cell: energy, gradient, Hessian, kinks. Plain NumPy, few neurons.

Inside a cell each hidden signal is a slope times a pre-activation, `h_l = a_l ⊙ z_l` with `a_l` fixed for each sample
and neuron, so `E(θ) = Σ_i ⟨r_i, W_L a_{L−1} ⊙ (… a_1 ⊙ (W_1 x_i))⟩` is linear in every layer. A *kink* is a sample and
neuron with `z = 0`, whose slope may be anything between the two one-sided ones.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Matrices = list[np.ndarray]
Slopes = list[np.ndarray]
_BLOCK = 2**22  # numbers in one block of the Hessian's samples


@dataclass(frozen=True)
class Problem:
    """Inputs `x`, pulls `r = −p ∇c(0, y)` and the slopes of the activation below and above zero."""

    x: np.ndarray
    r: np.ndarray
    minus: float
    plus: float

    def slopes(self, z: np.ndarray) -> np.ndarray:
        """The slope on the side of each `z`; the larger one at zero."""
        return np.where(z > 0, self.plus, np.where(z < 0, self.minus, self.larger))

    @property
    def larger(self) -> float:
        """The slope of larger size."""
        return self.plus if abs(self.plus) >= abs(self.minus) else self.minus


class Kinks:
    """Places `(layer, sample, neuron)` held on their kink, one row each; hidden layers are counted from 0."""

    def __init__(self, rows: np.ndarray | None = None):
        self.rows = np.zeros((0, 3), int) if rows is None else np.asarray(rows, int).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions in the list, samples and neurons of one layer's kinks."""
        positions = np.flatnonzero(self.rows[:, 0] == layer)
        return positions, self.rows[positions, 1], self.rows[positions, 2]

    def gather(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The entries of one `(samples, neurons)` array a layer at the kinks."""
        values = np.zeros(len(self))
        for layer, array in enumerate(arrays):
            positions, samples, neurons = self.at(layer)
            values[positions] = array[samples, neurons]
        return values

    def put(self, arrays: list[np.ndarray], values: np.ndarray) -> list[np.ndarray]:
        """Copies of the arrays with the entries at the kinks replaced."""
        arrays = [array.copy() for array in arrays]
        for layer, array in enumerate(arrays):
            positions, samples, neurons = self.at(layer)
            array[samples, neurons] = values[positions]
        return arrays


def run(weights: Matrices, problem: Problem, kinks: Kinks) -> tuple[list[np.ndarray], Slopes]:
    """Pre-activations of the hidden layers and the slopes of their cell; signals on a kink count as zero."""
    h, zs, slopes = problem.x, [], []
    for layer, w in enumerate(weights[:-1]):
        zs.append(h @ w.T)
        slopes.append(problem.slopes(zs[-1]))
        h = slopes[-1] * zs[-1]
        _, samples, neurons = kinks.at(layer)
        h[samples, neurons] = 0
    return zs, slopes


class Line:
    """The weights `W + t D` and the energy along them, with one product with the inputs for each end."""

    def __init__(self, weights: Matrices, step: Matrices, problem: Problem):
        self.weights, self.step, self.problem = weights, step, problem
        self.first, self.change = problem.x @ weights[0].T, problem.x @ step[0].T

    def at(self, share: float) -> Matrices:
        """`W + t D`."""
        return [w + share * d for w, d in zip(self.weights, self.step, strict=True)]

    def energy(self, share: float) -> float:
        """`−𝓛_0` there, of the layers divided by their norms."""
        weights = self.at(share)
        z = self.first + share * self.change
        for w in weights[1:]:
            z = (self.problem.slopes(z) * z) @ w.T
        return float(np.sum(self.problem.r * z) / np.prod([np.linalg.norm(w) for w in weights]))


def true_energy(weights: Matrices, problem: Problem) -> float:
    """`−𝓛_0` of the layers divided by their norms."""
    return Line(weights, [np.zeros_like(w) for w in weights], problem).energy(0.0)


class Cell:
    """The network with given slopes: what it and its derivatives are made of."""

    def __init__(self, weights: Matrices, problem: Problem, slopes: Slopes, kinks: Kinks):
        self.weights, self.slopes, self.kinks = weights, slopes, kinks
        h, self.z, self.h = problem.x, [], [problem.x]
        for layer, w in enumerate(weights[:-1]):
            self.z.append(h @ w.T)
            h = slopes[layer] * self.z[-1]
            _, samples, neurons = kinks.at(layer)
            h[samples, neurons] = 0
            self.h.append(h)
        # delta[l] is ∂E/∂z_{l+1}; signal[l] = ∂E/∂h_{l+1}, before the slope.
        self.delta: Matrices = [problem.r]
        self.signal: Matrices = []
        for layer in range(len(weights) - 2, -1, -1):
            self.signal.insert(0, self.delta[0] @ weights[layer + 1])
            self.delta.insert(0, slopes[layer] * self.signal[0])

    @cached_property
    def gradient(self) -> np.ndarray:
        """`∂E/∂θ`, all layers in one vector."""
        return flat([d.T @ h for d, h in zip(self.delta, self.h, strict=True)])

    @cached_property
    def energy(self) -> float:
        """`E(θ)`."""
        return float(np.sum(self.delta[-1] * (self.h[-1] @ self.weights[-1].T)))

    def kink_values(self) -> tuple[np.ndarray, np.ndarray]:
        """`z` at the kinks, and the signal arriving there from above."""
        return self.kinks.gather(self.z), self.kinks.gather(self.signal)

    def slope_ranges(self, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest slope at every kink.

        Where the whole signal of a sample vanishes on its kink, the neurons above are on theirs too. Their slopes, held
        at the larger one, then count through their product with that of the kink, whose range is that much wider.
        """
        low, high = sorted((problem.minus, problem.plus))
        factor = min(problem.minus / problem.larger, problem.plus / problem.larger)
        lows, highs = np.full(len(self.kinks), low), np.full(len(self.kinks), high)
        for layer, h in enumerate(self.h[1:]):
            positions, samples, _ = self.kinks.at(layer)
            gone = positions[~np.any(h[samples], axis=1)]
            for _ in range(len(self.z) - 1 - layer):
                ends = np.stack([lows[gone], highs[gone], factor * lows[gone], factor * highs[gone]])
                lows[gone], highs[gone] = ends.min(axis=0), ends.max(axis=0)
        return lows, highs

    def kink_jacobian(self) -> np.ndarray:
        """`∂z/∂θ` at the kinks, one row each."""
        rows = np.zeros((len(self.kinks), sum(w.size for w in self.weights)))
        starts = np.cumsum([0] + [w.size for w in self.weights])
        for layer in range(len(self.z)):
            positions, samples, neurons = self.kinks.at(layer)
            if len(positions) == 0:
                continue
            back = np.zeros((len(positions), self.weights[layer].shape[0]))
            back[np.arange(len(positions)), neurons] = 1
            for below in range(layer, -1, -1):
                block = back[:, :, None] * self.h[below][samples][:, None, :]
                rows[positions, starts[below] : starts[below + 1]] = block.reshape(len(positions), -1)
                if below > 0:
                    back = self.slopes[below - 1][samples] * (back @ self.weights[below])
        return rows

    def hessian(self) -> np.ndarray:
        """`∂²E/∂θ²` with the slopes held."""
        starts = np.cumsum([0] + [w.size for w in self.weights])
        out = np.zeros((starts[-1], starts[-1]))
        widest = max(w.size for w in self.weights[1:]) * max(w.shape[0] for w in self.weights)
        size = max(1, _BLOCK // widest)
        for first in range(0, len(self.h[0]), size):
            part = slice(first, first + size)
            for low in range(len(self.weights) - 1):
                path = np.eye(self.weights[low].shape[0]) * self.slopes[low][part][:, :, None]
                for high in range(low + 1, len(self.weights)):
                    # ∂²E / ∂W_low[a, b] ∂W_high[c, d] = Σ_i δ_high[c] (∂h_{high−1}[d] / ∂z_low[a]) h_{low−1}[b]
                    spread = self.delta[high][part][:, :, None, None] * path[:, None]
                    block = np.tensordot(spread, self.h[low][part], axes=(0, 0))
                    block = np.moveaxis(block, (2, 3), (0, 1)).reshape(self.weights[low].size, -1)
                    out[starts[low] : starts[low + 1], starts[high] : starts[high + 1]] += block
                    if high < len(self.weights) - 1:
                        path = self.slopes[high][part][:, :, None] * np.einsum("ce,iea->ica", self.weights[high], path)
        return out + out.T


def flat(weights: Matrices) -> np.ndarray:
    """All layers in one vector."""
    return np.concatenate([w.ravel() for w in weights])


def shaped(vector: np.ndarray, like: Matrices) -> Matrices:
    """The layers of one vector."""
    ends = np.cumsum([w.size for w in like])[:-1]
    return [part.reshape(w.shape) for part, w in zip(np.split(vector, ends), like, strict=True)]


def unit(weights: Matrices) -> Matrices:
    """Every layer divided by its norm; a layer of zeros stays zero."""
    return [w / (np.linalg.norm(w) or 1.0) for w in weights]
