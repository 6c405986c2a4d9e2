"""The four classes of activations, from their behaviour at zero."""

import equinox as eqx
import numpy as np

from .activations import Activation, activation_name, resolve_activation
from .elementwise import remembered, values_and_slopes, with_known_numbers
from .expansions import ORDERS, TOLERANCE, OneSidedExpansion, expand, rounding

_CLOSE = np.array([-(2.0**-60), -(2.0**-120), 2.0**-60, 2.0**-120])
_NEXT_TO_ZERO = 2.0**-100
_FAR = np.geomspace(2.0**-10, 1e3, 97)
_SIDE = np.concatenate([np.geomspace(2.0**-60, 2.0**-7, 256), np.arange(1, 1536) / 64, np.geomspace(24, 1e3, 256)])
_POINTS = np.concatenate([-_SIDE[::-1], _SIDE])
_HALVINGS = 52
_JUMP = 1e-5


class ActivationClass(eqx.Module):
    """What decides how a network with activation `σ` leaves the saddle at the origin.

    With `φ(z) = z σ'(z) − σ(z) = Σ_k (k − 1) c_k z^k` for `σ(z) = Σ_k c_k z^k` (Rawal & DeWeese, arXiv:2605.01288):

    - `letter`: `"A"` where `φ ≡ 0`; `"D"` where `σ(0) ≠ 0`; otherwise `"B"` or `"C"` where the first term of `φ`, the
      same on both sides of zero, is odd or even. `None` where none of this holds; `note` says why.
    - `order`: the power `q` of the first term of `φ` on the side where it comes first: 0 for class D, `None` where `φ`
      vanishes near zero or has no expansion.
    - `gain`: the slope `α = σ'(0)`; `None` where the slope jumps or has no limit.
    - `coefficients`: `c_0 … c_6`, or `None` where the two sides differ or there is no expansion: see `left`, `right`.
    - `left`, `right`: the one-sided [`saddlejax.networks.expansions.OneSidedExpansion`][]s.
    - `parity`: `"odd"`, `"even"` or `"neither"`, of the first term of `φ` as a function on both sides.
    - `homogeneous`: `"everywhere"` (up to `|z| = 1000`), `"near zero"` or `"no"`: whether `σ(λz) = λ^p σ(z)`, `λ > 0`.
    - `degree`: that `p`, or `None`.
    - `strength`: the size of the deciding coefficient of `φ` relative to the largest coefficient of `σ`; 0 where no
      term was seen, `None` without an expansion. `z` is measured in units of one.
    - `resolution`: the strength below which a term cannot be told from rounding.
    - `confidence`: from 0 to 1. Where `φ` has a first term, `1 − resolution / strength`. Where it vanishes, one minus
      the largest coefficient found, in units of the resolution. Where it vanishes up to `z^6` and yet not near zero, 0:
      the order is open. Without an expansion, one minus the tolerated over the observed misfit of polynomials. It does not
      cover what is not looked at: terms below the resolution, features of `σ` at `|z| < 1e-4`, and `|z| > 1000`.
    - `note`: what the letter does not say.
    """

    name: str = eqx.field(static=True)
    letter: str | None = eqx.field(static=True)
    order: int | None = eqx.field(static=True)
    gain: float | None = eqx.field(static=True)
    coefficients: tuple[float, ...] | None = eqx.field(static=True)
    left: OneSidedExpansion
    right: OneSidedExpansion
    parity: str | None = eqx.field(static=True)
    homogeneous: str = eqx.field(static=True)
    degree: float | None = eqx.field(static=True)
    strength: float | None = eqx.field(static=True)
    resolution: float = eqx.field(static=True)
    confidence: float = eqx.field(static=True)
    note: str = eqx.field(static=True)

    def __str__(self) -> str:
        letter = f"class {self.letter}" if self.letter else "in none of the classes A to D"
        order = "" if self.order is None else f", order {self.order}"
        gain = "no single slope at zero" if self.gain is None else f"gain {self.gain:.6g}"
        lines = [f"{self.name}: {letter}{order}, {gain}, confidence {self.confidence:.4g}"]
        if self.coefficients is not None:
            lines.append(f"  σ(z) = {_series(self.coefficients)}")
        else:
            lines.append(f"  z < 0: σ(z) = {_series(self.left.coefficients)}")
            lines.append(f"  z > 0: σ(z) = {_series(self.right.coefficients)}")
        if self.homogeneous != "no":
            lines.append(f"  homogeneous of degree {self.degree:g} {self.homogeneous}")
        return "\n".join(lines + ([f"  {self.note}"] if self.note else []))


def classify_activation(activation: str | Activation) -> ActivationClass:
    """The class of an activation, with its order, gain and expansions at zero.

    Always computed in double precision, whatever the global setting; a function that itself works in single precision
    is judged by that precision. Can be called while JAX is tracing: the result consists of plain numbers.

    **Arguments:** `activation`, a name in [`saddlejax.ACTIVATIONS`][] or any elementwise JAX function.

    **Returns:** an [`saddlejax.ActivationClass`][]; `print` it for a summary.

    **Raises:** `ValueError` for an unknown name, or a function that is not elementwise, real and differentiable by JAX.
    """
    return _classify(resolve_activation(activation))


