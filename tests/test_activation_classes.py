"""The table of activation classes, its awkward cases, and how sure the classifier is."""

import contextlib
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saddlejax as sj
from saddlejax.networks.activation_class import slope_jumps, value_at_zero

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
ROOT_PI = math.sqrt(math.pi)

# name: letter, order, gain, first coefficients (of both sides), from the series in closed form
ANALYTIC = {
    "identity": ("A", None, 1, [0, 1, 0, 0, 0, 0, 0]),
    "tanh": ("B", 3, 1, [0, 1, 0, -1 / 3, 0, 2 / 15, 0]),
    "erf": ("B", 3, 2 / ROOT_PI, [0, 2 / ROOT_PI, 0, -2 / (3 * ROOT_PI), 0, 1 / (5 * ROOT_PI), 0]),
    "sin": ("B", 3, 1, [0, 1, 0, -1 / 6, 0, 1 / 120, 0]),
    "arctan": ("B", 3, 1, [0, 1, 0, -1 / 3, 0, 1 / 5, 0]),
    "gelu": ("C", 2, 0.5, [0, 0.5, 1 / math.sqrt(2 * math.pi), 0, -1 / (6 * math.sqrt(2 * math.pi)), 0]),
    "gelu_tanh": ("C", 2, 0.5, [0, 0.5, 1 / math.sqrt(2 * math.pi), 0]),
    "silu": ("C", 2, 0.5, [0, 0.5, 1 / 4, 0, -1 / 48, 0, 1 / 480]),
    "swish": ("C", 2, 0.5, [0, 0.5, 1 / 4, 0, -1 / 48, 0, 1 / 480]),
    "mish": ("C", 2, 0.6, [0, 0.6, 8 / 25]),
    "sigmoid": ("D", 0, 0.25, [1 / 2, 1 / 4, 0, -1 / 48, 0, 1 / 480, 0]),
    "softplus": ("D", 0, 0.5, [math.log(2), 1 / 2, 1 / 8, 0, -1 / 192, 0, 1 / 2880]),
    "cos": ("D", 0, 0, [1, 0, -1 / 2, 0, 1 / 24, 0, -1 / 720]),
}

EXP = [1 / math.factorial(k) for k in range(7)]
# name: letter, order, gain, left and right series, homogeneous, degree, parity
ONE_SIDED = {
    "relu": ("A", None, None, [0] * 7, [0, 1, 0, 0, 0, 0, 0], "everywhere", 1, None),
    "leaky_relu": ("A", None, None, [0, 0.01, 0], [0, 1, 0], "everywhere", 1, None),
    "abs": ("A", None, None, [0, -1, 0], [0, 1, 0], "everywhere", 1, None),
    "elu": (None, 2, 1, [0, *EXP[1:]], [0, 1, 0, 0, 0, 0, 0], "no", None, "neither"),
    "celu": (None, 2, 1, [0, 1, 1 / 4, 1 / 24, 1 / 192], [0, 1, 0], "no", None, "neither"),
    "selu": (
        None, 2, None, [0, *(SELU_SCALE * SELU_ALPHA * c for c in EXP[1:])], [0, SELU_SCALE, 0], "no", None, "neither",
    ),
    "softsign": (None, 2, 1, [0, 1, 1, 1, 1, 1, 1], [0, 1, -1, 1, -1, 1, -1], "no", None, "odd"),
    "relu6": (None, None, None, [0, 0, 0], [0, 1, 0], "near zero", 1, None),
    "hard_tanh": (None, None, 1, [0, 1, 0, 0], [0, 1, 0, 0], "near zero", 1, None),
    "squared_relu": (None, 2, 0, [0, 0, 0, 0], [0, 0, 1, 0], "everywhere", 2, "neither"),
}  # fmt: skip


@pytest.fixture(params=["x64 on", "x64 off"])
def any_precision(request):
    with contextlib.nullcontext() if request.param == "x64 on" else jax.enable_x64(False):
        assert jnp.ones(1).dtype == (jnp.float64 if request.param == "x64 on" else jnp.float32)
        yield


