"""A store knows functions by what they compute: it hands back no other function's results."""

import functools
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saddlejax as sj
from saddlejax.sweeps.describe import identify

LINE = sj.Task(jnp.eye(2), jnp.ones((2, 1)))
GRID = {"width": 2, "depth": 2, "scale": 0.1, "until": sj.Time(5.0)}
GAIN = 1.0
TABLE = np.arange(3.0)


class Act(eqx.Module):
    """An activation with a parameter."""

    a: jax.Array

    def __call__(self, z):
        return self.a * jnp.tanh(z)


class Linear:
    """An activation with a plain field and a method."""

    def __init__(self, a):
        self.a, self.self = a, self

    def slope(self, z):
        return self.a * z

    def __call__(self, z):
        return self.slope(z)


class Bent(Linear):
    """The same, bent by another method."""

    def slope(self, z):
        return super().slope(z) + z**3


def make(a):
    return lambda z: jnp.tanh(a * z)


def with_default(a):
    def function(z, a=a):
        return a * z

    return function


def keyword(a):
    def function(z, *, a=a):
        return a * z

    return function


def nested(a):
    def outer(z):
        def inner(z):
            return z + a

        return inner(z)

    return outer


def recursive(last):
    def function(z, n=3):
        return last * z if n == 0 else function(z, n - 1)

    return function


def custom(slope):
    @jax.custom_jvp
    def function(z):
        return jnp.tanh(z)

    @function.defjvp
    def _(point, tangent):
        return jnp.tanh(point[0]), slope * tangent[0]

    return function


def global_table(a):
    TABLE[1] = a
    return reads_table


def reads_table(z):
    return TABLE[1] * z


def power(n):
    return (lambda z: z**2, lambda z: z**3)[n - 2]  # on one line


def held(value):
    return lambda z, value=value: z


