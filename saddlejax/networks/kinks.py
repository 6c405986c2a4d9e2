"""Where the slope of an elementwise function jumps, and by how much."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .activation_class import jumps_of_slope
from .activations import Activation
from .elementwise import values_and_slopes, with_known_numbers

BESIDE, FARTHER = 1e-7, 30
"""How far beside a kink, relative to its place, its slopes are read off; and again so many times as far."""
SAME = 1e-3
"""By how much the slopes at both distances may differ where they have a limit at the kink."""


class Kinks(NamedTuple):
    """The jumps of the slope of a function: their places, and the slopes below and above each."""

    places: tuple[float, ...]
    below: tuple[float, ...]
    above: tuple[float, ...]

    def distance(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """How far above the nearest kink each entry is; infinite where there is none."""
        if not self.places:
            return jnp.full_like(z, jnp.inf)
        return z - self._nearest(z, self.places)

    def slope(self, z: Float[Array, "*shape"], share: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The slope at the nearest kink between that below it, for a share of 0, and that above it, for 1."""
        below, above = (self._nearest(z, slopes) for slopes in (self.below, self.above))
        return below + share * (above - below)

    def jump(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """By how much the slope rises at the nearest kink; zero where there is none."""
        return self._nearest(z, self.above) - self._nearest(z, self.below)

    def _nearest(self, z: Float[Array, "*shape"], of: tuple[float, ...]) -> Float[Array, "*shape"]:
        """What belongs to the nearest kink of each entry."""
        if not self.places:
            return jnp.zeros_like(z)
        # Kinks are in increasing order, so that the nearest one changes halfway between neighbours.
        halfway = [0.5 * (a + b) for a, b in zip(self.places[:-1], self.places[1:], strict=True)]
        value = jnp.full_like(z, of[0])
        for border, number in zip(halfway, of[1:], strict=True):
            value = jnp.where(z > border, number, value)
        return value


def kinks_of(function: Activation) -> Kinks:
    """The kinks of a function, in increasing order: those places up to `|z| = 1000` where its slope jumps between two numbers.

    Found by halving intervals of a grid, as [`saddlejax.networks.activation_class.slope_jumps`][] does.
    """
    places = np.unique(np.round(jumps_of_slope(function), 9)) + 0.0
    if len(places) == 0:
        return Kinks((), (), ())
    apart = BESIDE * np.maximum(np.abs(places), 1)
    near, far = (
        values_and_slopes(with_known_numbers(function), places + np.array([[-side], [side]]) * apart)[1].astype(
            np.float64
        )
        for side in (1, FARTHER)
    )
    below, above = near
    # A slope that grows without bound, as that of a root, is no jump between two numbers.
    limited = np.all(np.isfinite(near) & (np.abs(near - far) <= SAME * (1 + np.abs(far))), axis=0)
    jump = limited & (above != below)
    return Kinks(*(tuple(map(float, numbers[jump])) for numbers in (places, below, above)))
