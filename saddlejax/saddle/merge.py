"""Merging hidden neurons that compute the same function, and padding with neurons of zero weights."""

import numpy as np

from .pieces import Matrices, unit


def merge(weights: Matrices, angle: float) -> Matrices:
    """The network with negligible hidden neurons removed and those with parallel incoming weights merged.

    With a 1-homogeneous activation, neurons with incoming weights `a_j w` (`a_j > 0`, `‖w‖ = 1`) and outgoing `b_j`
    act as one with `a w` and `b`, where `a b = Σ a_j b_j` and `a = ‖b‖`: by Cauchy–Schwarz neither layer's norm grows,
    so merging exactly parallel neurons never lowers the speed.

    **Arguments:** `weights`, the matrices; `angle`, in radians, below which directions count as parallel, and also
    the share of its layer's largest below which a neuron is negligible.
    """
    weights = [w.copy() for w in weights]
    for layer in range(len(weights) - 1):
        incoming, outgoing = weights[layer], weights[layer + 1]
        lengths = np.linalg.norm(incoming, axis=1)
        strength = lengths * np.linalg.norm(outgoing, axis=0)
        kept = np.argsort(-strength)
        kept = kept[strength[kept] > angle * strength.max()]
        groups: list[list[int]] = []
        for neuron in kept:
            for group in groups:
                cosine = incoming[neuron] @ incoming[group[0]] / (lengths[neuron] * lengths[group[0]])
                if cosine > np.cos(angle):
                    group.append(neuron)
                    break
            else:
                groups.append([neuron])
        weights[layer] = np.zeros((len(groups), incoming.shape[1]))
        weights[layer + 1] = np.zeros((outgoing.shape[0], len(groups)))
        for position, group in enumerate(groups):
            direction = strength[group] @ (incoming[group] / lengths[group, None])
            direction /= np.linalg.norm(direction)
            effect = outgoing[:, group] @ lengths[group]
            size = np.sqrt(np.linalg.norm(effect))
            weights[layer][position] = size * direction
            weights[layer + 1][:, position] = effect / max(size, 1e-300)
    return unit(weights)


def pad(weights: Matrices, shapes: list[tuple[int, int]]) -> Matrices:
    """The network with neurons of zero weights added up to the given shapes."""
    return [
        np.pad(w, ((0, rows - w.shape[0]), (0, columns - w.shape[1])))
        for w, (rows, columns) in zip(weights, shapes, strict=True)
    ]