def close(found, expected):
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ANALYTIC)
def test_table(name, any_precision):
    letter, order, gain, series = ANALYTIC[name]
    found = sj.classify_activation(name)
    assert (found.letter, found.order) == (letter, order)
    assert found.gain == pytest.approx(gain, rel=1e-10, abs=1e-10)
    close(found.coefficients, series)
    close(found.left.coefficients, series)
    close(found.right.coefficients, series)
    assert found.parity == {"A": None, "B": "odd", "C": "even", "D": "even"}[letter]
    assert found.confidence > 1 - 1e-8


@pytest.mark.parametrize("name", ONE_SIDED)
def test_awkward_cases(name, any_precision):
    letter, order, gain, left, right, homogeneous, degree, parity = ONE_SIDED[name]
    found = sj.classify_activation(name)
    assert (found.letter, found.order, found.homogeneous) == (letter, order, homogeneous)
    assert (found.degree, found.parity) == (degree, parity)
    assert found.gain == (gain if gain is None else pytest.approx(gain, rel=1e-10, abs=1e-10))
    close(found.left.coefficients, left)
    close(found.right.coefficients, right)
    assert (found.coefficients is None) == (left != right)
    assert found.confidence > 1 - 1e-8
    assert bool(found.note) == (letter is None)


def test_every_named_activation_is_in_a_table():
    assert set(sj.ACTIVATIONS) - {"linear"} == set(ANALYTIC) | set(ONE_SIDED)


NO_EXPANSION = {
    "square root": (lambda z: jnp.sqrt(jnp.abs(z)), None, 0.5),
    "power 3/2": (lambda z: jnp.abs(z) ** 1.5, 0, 1.5),
    "z log z": (lambda z: z * jnp.log(jnp.abs(z)), None, None),
    "z² log z": (lambda z: z**2 * jnp.log(jnp.abs(z)), 0, None),
    "sin 1/z": (lambda z: jnp.sin(1 / z), None, None),
    "z + z³ sin 1/z": (lambda z: z + z**3 * jnp.sin(1 / z), 1, None),
    "z + z^5/2": (lambda z: z + jnp.abs(z) ** 2.5, 1, None),
}


@pytest.mark.parametrize("name", NO_EXPANSION)
def test_no_expansion_is_said(name, any_precision):
    function, gain, degree = NO_EXPANSION[name]
    found = sj.classify_activation(function)
    assert (found.letter, found.order, found.coefficients) == (None, None, None)
    assert found.left.coefficients is None and found.right.errors == ()
    assert (found.gain, found.degree) == (pytest.approx(gain), pytest.approx(degree))
    assert "no expansion" in str(found)
    assert found.confidence > 0.99


@pytest.mark.parametrize("name", ["identity", "relu", "leaky_relu", "abs"])
def test_a_small_cube_changes_class_a(name, any_precision):
    base = sj.ACTIVATIONS[name]
    found = sj.classify_activation(lambda z: base(z) + 1e-3 * z**3)
    assert (found.letter, found.order) == ("B", 3)
    assert found.right.coefficients[3] == pytest.approx(1e-3, rel=1e-7)
    assert found.confidence > 1 - 1e-8


@pytest.mark.parametrize("name", ["identity", "relu"])
def test_how_sure_it_is_of_a_tiny_cube(name, any_precision):
    base = sj.ACTIVATIONS[name]
    tiny = [sj.classify_activation(lambda z, c=c: base(z) + c * z**3) for c in (1e-9, 1e-12, 1e-13, 1e-18)]
    assert [t.letter for t in tiny] == ["B", "B", "B", None]
    # Derivatives of polynomials at zero are exact, and the resolution is a fixed multiple of the machine epsilon.
    assert tiny[1].strength == pytest.approx(2e-12, rel=1e-3)
    # The confidence falls with the distance to rounding, and beyond it nothing is claimed.
    confidence = [t.confidence for t in tiny]
    assert sorted(confidence, reverse=True) == confidence
    assert 0.98 < confidence[1] < 0.999 and confidence[2] < 0.95 and confidence[3] == 0
    assert "cannot be told from one of class A" in str(tiny[1]) and "below the resolution" in str(tiny[3])


def test_functions_of_single_precision_are_judged_by_it():
    found = sj.classify_activation(lambda z: jnp.tanh(z.astype(jnp.float32)))
    assert (found.letter, found.order) == ("B", 3)
    np.testing.assert_allclose(found.coefficients[:4], [0, 1, 0, -1 / 3], atol=1e-6)
    assert 1e-7 < found.resolution < 1e-4
    # Too small a cube for single precision leaves no trace at all.
    assert sj.classify_activation(lambda z: (lambda s: s + 1e-12 * s**3)(z.astype(jnp.float32))).letter == "A"