@remembered
def _classify(function: Activation) -> ActivationClass:
    left, right, eps = expand(function)
    name, tolerance = activation_name(function), TOLERANCE * eps
    if left.coefficients is None or right.coefficients is None:
        homogeneous, degree = _homogeneity(function, eps, None)
        return ActivationClass(
            name=name,
            letter=None,
            order=None,
            gain=_common_slope(function),
            coefficients=None,
            left=left,
            right=right,
            parity=None,
            homogeneous=homogeneous,
            degree=degree,
            strength=None,
            resolution=tolerance,
            confidence=1 - 1 / max(left.misfit, right.misfit),
            note="There is no expansion in powers of z at zero.",
        )
    sides = np.array([left.coefficients, right.coefficients])
    scale = float(np.max(np.abs(sides))) or 1.0
    blur = tolerance * scale + 10 * np.max([left.errors, right.errors], axis=0)
    same = np.abs(sides[0] - sides[1]) <= blur
    homogeneous, degree = _homogeneity(function, eps, np.flatnonzero(np.any(np.abs(sides) > blur, axis=0)))
    gain = float(sides[:, 1].mean()) if same[1] else None
    phi = (np.arange(ORDERS + 1) - 1) * sides
    letter, order, parity = _letter(phi, blur, (homogeneous, degree) == ("everywhere", 1))
    deciding = np.abs(phi).max(axis=0)
    if order is None:
        strength, resolution = 0.0, float(blur[2:4].max()) / scale
        confidence = 0.0 if homogeneous == "no" else 1 - float(np.max(deciding / blur))
    else:
        strength, resolution = float(deciding[order]) / scale, float(blur[order]) / scale
        confidence = 1 - resolution / strength
    return ActivationClass(
        name=name,
        letter=letter,
        order=order,
        gain=gain,
        coefficients=tuple(map(float, sides.mean(axis=0))) if np.all(same) else None,
        left=left,
        right=right,
        parity=parity,
        homogeneous=homogeneous,
        degree=degree,
        strength=strength,
        resolution=resolution,
        confidence=confidence,
        note=" ".join(_notes(letter, order, parity, gain, homogeneous, strength)),
    )


def value_at_zero(activation: str | Activation) -> float:
    """`σ(0)`, a plain number even while JAX is tracing; NaN where `σ` is not defined there.

    Where `σ` jumps at zero, the one of its two limits that is further from zero.
    """
    return _value_at_zero(resolve_activation(activation))


@remembered
def _value_at_zero(function: Activation) -> float:
    (middle, *sides), _ = values_and_slopes(function, np.array([0.0, -_NEXT_TO_ZERO, _NEXT_TO_ZERO]))
    jumps = [float(side) for side in sides if abs(side - middle) > 1e-8]
    return max([float(middle), *jumps], key=abs)


def slope_jumps(activation: str | Activation) -> bool:
    """Whether `σ'` jumps, or has no limit, anywhere up to `|z| = 1000`; can be asked while JAX is tracing.

    The slopes are compared between neighbours of a grid of 4,094 points, at a distance of 1/64 up to `|z| = 24`, and all
    intervals halved until they are down to rounding, always keeping the half over which the slope changes more. Over an
    interval around a jump the change stays what it is, over any other it vanishes, however steep the function. Seen are
    jumps of more than 1e-5 of the largest slope up to there (or of the rounding of the function, where that is more),
    unless the slope changes the other way by more on the grid.

    Arrays of the activation that are being traced are taken to have no special values.
    """
    function = with_known_numbers(resolve_activation(activation))
    return _common_slope(function) is None or len(_jumps_on_grid(function)) > 0


def jumps_of_slope(activation: Activation) -> np.ndarray:
    """The places, known to rounding, at which `σ'` jumps."""
    return _jumps_on_grid(with_known_numbers(activation))


@remembered
def _jumps_on_grid(function: Activation) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        values, slopes = values_and_slopes(function, _POINTS)
        slopes = slopes.astype(np.float64)
        reach = np.maximum(np.maximum(np.abs(_POINTS[1:]), np.abs(_POINTS[:-1])), 1)
        least = np.maximum(_JUMP, TOLERANCE * rounding(values) * reach) * _largest_within(slopes, reach)
        left, right, below, above = _POINTS[:-1], _POINTS[1:], slopes[:-1], slopes[1:]
        for _ in range(_HALVINGS):
            if not np.any(_jump(below, above) > least):
                break
            middle = 0.5 * (left + right)
            between = values_and_slopes(function, middle)[1].astype(np.float64)
            # Where there is no slope, as JAX finds it right at a singularity, both ends are kept.
            known, lower = np.isfinite(between), _jump(below, between) >= _jump(between, above)
            left, below = np.where(known & ~lower, (middle, between), (left, below))
            right, above = np.where(known & lower, (middle, between), (right, above))
        return left[_jump(below, above) > least]