PAIRS = {
    "closure": (make, 1.0, 3.0),
    "two lambdas on one line": (power, 2, 3),
    "default argument": (with_default, 1.0, 2.0),
    "keyword default": (keyword, 1.0, 2.0),
    "nested function": (nested, 1.0, 2.0),
    "recursion": (recursive, 1.0, 2.0),
    "derivative": (custom, 1.0, 2.0),
    "partial": (lambda a: functools.partial(jax.nn.gelu, approximate=a), True, False),
    "module with an array": (lambda a: Act(jnp.asarray(a)), 1.0, 2.0),
    "instance": (Linear, 1.0, 2.0),
    "bound method": (lambda a: Linear(a).slope, 1.0, 2.0),
    "class hierarchy": (lambda cls: cls(1.0), Linear, Bent),
    "jit": (lambda a: jax.jit(make(a)), 1.0, 2.0),
    "vectorize": (lambda a: jnp.vectorize(make(a)), 1.0, 2.0),
    "grad of a jitted partial": (lambda a: jax.grad(jax.jit(functools.partial(pow, exp=a))), 2, 3),
    "global array that changed": (global_table, 1.0, 2.0),
    "dtype": (held, np.zeros(2, "f4"), np.zeros(2, "i4")),
    "shape": (held, np.zeros((2, 3)), np.zeros((3, 2))),
    "NaN": (held, np.asarray([np.nan, 1.0]), np.asarray([np.nan, 2.0])),
    "int and float": (held, 1, 1.0),
    "signed zero": (held, 0.0, -0.0),
    "set": (held, {"a", "b", 1}, {"a", "b", 2}),
    "objects": (held, np.asarray(["a", 1], object), np.asarray(["a", 2], object)),
    "library functions": (held, jnp.tanh, jnp.sinh),
    "ufuncs": (held, np.tanh, np.sinh),
    "builtins": (held, max, min),
    "ends of a flow": (held, sj.Time(1.0), sj.Time(2.0)),
    "keys": (held, jax.random.key(0), jax.random.key(1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_functions_are_told_apart_by_what_they_compute(name):
    make, first, second = PAIRS[name]
    one, again, other = (identify("measure", make(value)) for value in (first, first, second))
    assert one == again != other


def test_descriptions_are_the_same_in_every_process_and_wherever_the_code_stands(tmp_path):
    found = []
    for seed, lines in (("1", ""), ("2", "\n\n\n")):
        script = tmp_path / f"script_{seed}.py"
        show = "\nfor name, (build, first, _) in PAIRS.items():\n    print(name, identify('measure', build(first)))\n"
        script.write_text(lines + Path(__file__).read_text() + show)
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1] and len(found[0].splitlines()) == len(PAIRS)


def test_library_functions_go_by_their_names():
    assert identify("activation", sj.ACTIVATIONS["tanh"]) == "tanh"
    assert identify("loss", sj.mse) == "saddlejax.losses.mse"
    assert identify("activation", jnp.sinh) == "jax.numpy.sinh"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (held(threading.Lock()), "an object of the class lock, by way of default arguments"),
        (held(n for n in range(3)), "an object of the class generator"),
        (lambda z: eval("z"), r"eval\(\)"),
        (held(sys.modules[__name__]), f"the module {__name__} as a whole"),
    ],
    ids=["lock", "generator", "eval", "module"],
)
def test_what_cannot_be_described_is_refused_where_there_is_a_store(tmp_path, function, words):
    grid = {**GRID, "measure": {"one": function}}
    with pytest.raises(
        ValueError, match=rf"measure\['one'\] must be a function whose whole state .* {words}.* leave store out"
    ):
        sj.sweep(LINE, **grid, store=tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


def loss_at(gain):
    """The loss at t = 5 by the single call."""
    net = sj.scale_layers(sj.MLP([2, 2, 1], make(gain), key=jax.random.key(0)), 0.1)
    return sj.gradient_flow(net, LINE, sj.Time(5.0), save=sj.Save(steps=False)).losses[-1]


def test_a_store_refuses_another_closure_and_goes_on_with_an_equal_one(tmp_path):
    first = sj.sweep(LINE, **GRID, activation=make(1.0), store=tmp_path / "a.zarr")
    np.testing.assert_allclose(first.final_loss.item(), loss_at(1.0), rtol=1e-10)
    with pytest.raises(ValueError, match=r"grid\.activation: \['make\.<locals>\.<lambda>"):
        sj.sweep(LINE, **GRID, activation=make(3.0), store=tmp_path / "a.zarr")
    other = sj.sweep(LINE, **GRID, activation=make(3.0), store=tmp_path / "b.zarr")
    np.testing.assert_allclose(other.final_loss.item(), loss_at(3.0), rtol=1e-10)
    assert first.final_loss.item() > 10 * other.final_loss.item()
    seen = []
    sj.sweep(LINE, **GRID, activation=make(1.0), store=tmp_path / "a.zarr", on_progress=seen.append)
    assert [progress.kept for progress in seen] == [1]


def scaled(z):
    return jnp.tanh(GAIN * z)


def test_a_global_value_that_changed_is_compiled_anew(tmp_path, monkeypatch):
    """JAX alone would take the program of the same function from before."""
    for name, gain in (("a", 1.0), ("b", 3.0)):
        monkeypatch.setitem(globals(), "GAIN", gain)
        found = sj.sweep(LINE, **GRID, activation=scaled, store=tmp_path / name)
        np.testing.assert_allclose(found.final_loss.item(), loss_at(gain), rtol=1e-10)


def weighted(weight):
    return lambda prediction, target: weight * jnp.sum(jnp.square(prediction - target))


class Stop(Exception):
    """Raised before anything is computed."""


def begin(store, task=LINE, **changed):
    """Lay out a store, or have it checked, without computing."""

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        sj.sweep(task, **{**GRID, "activation": "identity", **changed}, store=store, on_progress=stop)


class Late(sj.Time):
    """An end of one's own, told apart by its code."""

    def describe(self):
        return "late"


def test_losses_measures_solvers_and_ends_are_told_apart(tmp_path):
    numbers = itertools.count()

    def differ(first, second, words):
        store = tmp_path / f"{next(numbers)}.zarr"
        begin(store, **first)
        begin(store, **first)
        with pytest.raises(ValueError, match=words):
            begin(store, **second)

    losses = [sj.Task(LINE.x, LINE.y, weighted(weight)) for weight in (1.0, 2.0)]
    differ({"task": losses[0]}, {"task": losses[1]}, r"task\.loss: weighted")
    measures = [{"measure": {"one": lambda flow, a=a: a * flow.losses[-1]}} for a in (1.0, 2.0)]
    differ(*measures, r"measure\.one: ")
    differ({"until": Late(1.0)}, {"until": Late(2.0)}, "until: late")


def test_a_store_of_version_0_1_is_refused_in_words(tmp_path):
    store = tmp_path / "a.zarr"
    begin(store)
    metadata = store / "zarr.json"
    metadata.write_text(metadata.read_text().replace("saddlejax_sweep_format", "another_name"))
    with pytest.raises(ValueError, match=r"was written by saddlejax .* Read it with xarray\.open_zarr"):
        sj.sweep(LINE, **GRID, store=store)