def test_derivatives_that_fail_next_to_zero_are_not_believed():
    # JAX's derivatives of the quotient are 0/0 there; the series is −z²/6 + z⁴/120.
    found = sj.classify_activation(lambda z: jnp.where(z == 0, 1.0, jnp.sin(z) / z) - 1)
    assert (found.letter, found.order, found.gain) == ("C", 2, pytest.approx(0, abs=1e-6))
    np.testing.assert_allclose(found.coefficients[:5], [0, 0, -1 / 6, 0, 1 / 120], atol=1e-7)
    # A class-A function in disguise: sides that cancel to rounding.
    disguised = sj.classify_activation(lambda z: jax.nn.softplus(z) - jax.nn.softplus(-z))
    assert (disguised.letter, disguised.gain) == ("A", pytest.approx(1))
    assert sj.classify_activation(lambda z: jnp.sqrt(z * z)).letter == "A"


@pytest.mark.parametrize(
    ("function", "letter", "order", "homogeneous"),
    [
        (lambda z: z**2, "C", 2, "everywhere"),
        (lambda z: z**3, "B", 3, "everywhere"),
        (lambda z: z * jnp.abs(z), None, 2, "everywhere"),
        (jnp.sign, None, 0, "everywhere"),
        (lambda z: z + z**9, None, None, "no"),
        (lambda z: z + jnp.exp(-1 / z**2), None, None, "no"),
        (lambda z: jnp.where(jnp.abs(z) < 2e-3, 0.0, z), None, None, "near zero"),
        (lambda z: jnp.sign(z) * jnp.maximum(jnp.abs(z) - 0.5, 0), None, None, "near zero"),
        (jnp.expm1, "C", 2, "no"),
        (lambda z: z + 0.1, "D", 0, "no"),
        (lambda z: 1e6 * jnp.tanh(30 * z), "B", 3, "no"),
    ],
)
def test_other_functions(function, letter, order, homogeneous):
    found = sj.classify_activation(function)
    assert (found.letter, found.order, found.homogeneous) == (letter, order, homogeneous)
    assert found.letter or found.note


def test_coefficients_predict_the_defect():
    z = np.geomspace(1e-4, 1e-2, 5)
    for name in ("tanh", "mish", "elu", "softsign", "sigmoid"):
        found = sj.classify_activation(name)
        for side, expansion in ((-1, found.left), (1, found.right)):
            value, scaled_slope = jax.jvp(sj.ACTIVATIONS[name], (side * z,), (side * z,))
            series = sum((k - 1) * c * (side * z) ** k for k, c in enumerate(expansion.coefficients))
            # Of values up to one half, whose rounding is 1e-16, the difference at 1e-4 is of size 1e-12.
            np.testing.assert_allclose(scaled_slope - value, series, rtol=1e-6, atol=1e-13)


def test_while_tracing(any_precision):
    def function(x):
        found = sj.classify_activation("gelu")
        assert (found.letter, found.order) == ("C", 2)
        return x * found.gain + value_at_zero("cos") + slope_jumps("relu")

    assert jax.jit(function)(1.0) == pytest.approx(2.5)
    np.testing.assert_allclose(jax.vmap(function)(jnp.arange(3.0)), [2.0, 2.5, 3.0], rtol=1e-5)
    assert jax.jit(jax.grad(function))(1.0) == pytest.approx(0.5)
    assert jax.lax.scan(lambda c, _: (function(c), None), 0.0, length=2)[0] == pytest.approx(3.0)


class ScaledTanh:
    """An activation with a parameter, which cannot be hashed."""

    __hash__ = None

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, z):
        return jnp.tanh(self.scale * z)


def test_slopes_and_values_at_zero(any_precision):
    for name in sj.ACTIVATIONS:
        expected = {"cos": 1.0, "softplus": math.log(2), "sigmoid": 0.5}.get(name, 0.0)
        assert value_at_zero(name) == pytest.approx(expected, rel=1e-10)
    assert slope_jumps(lambda z: jnp.sqrt(jnp.abs(z)))
    assert math.isnan(value_at_zero(lambda z: z * jnp.log(jnp.abs(z))))
    # Zero at zero only, and not next to it: a step up on the right, down on the left.
    assert value_at_zero(lambda z: jnp.where(z > 0, z + 0.25, z)) == pytest.approx(0.25)
    assert value_at_zero(lambda z: jnp.where(z < 0, -0.5, jnp.tanh(z))) == pytest.approx(-0.5)
    scaled = ScaledTanh(2.0)
    assert value_at_zero(scaled) == 0 and not slope_jumps(scaled)


