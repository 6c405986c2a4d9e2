"""What a search for escape directions found."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import _check
from ..networks.activations import Activation, ActivationParts, activation_name
from ..networks.mlp import MLP
from ..networks.network import Weights
from .low_rank import singular_values
from .optima import Optimum, distinct
from .settle import RANDOM, THREE_LAYERS

_SHOWN = 4  # optima in the summary


class EscapeDirection(eqx.Module):
    """The best escape direction found, with its residual and upper bounds; `L` layers of unit Frobenius norm.

    - `weights`: the direction `ρ`, one matrix a layer.
    - `speed`: `s = −𝓛_0(ρ)`; differentiable in the task (the direction does not move to first order).
    - `residual`: how far `ρ` is from stationary, the norm of `−∇𝓛_0(ρ) − s ρ` over `s`: the least one over the Clarke
      subdifferential where `kinks > 0`. `plain_residual` takes the slope from below at the kinks instead.
      `residual_kind` says which of the two `residual` is. Both are infinite where the speed is zero: then `weights` is
      no escape direction.
    - `kinks`: the number of pairs of a sample and a neuron lying on the kink of the activation.
    - `upper_bound`, `proven_bound`: bounds on the speed of every network of this depth, of any width; see
      [`saddlejax.saddle.speed_bound`][]. The tighter `upper_bound` holds if the search for its one maximum, over unit
      vectors in the input space, found the largest; `proven_bound` holds without that.
    - `rank_one_speed`, `rank_one_speeds`: the best speed with all layers of rank one, and that of each of its starts.
    - `speeds`, `residuals`, `gradient_evaluations`, `start_kinds`: of every start, best first. The kinds are
      0 for a random start of full rank (as many as were asked for), 1 for the best rank-one direction, 2 for the best
      direction of a network of three layers made deeper (for `L > 3`). The last two kinds are added to the random starts,
      one of each, and their evaluations are those of the smaller networks. In closed form there is one entry, of kind 1.
    - `polish_evaluations`: gradients and Hessians of the merged network, of a few neurons, that the polish took.

    Many starts are no proof that the best direction was found; `relative_gap` says how much better one could be.
    """

    weights: Weights
    speed: Float[Array, ""]
    residual: Float[Array, ""]
    plain_residual: Float[Array, ""]
    kinks: Int[Array, ""]
    upper_bound: Float[Array, ""]
    proven_bound: Float[Array, ""]
    rank_one_speed: Float[Array, ""]
    rank_one_speeds: Float[Array, " narrow_starts"]
    speeds: Float[Array, " starts"]
    residuals: Float[Array, " starts"]
    gradient_evaluations: Int[Array, " starts"]
    polish_evaluations: Int[Array, " starts"]
    start_kinds: Int[Array, " starts"]
    activation_parts: ActivationParts

    @property
    def activation(self) -> Activation:
        """The activation `σ` of the networks."""
        return self.activation_parts.whole

    @property
    def depth(self) -> int:
        """Number `L` of layers."""
        return len(self.weights)

    @property
    def net(self) -> MLP:
        """The direction as a network."""
        return MLP.from_weights(self.weights, self.activation)

    @property
    def singular_values(self) -> tuple[Float[Array, " _"], ...]:
        """The singular values of every layer, largest first."""
        return singular_values(self.weights)

    @property
    def relative_gap(self) -> Float[Array, ""]:
        """`upper_bound / speed − 1`: no direction is faster by more than this share.

        At speed zero it is infinite, or zero where the upper bound is zero too: then there is nothing to find.
        """
        nothing_found = jnp.where(self.upper_bound > 0, jnp.inf, 0)
        ratio = self.upper_bound / jnp.where(self.speed > 0, self.speed, 1)
        return jnp.where(self.speed > 0, ratio - 1, nothing_found)

    @property
    def residual_kind(self) -> str:
        """`"Clarke"` where the direction lies on kinks, `"plain"` elsewhere."""
        return "Clarke" if int(self.kinks) > 0 else "plain"

    @property
    def optima(self) -> tuple[Optimum, ...]:
        """The distinct local optima, best first, with the number of starts of any kind that ended there."""
        return distinct(self.speeds, self.residuals)

    @property
    def rank_one_optima(self) -> tuple[Optimum, ...]:
        """The distinct local optima of the rank-one problem, best first, with their number of starts."""
        return distinct(self.rank_one_speeds, jnp.zeros_like(self.rank_one_speeds))

    def __str__(self) -> str:
        if not _check.is_concrete(self.speed):
            return "EscapeDirection (being traced)"
        sizes = "-".join(str(n) for n in (self.weights[0].shape[1], *(w.shape[0] for w in self.weights)))
        lines = [f"EscapeDirection {sizes}, {activation_name(self.activation)}, {self.speed.dtype}"]
        if float(self.speed) > 0:
            ratios = " ".join(f"{float(v[1] / v[0]):.2g}" if v.size > 1 else "0" for v in self.singular_values)
            lines += [
                f"  speed             {float(self.speed):.9g}",
                f"  residual          {float(self.residual):.1e} ({self.residual_kind}, {int(self.kinks)} on a kink)",
                f"  upper bound       {float(self.upper_bound):.6g} (gap {float(self.relative_gap):.1%}; "
                f"proven without a search {float(self.proven_bound):.6g})",
                f"  rank-one speed    {float(self.rank_one_speed):.9g}",
                f"  σ2/σ1 by layer    {ratios}",
                f"  starts            {self._starts()}",
                f"  optima (starts)   {_optima(self.optima)}",
            ]
        elif float(self.upper_bound) > 0:
            lines += [
                "  speed             0: no start found a direction in which the leading order of the loss falls",
                f"  upper bound       {float(self.upper_bound):.6g} (proven without a search {float(self.proven_bound):.6g})",
                f"  starts            {self._starts()}",
            ]
        else:
            lines.append("  speed             0: there is no escape direction; the leading order of the loss vanishes")
        return "\n".join(lines)

    def _starts(self) -> str:
        kinds, work = np.asarray(self.start_kinds), np.asarray(self.gradient_evaluations)
        random = kinds == RANDOM
        if not np.any(random):
            return "none: closed form"
        added = f"the best of rank one (from {len(self.rank_one_speeds)})"
        if np.any(kinds == THREE_LAYERS):
            added += " and of three layers"
        return f"{random.sum()} random, median {int(np.median(work[random]))} gradient evaluations; besides, {added}"


def _optima(optima: tuple[Optimum, ...]) -> str:
    shown, more = optima[:_SHOWN], len(optima) - _SHOWN
    text = ", ".join(f"{one.speed:.9g} ({one.starts})" for one in shown) or "none became stationary"
    return f"{text} and {more} more" if more > 0 else text
