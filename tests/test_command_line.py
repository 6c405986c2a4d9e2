"""The commands, run as a user runs them, and the scan behind the main one."""

import csv
import json
import os
import re
import select
import signal
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
from saddlejax.curvature.lanczos import extreme_eigenvalues
from saddlejax.curvature.sharpness import sharpness


def run(*arguments, cwd, columns=100):
    command = [sys.executable, "-m", "saddlejax", *arguments]
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "dumb"}
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
    assert "closed form" in done.stdout and "random starts" not in done.stdout
    kept = strict_json(tmp_path / "saddlejax-direction" / "directions.json")
    assert kept["finished"] is True
    assert kept["options"]["width"] == 6 and kept["versions"]["jax"] == jax.__version__
    kept = kept["directions"]
    assert [one["depth"] for one in kept] == [2, 3]
    assert kept[0]["speed"] == pytest.approx(kept[1]["speed"]) and kept[0]["speed"] > 0
    speed = f"{kept[1]['speed']:.9f}"
    assert (
        done.stdout.count(f"{speed}  {speed}  {speed}") == 2
    )  # the speed, that of rank one, and the bound, at each depth
    assert (tmp_path / "saddlejax-direction" / "directions.png").stat().st_size > 10_000


def test_staircase_writes_a_table_a_figure_and_the_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ("staircase", "--depth", "2", "--width", "4", "--scale", "1e-4", "--no-polish"))
    assert done.exit_code == 0, done.output
    kept = strict_json(tmp_path / "saddlejax-staircase" / "staircase.json")
    assert kept["finished"] is True and kept["outcome"] == "loss reached"
    assert kept["options"]["scale"] == 1e-4 and kept["versions"]["jax"] == jax.__version__
    kept = kept["plateaus"]
    np.testing.assert_allclose([p["loss"] for p in kept], [10.625, 2.625, 0.625, 0.125], rtol=1e-2)
    assert kept[0]["log_start"] is None
    assert (tmp_path / "saddlejax-staircase" / "staircase.png").stat().st_size > 10_000


def test_staircase_says_where_there_was_no_plateau_and_where_the_loss_was_not_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("staircase", "--depth", "2", "--width", "4", "--no-polish")  # the program of the test above
    steep = CliRunner().invoke(app, (*options, "--scale", "3"))
    assert steep.exit_code == 0, steep.output
    assert "No plateaus" in steep.output and "bottleneck rank" not in steep.output
    short = CliRunner().invoke(app, (*options, "--scale", "1e-4", "--loss", "1e-40"))
    assert short.exit_code == 3, short.output
    kept = strict_json(tmp_path / "saddlejax-staircase" / "staircase.json")
    assert kept["finished"] is True and kept["outcome"] != "loss reached"
    assert kept["outcome"] in " ".join(short.output.split())


def test_escape_table_fits_eighty_columns_and_prints_no_number_without_meaning(tmp_path):
    options = ("--samples", "200", "--width", "8", "--depth", "3", "--activation", "sigmoid", "--activation", "tanh")
    grid = ("--bottleneck", "1", "--bottleneck", "3", "--scale", "2", "--scale", "1e-3", "--seeds", "2")
    done = run("escape", *options, *grid, cwd=tmp_path, columns=80)
    assert done.returncode == 3, done.stderr + done.stdout  # at scale 2 there is no plateau to escape from
    assert done.stderr == ""
    assert done.stdout.count("warning: The activation is 0.5 at zero") == 1
    rows = [line for line in done.stdout.splitlines() if re.match(r" (sigmoid|tanh) ", line)]
    assert [tuple(row.split()[:3]) for row in rows] == [
        (name, r, scale) for name in ("sigmoid", "tanh") for r in ("1", "3") for scale in ("2", "0.001")
    ]
    assert "…" not in "".join(rows)
    numbers = [row.split() for row in rows]
    assert all(
        row[4] == "–" and row[5] == "–" for row in numbers[:4]
    )  # exponent and law, where the origin is no saddle
    assert numbers[7][4].startswith("1.0") and numbers[7][7] == "1"  # 1.0… ± … beside the law
    words = " ".join(done.stdout.split())
    for letter in {row[-1].strip(",") for row in numbers if row[-1].isalpha()}:
        assert f"{letter}: " in words
    assert "did not escape: no plateau: nothing had to be waited for" in words


