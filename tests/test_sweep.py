"""Sweeps of flows and directions: every lane equals the single call, however it was computed."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from problems import HALF, teacher
from typer.testing import CliRunner

import saddlejax as sj
from saddlejax.cli import app
from saddlejax.sweeps.measures import Variable
from saddlejax.sweeps.problem import blank, common_output, record
from saddlejax.sweeps.refill import Resumable, refilled_map
from saddlejax.sweeps.spec_file import read_specification

TASK = teacher(samples=30)
GRID = {
    "width": 6,
    "depth": [2, 3, 4],
    "activation": ["tanh", "relu"],
    "bottleneck": [None, 2, 3],
    "scale": [3e-1, 1e-3],
    "seed": [0, 7],
    "until": HALF,
}


def top_singular_values(flow: sj.Flow):
    """The largest singular value of every layer at the end."""
    return jnp.stack([jnp.linalg.svd(w, compute_uv=False)[0] for w in flow.net.weights])


@pytest.fixture(scope="module")
def results():
    return sj.sweep(TASK, **GRID, measure={"top": top_singular_values})


@pytest.mark.parametrize(
    ("depth", "activation", "bottleneck", "scale", "seed"),
    [(2, "tanh", None, 1e-3, 7), (4, "tanh", 2, 1e-3, 0), (3, "relu", 3, 1e-3, 7)],
)
def test_every_lane_equals_the_single_flow(results, depth, activation, bottleneck, scale, seed):
    net = sj.MLP([10, *[6] * (depth - 1), 1], activation, key=jax.random.key(seed))
    net = sj.scale_layers(net, scale, None if bottleneck is None else range(bottleneck))
    flow = sj.gradient_flow(net, TASK, HALF, save=sj.Save(steps=False, singular_values=False))
    lane = results.sel(depth=depth, activation=activation, bottleneck=bottleneck or 0, scale=scale, seed=seed)
    assert lane.status == str(sj.Status[flow.status]) == "escaped"
    for name, value in {
        "log_escape_time": flow.log_escape_time,
        "log_time": flow.log_times[-1],
        "initial_loss": flow.losses[0],
        "final_loss": flow.losses[-1],
        "gradient_norm": flow.gradient_norms[-1],
        "imbalance_error": flow.imbalance_error,
        **flow.stats,
    }.items():
        np.testing.assert_allclose(lane[name], value, rtol=1e-8, atol=1e-8, err_msg=name)
    assert int(lane.layer_norms.notnull().sum()) == depth
    np.testing.assert_allclose(lane.layer_norms[:depth], flow.layer_norms[-1], rtol=1e-8)
    np.testing.assert_allclose(lane.top[:depth], top_singular_values(flow), rtol=1e-8)


def test_a_network_too_shallow_for_its_bottleneck_says_so(results):
    shallow = results.sel(depth=2, bottleneck=3)
    assert set(shallow.status.values.ravel()) == {"no such network: it has no more than 2 layers"}
    assert np.isnan(shallow.log_escape_time).all() and (shallow.steps == -1).all()
    rest = results.status.where((results.depth > 2) | (results.bottleneck < 3), "escaped")
    assert set(rest.values.ravel()) == {"escaped"}


def test_the_dataset_is_ready_to_use(results):
    assert results.log_escape_time.dims == ("activation", "depth", "bottleneck", "scale", "seed")
    assert "seed" in results.attrs["seed_convention"] and results.attrs["width"] == "6"
    assert results.attrs["until"] == "loss at 0.5 of its value at zero weights"
    assert "0.0001 for smooth" in results.attrs["rtol"] and "0.0002 where" in results.attrs["rtol"]
    assert results.top.attrs["long_name"] == "The largest singular value of every layer at the end."
    assert all(results[name].attrs["long_name"] for name in (*results.data_vars, "depth", "scale"))
    assert len(results.to_dataframe()) > 0


def test_a_refilled_batch_equals_one_lane_after_another(results):
    batched = sj.sweep(
        TASK, **{**GRID, "activation": "tanh", "depth": [2, 3, 4]}, measure={"top": top_singular_values}, batch=3
    )
    one_by_one = results.sel(activation=["tanh"])
    for name in one_by_one.data_vars:
        if name == "status":
            assert (batched.status == one_by_one.status).all()
        else:
            np.testing.assert_allclose(batched[name], one_by_one[name], rtol=1e-8, atol=1e-8, err_msg=name)


def recurrence(ratio):
    """`x ← ratio x + 1`, as often as a lane asks for."""

    def step(state):
        done, left, x = state
        return done + 1, left, ratio * x + 1

    def advance(plan, state):
        return jax.lax.fori_loop(0, 4, lambda _, s: jax.lax.cond(s[0] < s[1], step, lambda s: s, s), state)

    return Resumable(
        plan=lambda own: own,
        begin=lambda plan: (jnp.zeros((), int), plan["steps"], plan["first"]),
        advance=advance,
        running=lambda state: state[0] < state[1],
        finish=lambda plan, state: {"x": state[2], "plan": plan["first"]},
    )


def test_a_refilled_batch_keeps_its_slots_busy():
    """Loops of very different lengths, each a recurrence with a closed form."""
    steps = np.random.default_rng(0).geometric(0.03, 400)
    first, ratio = np.linspace(0, 1, 400), 0.9
    lanes = {"steps": jnp.asarray(steps), "first": jnp.asarray(first)}
    run = jax.jit(lambda count: refilled_map(recurrence(ratio), lanes, count, 16))
    want = first * ratio**steps + (1 - ratio**steps) / (1 - ratio)
    chunks = -(-steps // 4)
    for count in (400, 7):
        done = run(jnp.asarray(count))
        np.testing.assert_allclose(done.results["x"][:count], want[:count], rtol=1e-10)
        np.testing.assert_array_equal(done.results["plan"][:count], first[:count])
        np.testing.assert_array_equal(done.results["x"][count:], 0)  # as they were, never written
        assert int(done.busy) == chunks[:count].sum()
    assert chunks.sum() / (16 * int(run(jnp.asarray(400)).chunks)) > 0.85


def test_lanes_that_have_nothing_to_do_end_at_once():
    lanes = {"steps": jnp.asarray([0, 3, 0, 0, 5]), "first": jnp.arange(5.0)}
    done = jax.jit(lambda: refilled_map(recurrence(1.0), lanes, jnp.asarray(5), 2))()
    np.testing.assert_array_equal(done.results["x"], [0, 4, 2, 3, 9])


def test_single_precision_one_layer_and_lists_of_other_arguments():
    grid = {"width": [3], "depth": [1, 2], "seed": 3, "dtype": ["float32", "float64"]}
    found = sj.sweep(TASK, **grid, activation="identity", until=[sj.Time(2.0), sj.Time(5.0)])
    assert set(found.status.values.ravel()) == {"time reached"}
    for dtype, depth in (("float32", 2), ("float64", 1)):
        net = sj.MLP([10, *[3] * (depth - 1), 1], "identity", key=jax.random.key(3), dtype=dtype)
        flow = sj.gradient_flow(net, TASK.astype(dtype), sj.Time(5.0))
        lane = found.sel(width=3, depth=depth, dtype=dtype, seed=3).isel(until=1, scale=0)
        np.testing.assert_allclose(lane.final_loss.item(), flow.losses[-1], rtol=1e-4 if dtype == "float32" else 1e-8)
    assert not np.allclose(found.final_loss.isel(until=0), found.final_loss.isel(until=1))


def test_directions_equal_single_calls_and_failures_are_recorded():
    found = sj.sweep(
        TASK, of=sj.escape_direction, width=4, depth=[2, 3], activation=["tanh", "sigmoid"], seed=1, starts=2
    )
    best = sj.escape_direction(TASK, [10, 4, 4, 1], "tanh", starts=2, key=jax.random.key(1))
    lane = found.sel(activation="tanh", depth=3, seed=1)
    assert lane.status == "found"
    np.testing.assert_allclose(lane.speed, best.speed, rtol=1e-10)
    # The layers have rank one: the inverse margins are rounding.
    np.testing.assert_allclose(1 / lane.low_rank_margin, 1 / sj.low_rank_margin(best.weights), atol=1e-8)
    assert all("failed: ValueError" in str(one) for one in found.status.sel(activation="sigmoid").values.ravel())


def test_a_dask_cluster_that_loses_a_worker_ends_with_the_same_results(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    grid = {"width": 3, "depth": 2, "activation": "tanh", "scale": 0.5, "seed": range(16), "until": sj.Time(1.0)}
    alone = sj.sweep(TASK, **grid)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        killed = []

        def kill_one_half_way(progress):
            if progress.done >= 8 and not killed:
                killed.append(next(iter(client.run(os.getpid).values())))
                os.kill(killed[0], signal.SIGKILL)

        shared = sj.sweep(
            TASK,
            **grid,
            store=tmp_path / "a.zarr",
            block=1,
            executor=client.get_executor(),
            on_progress=kill_one_half_way,
        )
    assert killed
    # The same program with the same inputs on the same machine: equal to the last bit.
    xr.testing.assert_equal(shared, alone)


SPECIFICATION = """
[task]
samples = 40
[grid]
width = 3
depth = 2
activation = "identity"
scale = {from = 1e-1, to = 1e-3, count = 3}
seed = {count = 2}
[flow]
until = {time = 1.0}
"""


def test_the_command_runs_a_file_and_goes_on_with_it(tmp_path):
    file = tmp_path / "spec.toml"
    file.write_text(SPECIFICATION)
    done = CliRunner().invoke(app, ["sweep", str(file)])
    assert done.exit_code == 0, done.output
    assert "6  time reached" in done.output
    with xr.open_zarr(tmp_path / "spec.zarr", consolidated=False) as stored:
        assert stored.scale.values.tolist() == [0.1, 0.01, 0.001]
        assert (stored.status == "time reached").all()
    again = CliRunner().invoke(app, ["sweep", str(file)])
    assert "6 kept" in again.output
    file.write_text(SPECIFICATION.replace("time = 1.0", "time = 2.0"))
    other = CliRunner().invoke(app, ["sweep", str(file)])
    assert other.exit_code == 2
    assert "until: time 1.0 in the store, time 2.0 asked for" in " ".join(other.output.split())
    file.write_text(SPECIFICATION.replace("width = 3", "breadth = 3"))
    assert "[grid] in" in " ".join(CliRunner().invoke(app, ["sweep", str(file)]).output.split())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("depth = 2", "", "must hold depth"),
        ("depth = 2", "depht = 2", "but it has 'depht'"),
        ("[flow]", "[flows]", "but it has 'flows'"),
        ("{time = 1.0}", "'never'", "until must be"),
        ("{count = 2}", "{counts = 2}", "seed must be"),
        ("width = 3", "width = [", "must be a TOML file"),
        ("samples = 40", "samples = 4000", "at most 1797"),
    ],
)
def test_files_with_mistakes_say_what_they_are(tmp_path, old, new, words):
    file = tmp_path / "spec.toml"
    file.write_text(SPECIFICATION.replace(old, new))
    with pytest.raises(ValueError, match=words):
        read_specification(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": []}, "depth must hold at least one value"),
        ({"depth": [2, 2]}, "depth must name each value once"),
        ({"depth": 0}, "depth must be a whole number"),
        ({"bottleneck": 4}, "bottleneck must choose among the 3 layers"),
        ({"scale": [1e-1, -1.0]}, "scale must be positive"),
        ({"scale": "0.1"}, "scale must be a positive number"),
        ({"activation": "rello"}, "activation must be one of"),
        ({"until": 3.0}, "until must be"),
        ({"seed": [0.5]}, "seed must be a whole number"),
        ({"measure": {"final_loss": len}}, "measure must name new"),
        ({"measure": [len]}, "measure must be a dictionary"),
        ({"of": len}, "of must be saddlejax.gradient_flow"),
        ({"task": None}, "task must be a saddlejax.Task"),
        ({"rtol": [None, 1e-3]}, "rtol must be a number, a list"),
        ({"block": 0}, "block must be a whole number"),
        ({"of": sj.escape_direction, "scale": 1e-2}, "scale and bottleneck must be left out"),
    ],
)
def test_grids_that_make_no_sense_are_refused(change, words):
    arguments = {"task": TASK, "width": 4, "depth": 3, **change}
    with pytest.raises(ValueError, match=words):
        sj.sweep(arguments.pop("task"), **arguments)


def test_measurements_of_several_shapes_have_room_for_all():
    def room(*found):
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in found]
        return common_output("one", Variable(len, "of all"), shapes)[:2]

    assert room(((), "int32"), ((), "int32")) == ((), "int32")
    assert room(((2, 5), "float32"), ((3, 4), "float32")) == ((3, 5), "float32")
    assert room(((2,), "int32"), ((3,), "int32")) == ((3,), "float64")  # to be filled up with NaN
    with pytest.raises(ValueError, match=r"measure\['one'\] must return an array with the same number of axes"):
        room(((2,), "int32"), ((2, 1), "int32"))
    values = blank({"one": common_output("one", Variable(len, "of all"), [jax.ShapeDtypeStruct((3,), float)])}, 2)
    record(values, 1, {"one": np.asarray([1.0, 2.0]), "status": "found"})
    np.testing.assert_array_equal(values["one"], [[np.nan] * 3, [1, 2, np.nan]])


def test_a_measure_that_looks_at_values_is_refused_in_words():
    def brief(flow):
        return 1.0 if flow.losses[-1] < 0.5 else 0.0

    for measure in (brief, lambda flow: float(flow.losses[-1]), lambda flow: np.log(np.asarray(flow.losses))):
        with pytest.raises(
            ValueError, match=r"measure\['short'\] must be a function that JAX can trace, but it looks at"
        ):
            sj.sweep(TASK, width=3, depth=2, activation="identity", measure={"short": measure})


def test_exponents_of_a_sweep_are_the_slopes_of_its_times(results):
    """Of times made by the law: `τ = K ε^{−(r−2)}` has the exponent r − 2 at every scale."""
    scale = np.asarray([1e-1, 1e-2, 1e-3])
    small = np.asarray([3, 4])
    logs = 0.3 - (small[:, None, None] - 2) * np.log(scale)[:, None] + np.asarray([0.0, 1.0])
    dims = ("activation", "depth", "bottleneck", "scale", "seed")
    law = xr.Dataset(
        {"log_escape_time": (dims, logs[None, None])},
        {"activation": ["tanh"], "depth": [5], "bottleneck": small, "scale": scale, "seed": [0, 1]},
    )
    drawn = [line for line in sj.plot.exponents(law).lines if len(line.get_xdata()) == 2 and line.get_marker() != "_"]
    curves = [line for line in drawn if line.get_xdata()[0] != 0]
    for line, r in zip(curves, small, strict=True):
        np.testing.assert_allclose(line.get_xdata(), [10**-1.5, 10**-2.5])
        np.testing.assert_allclose(line.get_ydata(), [r - 2, r - 2])
    assert len(sj.plot.exponents(results, activation="relu").containers) == 8  # no three small layers of two
    with pytest.raises(ValueError, match="two scales at least"):
        sj.plot.exponents(results.isel(scale=[0]))


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match=r"no argument 'learning_rate'; it takes width, .* scale"):
        sj.sweep(TASK, width=4, depth=3, learning_rate=0.1)


def test_a_store_knows_activations_by_their_code(tmp_path):
    task = sj.Task(np.ones((3, 2)), np.ones((3, 1)))
    grid = {"width": 2, "depth": 2, "scale": 0.1, "until": sj.Time(1e-3), "store": tmp_path / "a.zarr"}
    sj.sweep(task, activation=lambda z: z + 0.1 * z**3, **grid)
    with pytest.raises(ValueError, match="activation"):
        sj.sweep(task, activation=lambda z: z - 0.1 * z**3, **grid)