KINKED = {
    "hard swish": jax.nn.hard_swish,
    "hard sigmoid": jax.nn.hard_sigmoid,
    "far out": lambda z: jnp.clip(z, -300.3, 300.3),
    "triangles": lambda z: jnp.abs(z % 2 - 1),
    "small kink": lambda z: jnp.tanh(z) + 1e-3 * jnp.maximum(z - math.pi, 0),
    "kink of a growing function": lambda z: z**4 + jnp.abs(z - 2),
    "square root": lambda z: jnp.sqrt(jnp.abs(z - 1.234)),
    "single precision": lambda z: jnp.clip(z.astype(jnp.float32), -1, 1),
    "a number in it": eqx.nn.PReLU(0.2),
}
SMOOTH = {
    "steep": lambda z: jnp.tanh(50 * z),
    "very steep": lambda z: jnp.tanh(1e6 * (z - 0.3)),
    "nearly a kink": lambda z: jax.nn.softplus(1e4 * (z - 0.3)) / 1e4,
    "fast": lambda z: jnp.sin(50 * z),
    "ever faster": lambda z: jnp.sin(z * z),
    "overflows": jnp.expm1,
    "grows": lambda z: z**9,
    "has poles": jnp.tan,
    "single precision": lambda z: jnp.sin(z.astype(jnp.float32)),
    "spline": lambda z: jnp.maximum(z - 3, 0) ** 2,
    "not hashable": ScaledTanh(50.0),
}


def test_kinks_anywhere_are_found(any_precision):
    kinked = {"relu", "leaky_relu", "abs", "selu", "relu6", "hard_tanh"}
    assert {name for name in sj.ACTIVATIONS if slope_jumps(name)} == kinked
    assert all(slope_jumps(function) for function in KINKED.values())
    assert not any(slope_jumps(function) for function in SMOOTH.values())
    assert not slope_jumps(eqx.nn.PReLU(1.0))


def test_kinks_are_found_while_tracing():
    assert jax.jit(lambda x: x * slope_jumps(KINKED["hard swish"]))(2.0) == 2
    # Numbers that are traced count as ordinary ones, other than the slope of one that makes a line of it.
    np.testing.assert_array_equal(jax.vmap(lambda a: a * slope_jumps(eqx.nn.PReLU(a)))(jnp.ones(2)), [1, 1])


def test_what_was_found_about_a_function_is_kept():
    called = []

    def function(z):
        called.append(z)
        return jnp.tanh(z)

    found, before = [], 0
    for _ in range(2):
        before = len(called)
        found.append((str(sj.classify_activation(function)), value_at_zero(function), slope_jumps(function)))
    assert found[0] == found[1]
    assert len(called) == before


def test_a_stiff_flow_looks_at_its_activation_once():
    called = []

    def function(z):
        called.append(z)
        return jnp.tanh(z)

    net = sj.MLP.from_weights([[[1e-2]], [[1e-2]]], function)
    for _ in range(2):
        before = len(called)
        sj.gradient_flow(net, sj.Task([[1.0]], [[1.0]]), stiff=True)
    assert len(called) == before


def test_summary():
    text = str(sj.classify_activation("gelu"))
    assert "gelu: class C, order 2, gain 0.5" in text and "+0.39894 z^2" in text
    assert "z < 0: σ(z) = -1 z" in str(sj.classify_activation("abs"))


@pytest.mark.parametrize(
    "bad",
    ["no such name", 3, lambda z: z.sum(), lambda z: 1j * z, jax.nn.softmax, lambda z: np.tanh(float(z)), jnp.isfinite],
)
def test_bad_activations_are_refused(bad):
    with pytest.raises(ValueError, match=r"^activation must be"):
        sj.classify_activation(bad)


def test_a_function_of_traced_values_is_refused():
    with pytest.raises(ValueError, match="being traced"):
        jax.jit(lambda x: sj.classify_activation(lambda z: x * z).gain)(1.0)
