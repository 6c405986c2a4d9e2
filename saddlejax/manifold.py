"""The symmetric submanifold: wide networks of identical neurons, reduced to narrow ones."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _check
from .activations import Activation, resolve_activation
from .networks import AbstractNetwork, Weights
from .tasks.task import Task

QUADRATURE_NODES = 80


class BlockMLP(AbstractNetwork):
    """A narrow network whose gradient flow is that of a wide one with blocks of identical neurons.

    `weights` are the isometric coordinates `A_l` (`‖A_l‖_F = ‖W_l‖_F` of the wide network), `multipliers` the fixed
    `√(m_{l−1}[q]/m_l[p])` of the block sizes `m_l`: `z_l[p] = Σ_q A_l[p, q] √(m_{l−1}[q]/m_l[p]) h_{l−1}[q]` (Rawal &
    DeWeese, arXiv:2605.01288).
    """

    weights: Weights
    multipliers: Weights
    activation: Activation = eqx.field(static=True)

    def matrices(self) -> Weights:
        """The matrices that multiply the signals."""
        pairs = zip(self.weights, self.multipliers, strict=True)
        return tuple(w * multiplier.astype(w.dtype) for w, multiplier in pairs)


def chain(
    scales: Sequence[float] | Float[Array, " layers"],
    teacher: Callable[[Array], Array],
    activation: str | Activation,
    width: int,
) -> tuple[BlockMLP, Task]:
    """A wide network of identical neurons with one output, Gaussian inputs and a teacher of one direction, as `L` numbers.

    On the permutation-symmetric submanifold a network of constant width `N` is
    `f(x) = √N X_L σ(X_{L−1} σ(… σ(X_1 g/√N)))` with the layer norms `X_l` and the projection `g ~ N(0, 1)` of the input on
    the direction of the teacher. The mean over `g` is a Gauss-Hermite quadrature with 80 nodes
    (Rawal & DeWeese, arXiv:2605.01288).

    **Arguments:** `scales`, the `L` layer norms at the start; `teacher`, the target as a function of `g`; `activation`;
    `width`, `N`.

    **Returns:** a network and a task, ready for [`saddlejax.gradient_flow`][] or `saddlejax.scale_layers`.

    **Raises:** `ValueError` for fewer than two scales or scales that are not positive.
    """
    _check.whole_number("width", width)
    if np.ndim(scales) != 1 or np.size(scales) < 2:
        raise _check.fail("scales", "hold at least two layer norms", f"of shape {np.shape(scales)}")
    _check.positive_number("scales", scales)
    if not callable(teacher):
        raise _check.fail("teacher", "be a function of the projected input g", repr(teacher))
    norms = jnp.asarray(scales, dtype=float)
    depth, root = norms.size, np.sqrt(width)
    multipliers = [1 / root, *[1.0] * (depth - 2), root]
    net = BlockMLP(
        weights=tuple(norms[layer].reshape(1, 1) for layer in range(depth)),
        multipliers=tuple(jnp.full((1, 1), m) for m in multipliers),
        activation=resolve_activation(activation),
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
    g = jnp.asarray(nodes)[:, None]
    return net, Task(g, teacher(g), sample_weights=weights / weights.sum())
