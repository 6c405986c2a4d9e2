"""The commands, run as a user runs them, and the scan behind the main one."""

import csv
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import teacher
from typer.testing import CliRunner

import saddlejax as sj
from saddlejax.cli import app
from saddlejax.hessian import extreme_eigenvalues, sharpness


def run(*arguments, cwd):
    command = [sys.executable, "-m", "saddlejax", *arguments]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


def test_escape_writes_a_table_a_figure_and_the_numbers(tmp_path):
    options = ("--samples", "200", "--width", "8", "--depth", "3", "--activation", "tanh")
    grid = ("--bottleneck", "3", "--scale", "1e-3", "--scale", "1e-5", "--seeds", "2")
    done = run("escape", *options, *grid, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1.000" in done.stdout
    with open(tmp_path / "saddlejax-escape" / "escape_times.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(row["status"] == "escaped" for row in rows)
    assert all(abs(float(row["exponent"]) - 1) < 0.02 for row in rows)
    assert (tmp_path / "saddlejax-escape" / "escape_times.png").stat().st_size > 10_000


def strict_json(path):
    """What a file holds, which knows no NaN and no infinities."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_direction_writes_a_table_a_figure_and_the_numbers(tmp_path):
    # tanh, where the search is a closed form: that for ReLU is tested in test_saddle_direction.py.
    options = ("--activation", "tanh", "--width", "6", "--starts", "2", "--samples", "200")
    done = run("direction", "--depth", "2", "--depth", "3", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = strict_json(tmp_path / "saddlejax-direction" / "directions.json")
    assert kept["options"]["width"] == 6 and kept["versions"]["jax"] == jax.__version__
    kept = kept["directions"]
    assert [one["depth"] for one in kept] == [2, 3]
    assert kept[0]["speed"] == pytest.approx(kept[1]["speed"]) and kept[0]["speed"] > 0
    assert f"{kept[1]['speed']:.9f}" in done.stdout
    assert (tmp_path / "saddlejax-direction" / "directions.png").stat().st_size > 10_000


def test_staircase_writes_a_table_a_figure_and_the_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ("staircase", "--depth", "2", "--width", "4", "--scale", "1e-4", "--no-polish"))
    assert done.exit_code == 0, done.output
    kept = strict_json(tmp_path / "saddlejax-staircase" / "staircase.json")
    assert kept["options"]["scale"] == 1e-4 and kept["versions"]["jax"] == jax.__version__
    kept = kept["plateaus"]
    np.testing.assert_allclose([p["loss"] for p in kept], [10.625, 2.625, 0.625, 0.125], rtol=1e-2)
    assert kept[0]["log_start"] is None
    assert (tmp_path / "saddlejax-staircase" / "staircase.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("escape", "--data", "nowhere"), "no MNIST file"),
        (("escape", "--activation", "rello"), "activation must be one of"),
        (("escape", "--bottleneck", "9"), "bottleneck must be at most the depth"),
        (("escape", "--scale=-1"), "scale must be positive"),
        (("escape", "--samples", "5000"), "at most 1797"),
        (("direction", "--activation", "sigmoid", "--depth", "2"), "σ(0)"),
        (("staircase", "--layer", "9"), "layers must hold indices between 0 and 3"),
    ],
)
def test_bad_options_end_with_a_message_and_no_traceback(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert isinstance(done.exception, SystemExit)


def test_help_teaches(tmp_path):
    text = run("escape", "--help", cwd=tmp_path).stdout
    for words in ("Examples", "--bottleneck", "--scale", "log 1/ε"):
        assert words in text


def test_scan_agrees_with_single_flows():
    task = sj.tasks.load("digits", 200)  # shapes of the test of the command, which has compiled them
    results = sj.escape_scan(
        task, width=8, depth=3, activation=["tanh"], bottleneck=[2, 3], scale=[1e-2, 1e-4], seed=[0, 1]
    )
    assert dict(results.sizes) == {"activation": 1, "bottleneck": 2, "scale": 2, "seed": 2}
    for r in (2, 3):
        net = sj.MLP([64, 8, 8, 10], "tanh", key=jax.random.key(1))
        flow = sj.gradient_flow(sj.scale_layers(net, 1e-4, layers=tuple(range(r))), task)
        cell = results.sel(activation="tanh", bottleneck=r, scale=1e-4, seed=1)
        assert float(cell.log_escape_time) == pytest.approx(float(flow.log_escape_time), rel=1e-8)
        assert cell.gradient_evaluations == flow.stats["gradient_evaluations"]
        steps = float(flow.log_escape_time) + np.log(float(sharpness(flow.net, task)) / 2)
        assert float(cell.log_descent_steps) == pytest.approx(steps, abs=1e-6)
    figure = sj.plot.escape_times(results)
    assert "ε" in figure.get_xlabel() or "varepsilon" in figure.get_xlabel()
    exponents = results.exponent.sel(bottleneck=3, scale=1e-4)
    np.testing.assert_allclose(exponents, 1, atol=0.02)


def test_scan_refuses_empty_grids_and_too_many_layers():
    for change, words in (
        ({"seed": []}, "seed must be a list"),
        ({"activation": "tanh"}, "activation must be a list"),
        ({"bottleneck": [5]}, "bottleneck must be at most the depth, 4"),
        ({"scale": [0.0]}, "scale must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            sj.escape_scan(teacher(), **change)


def test_sharpness_is_the_largest_eigenvalue():
    task = teacher()
    net = sj.MLP([10, 6, 1], "tanh", key=jax.random.key(0))
    flat, unravel = jax.flatten_util.ravel_pytree(net.weights)

    def loss(weights):
        out = jax.vmap(net.with_weights(unravel(weights)))(task.x)
        return 0.5 * jnp.mean(jnp.sum((out - task.y) ** 2, axis=1))

    values = jnp.linalg.eigvalsh(jax.hessian(loss)(flat))
    assert float(sharpness(net, task)) == pytest.approx(float(values[-1]), rel=1e-4)


def test_extreme_eigenvalues_of_a_small_or_degenerate_matrix():
    diagonal = jnp.array([-2.0, 1.0, 1.0, 5.0])
    lowest, highest = extreme_eigenvalues(lambda v: diagonal * v, jnp.ones(4), 10)
    assert (float(lowest), float(highest)) == (pytest.approx(-2), pytest.approx(5))
    alone = extreme_eigenvalues(lambda v: 3 * v, jnp.ones(4), 4)
    np.testing.assert_allclose(alone, 3)


def test_flow_and_direction_figures_have_their_lines():
    flow = sj.gradient_flow(sj.scale_layers(sj.MLP([10, 6, 1], "tanh", key=jax.random.key(0)), 1e-2), teacher())
    axes = sj.plot.flow(flow)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), flow.losses[1:])
    assert axes.lines[1].get_xdata()[0] == pytest.approx(float(flow.log_escape_time) / np.log(10))
