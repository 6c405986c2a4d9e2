"""Problems with known escape directions."""

import numpy as np

import saddlejax as sj

HEXAGON_SPEED = np.sqrt(3) / (6 * (2 + np.sqrt(3)))


def hexagon(e: float) -> sj.Task:
    """Alternating targets on a regular hexagon, plus `e` times a linear one.

    At `e = 0` no rank-one network sees the target: `E[y ReLU(v·x)] = 0` for every `v`, because the sum of ReLU(v·x_i) over
    one of the two triangles of the hexagon equals that over the other. Three layers see it: with
    `W_1 = [[α,0],[0,t],[0,−t]]`, `W_2 = [α,−t,−t]`, `α² = 2√3 − 3`, `t² = 2 − √3` only `x_0` has a non-zero output.
    """
    angles = np.arange(6) * np.pi / 3
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return sj.Task(x, (np.cos(3 * angles) + e * np.cos(angles))[:, None])


def hexagon_direction() -> list[np.ndarray]:
    """The optimal direction of the hexagon with three layers."""
    a, t = np.sqrt(2 * np.sqrt(3) - 3), np.sqrt(2 - np.sqrt(3))
    return [np.array([[a, 0], [0, t], [0, -t]]), np.array([[a, -t, -t]]), np.array([[1.0]])]


def gaussian(seed: int, samples: int = 30, inputs: int = 4, outputs: int = 2) -> sj.Task:
    """Gaussian inputs with targets that have nothing to do with them."""
    rng = np.random.default_rng(seed)
    return sj.Task(rng.normal(size=(samples, inputs)), rng.normal(size=(samples, outputs)))