def _jump(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The change of the slope; 0 where the function overflows."""
    change = np.abs(above - below)
    return np.where(np.isfinite(change), change, 0.0)


def _largest_within(slopes: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """The largest finite slope on the grid up to each `|z|`."""
    order = np.argsort(np.abs(_POINTS), kind="stable")
    sizes = np.where(np.isfinite(slopes), np.abs(slopes), 0.0)[order]
    return np.maximum.accumulate(sizes)[np.searchsorted(np.abs(_POINTS)[order], reach, side="right") - 1]


@remembered
def _common_slope(function: Activation) -> float | None:
    """The limit of `σ'(z)` as `z → 0` if both sides have the same."""
    slopes = values_and_slopes(function, np.append(_CLOSE, [-1.0, 1.0]))[1].astype(np.float64)
    size = np.max(np.abs(slopes))
    if not np.isfinite(size) or np.ptp(slopes[:4]) > 1e-6 * size:
        return None
    return float(slopes[3]) if abs(slopes[3]) > np.finfo(float).eps * size else 0.0


def _letter(phi: np.ndarray, blur: np.ndarray, one_homogeneous: bool) -> tuple[str | None, int | None, str | None]:
    """Letter, order and parity from the coefficients of `φ`, shape `(sides, orders)`, known up to `blur`."""
    seen = np.flatnonzero(np.any(np.abs(phi) > blur, axis=0))
    if len(seen) == 0:
        return ("A" if one_homogeneous else None), None, None
    order = int(seen[0])
    below, above = phi[:, order] * ((-1) ** order, 1)
    odd, even = abs(above + below) <= 2 * blur[order], abs(above - below) <= 2 * blur[order]
    parity = "odd" if odd else "even" if even else "neither"
    if order == 0:
        return ("D" if even else None), 0, parity
    analytic = odd if order % 2 else even
    return ("CB"[order % 2] if analytic else None), order, parity


def _homogeneity(function: Activation, eps: float, powers: np.ndarray | None) -> tuple[str, float | None]:
    """Whether and to what degree `z σ' = p σ`; `powers` are those in the expansions, `None` if there are none."""
    z = np.stack([-_FAR, _FAR])
    with np.errstate(all="ignore"):
        values, slopes = (array.astype(np.float64) for array in values_and_slopes(function, z))
        if powers is None:
            ratios = (z * slopes / values)[np.abs(values) > 0]
            degree = float(np.median(ratios)) if len(ratios) else 1.0
            degree = round(degree, 9)
        elif len(powers) <= 1:
            degree = float(powers[0]) if len(powers) else 1.0
        else:
            return "no", None
        size = np.abs(z * slopes) + np.abs(values)
        floor = np.max(size[:, _FAR <= 1])
        # Each value from the one before as well: a discontinuous function can have the slopes of a homogeneous one.
        predicted = values[:, :-1] * (_FAR[1:] / _FAR[:-1]) ** degree
        errors = np.abs(z * slopes - degree * values)
        errors[:, 1:] = np.maximum(errors[:, 1:], np.abs(values[:, 1:] - predicted))
        defects = np.max(errors / (TOLERANCE * eps * np.maximum(size, floor)), axis=0)
    defects = np.where(np.isnan(defects), 0.0 if np.all(size == 0) else np.inf, defects)
    outside = np.flatnonzero(defects > 1)
    if len(outside) == 0:
        return "everywhere", degree
    # A smooth term of high order leaves rounding gradually, a splice such as that of hard tanh at once.
    first = outside[0]
    if powers is not None and first > 0 and np.max(defects[first : first + 2]) * eps > 1e-10:
        return "near zero", degree
    return "no", None


def _notes(
    letter: str | None, order: int | None, parity: str | None, gain: float | None, homogeneous: str, strength: float
) -> list[str]:
    notes = []
    if order is None and homogeneous == "near zero":
        notes.append("φ vanishes near zero only: as class A while pre-activations are small.")
    elif order is None and letter is None:
        notes.append(
            f"φ does not vanish, but shows no term up to z^{ORDERS}: such a term is below the resolution, of higher "
            "order, or φ is flat at zero."
        )
    elif order == 0 and letter is None:
        notes.append("The function jumps at zero.")
    elif letter is None:
        notes.append(f"The first terms of φ on the two sides are not one power of z; together they are {parity}.")
    if gain is None and letter != "A":
        notes.append("The slope jumps at zero.")
    if gain == 0 and letter in ("B", "C"):
        notes.append("The gain is zero: near the origin the network is not a linear one.")
    if order and strength < 1e-6:
        reach = (np.finfo(np.float32).eps / strength) ** (1 / max(order - 1, 1))
        notes.append(
            f"That term is only {strength:.1e} of σ at |z| = 1: in single precision the function cannot be told from "
            f"one of class A for |z| below about {reach:.0e}."
        )
    return notes


def _series(coefficients: tuple[float, ...] | None) -> str:
    if coefficients is None:
        return "no expansion"
    terms = [f"{c:+.5g}{'' if k == 0 else ' z' if k == 1 else f' z^{k}'}" for k, c in enumerate(coefficients) if c != 0]
    return " ".join(terms) if terms else f"0 up to z^{len(coefficients) - 1}"