@pytest.mark.filterwarnings("default::UserWarning:saddlejax")
def test_errors_known_at_once_come_before_a_progress_bar(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, bar in (
        (("direction", "--activation", "sigmoid", "--depth", "2"), "0/1"),
        (("escape", "--bottleneck", "9"), "0/75"),
        (("staircase", "--rtol", "0"), "0/?"),
    ):
        done = CliRunner().invoke(app, options)
        assert done.exit_code == 2 and bar not in done.output, done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("escape", "--data", "nowhere"), "--data: no MNIST file"),
        (("escape", "--data", "nowhere.npz"), "--data: no file nowhere.npz"),
        (("staircase", "--rtol", "0"), "--rtol must be positive"),
        (("staircase", "--rtol", "0.5"), "--rtol must be below 0.333"),
        (("staircase", "--loss", "2"), "--loss must lie between 0 and 1"),
        (("staircase", "--scale", "0"), "--scale must be positive"),
        (("escape", "--activation", "rello"), "activation must be one of"),
        (("escape", "--bottleneck", "9"), "bottleneck must be at most the depth"),
        (("escape", "--scale=-1"), "scale must be positive"),
        (("escape", "--depth", "3", "--scale=-1"), "--scale must be positive"),  # and not: bottleneck
        (("escape", "--samples", "5000"), "at most 1797"),
        (("direction", "--activation", "sigmoid", "--depth", "2"), "σ(0)"),
        (("staircase", "--layer", "9"), "--layer must hold indices between 0 and 3"),
    ],
)
def test_bad_options_end_with_a_message_and_no_traceback(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert isinstance(done.exception, SystemExit)


def test_real_labels_are_refused_and_a_file_of_ones_own_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).normal(size=(20, 5)), np.random.default_rng(1).normal(size=20)
    np.savez("real.npz", x_train=x, y_train=y)
    done = CliRunner().invoke(app, ("direction", "--data", "real.npz", "--activation", "tanh", "--depth", "2"))
    words = " ".join(done.output.split())
    assert done.exit_code == 2 and "--data: real.npz must have labels that are whole numbers" in words
    assert "regression" in words

    np.savez("own.npz", x=x, y=y)
    options = ("direction", "--data", "own.npz", "--activation", "tanh", "--depth", "2", "--width", "3")
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    kept = strict_json(tmp_path / "saddlejax-direction" / "directions.json")
    # E[y xᵀ] has one row, of which the norm is the largest singular value.
    assert kept["directions"][0]["speed"] == pytest.approx(np.linalg.norm(y @ x / 20), rel=1e-6)


def stop_while_it_compiles(command, cwd, ready, silence=1.0):
    """Run a command, press Ctrl-C once it is ready and silent for a while; what it and JAX said, and its exit status."""
    environment = {
        **os.environ,
        "COLUMNS": "100",
        "TERM": "dumb",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "JAX_LOG_COMPILES": "1",
    }
    environment.pop("XLA_FLAGS")  # which make compilation fast
    with subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        said = b""
        while process.poll() is None:
            heard, _, _ = select.select([process.stdout], [], [], silence)
            if heard:
                said += os.read(process.stdout.fileno(), 65536)
            elif ready(said.decode(errors="replace")):
                process.send_signal(signal.SIGINT)
                break
        rest, _ = process.communicate(timeout=120)
    return (said + rest).decode(), process.returncode


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_a_command_and_keeps_what_is_finished(tmp_path):
    numbers = tmp_path / "kept" / "directions.json"
    options = ("--samples", "50", "--width", "2", "--starts", "1", "--depth", "2", "--depth", "4", "--out", "kept")
    command = [sys.executable, "-m", "saddlejax", "direction", *options]
    said, status = stop_while_it_compiles(command, tmp_path, lambda said: numbers.exists())
    assert status == 130, said
    assert "1 of 2 depths are finished and kept; for the others: --depth 4" in " ".join(said.split())
    kept = strict_json(numbers)
    assert kept["finished"] is False
    assert [one["depth"] for one in kept["directions"]] == [2]
    assert (tmp_path / "kept" / "directions.png").stat().st_size > 10_000


def _ready_and_compiling(said):
    # The last that JAX tells before it compiles a program; it is silent while it traces one, too.
    return "ready" in said and "MLIR" in said.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_in_a_python_call_ends_with_a_traceback_and_no_crash(tmp_path):
    script = """
import jax
import saddlejax as sj
jax.config.update("jax_enable_x64", True)
task = sj.tasks.digits()
print("ready", flush=True)
sj.escape_direction(task, [64, 4, 4, 4, 10], starts=2, key=jax.random.key(0))
print("the search ended before it could be interrupted")
"""
    said, status = stop_while_it_compiles([sys.executable, "-c", script], tmp_path, _ready_and_compiling)
    assert status == -signal.SIGINT, said
    assert "KeyboardInterrupt" in said and "Fatal" not in said


def test_help_teaches(tmp_path):
    text = run("escape", "--help", cwd=tmp_path).stdout
    for words in ("Examples", "--bottleneck", "--scale", "log 1/ε"):
        assert words in text


def test_scan_agrees_with_single_flows():
    task = sj.tasks.load("digits", 200)  # shapes of the test of the command, which has compiled them
    grid = {"activation": ["tanh"], "bottleneck": [2, 3], "scale": [1e-2, 1e-4], "seed": [0, 1]}
    so_far = []
    results = sj.escape_scan(task, width=8, depth=3, **grid, on_lane=so_far.append)
    assert [int((one.status == "not computed").sum()) for one in so_far] == list(range(8, -1, -1))
    assert all((np.isfinite(one.exponent) == (one.status == "escaped")).all() for one in so_far)
    assert so_far[-1].identical(results)
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
