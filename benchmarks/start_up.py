"""How long until the first result, and what does a scan over depths compile?

    python benchmarks/start_up.py [--repeats 3]

Every measurement is a process of its own, as a user starts one; medians of repeats in turn.

1. Import: saddlejax, against JAX alone, Equinox with diffrax, and PyTorch.
2. First result: one escape (tanh, depth 4, width 32, 100 samples, ε = 1e-3, until half of the loss) from the start of the process
   on, and a second one at another scale, by saddlejax, by diffrax's Tsit5 in time t, by SciPy's LSODA with a compiled JAX
   gradient, and by torchdiffeq; those that compile also with a warm persistent compilation cache of JAX.
3. Compilations of a scan over depths 2–6, scales and seeds: `sweep`, against a loop over `gradient_flow`, and a loop over diffrax
   in time t compiled once for each depth. Counted by JAX's own monitoring; large ones take more than a second.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

QUICK = {
    "repeats": 1,
    "width": 4,
    "samples": 10,
    "depths": [2],
    "imports": ["jax"],
    "rivals": ["saddlejax"],
    "scans": ["sweep"],
    "warm": False,
}
IMPORTS = {
    "saddlejax": "saddlejax",
    "jax": "jax",
    "equinox and diffrax": "equinox, diffrax",
    "PyTorch": "torch",
}
NEEDED = {"PyTorch": "torch", "torchdiffeq": "torchdiffeq"}
SECOND_SCALE = 1e-4

PROBLEM = """
import numpy as np
jax.config.update("jax_enable_x64", True)
task = sj.tasks.single_index(jnp.tanh, in_size=10, samples={samples}, key=jax.random.key(1))
def network(depth, scale, seed=0):
    return sj.scale_layers(sj.MLP([10, *[{width}] * (depth - 1), 1], "tanh", key=jax.random.key(seed)), scale)
"""

# The rivals of the first result: imports, preparation, and a function from a scale to an escape time. Those without saddlejax read the
# same data from a file.
RIVALS = {
    "saddlejax": (
        "import jax, jax.numpy as jnp, saddlejax as sj",
        PROBLEM
        + """
def escape(scale):
    return float(sj.gradient_flow(network(4, scale), task, sj.Escape(loss_fraction=0.5)).escape_time)
""",
    ),
    "diffrax in t": (
        "import jax, jax.numpy as jnp, diffrax, optimistix, numpy as np",
        """
jax.config.update("jax_enable_x64", True)
data = np.load({data!r})
x, targets = jnp.asarray(data["x"]), jnp.asarray(data["y"])
def loss(weights):
    h = x
    for w in weights[:-1]:
        h = jnp.tanh(h @ w.T)
    return 0.5 * jnp.mean(jnp.sum((h @ weights[-1].T - targets) ** 2, axis=1))
def velocity(t, weights, args):
    return jax.tree.map(jnp.negative, jax.grad(loss)(weights))
def above(t, y, args, **_):
    return loss(y) - 0.25 * jnp.mean(jnp.sum(targets**2, axis=1))
@jax.jit
def solve(weights, atol):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(velocity), diffrax.Tsit5(), 0.0, 1e30, None, weights, max_steps=100_000,
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=atol),
        event=diffrax.Event(above, root_finder=optimistix.Newton(rtol=1e-6, atol=1e-6)), throw=False,
    ).ts[-1]
def escape(scale):
    weights = tuple(scale * jnp.asarray(data[f"w{{i}}"]) for i in range(4))
    return float(solve(weights, 1e-4 * scale))
""",
    ),
    "SciPy LSODA": (
        "import jax, jax.numpy as jnp, numpy as np; from scipy.integrate import solve_ivp",
        """
jax.config.update("jax_enable_x64", True)
data = np.load({data!r})
x, y = jnp.asarray(data["x"]), jnp.asarray(data["y"])
shapes = [data[f"w{{i}}"].shape for i in range(4)]
cuts = np.cumsum([a * b for a, b in shapes])[:-1]
def loss(flat):
    weights = [part.reshape(shape) for part, shape in zip(jnp.split(flat, cuts), shapes)]
    h = x
    for w in weights[:-1]:
        h = jnp.tanh(h @ w.T)
    return 0.5 * jnp.mean(jnp.sum((h @ weights[-1].T - y) ** 2, axis=1))
value, slope = jax.jit(loss), jax.jit(jax.grad(loss))
half = 0.25 * float(np.mean(np.sum(data["y"]**2, axis=1)))
def above(t, flat):
    return float(value(flat)) - half
above.terminal = True
def escape(scale):
    start = scale * np.concatenate([data[f"w{{i}}"].ravel() for i in range(4)])
    options = dict(method="LSODA", rtol=1e-4, atol=1e-4 * scale, events=above)
    return float(solve_ivp(lambda t, v: -np.asarray(slope(v)), (0, 1e30), start, **options).t_events[0][0])
""",
    ),
    "torchdiffeq": (
        "import numpy as np, torch; from torchdiffeq import odeint_event",
        """
torch.set_default_dtype(torch.float64)
torch.set_num_threads({threads})
data = np.load({data!r})
x, y = torch.tensor(data["x"]), torch.tensor(data["y"])
def loss(weights):
    h = x
    for w in weights[:-1]:
        h = torch.tanh(h @ w.T)
    return 0.5 * ((h @ weights[-1].T - y) ** 2).sum(dim=1).mean()
def velocity(t, weights):
    with torch.enable_grad():
        leaves = [w.detach().requires_grad_() for w in weights]
        return tuple(-g for g in torch.autograd.grad(loss(leaves), leaves))
def above(t, weights):
    with torch.no_grad():
        return loss(weights) - 0.25 * (y**2).sum(dim=1).mean()
def escape(scale):
    start = tuple(scale * torch.tensor(data[f"w{{i}}"]) for i in range(4))
    options = dict(event_fn=above, method="dopri5", rtol=1e-4, atol=1e-4 * scale)
    return float(odeint_event(velocity, start, torch.tensor(0.0), **options)[0])
""",
    ),
}

FIRST = """
import time; began = time.perf_counter()
{imports}
imported = time.perf_counter()
{body}
times = [escape(1e-3)]
first = time.perf_counter()
times.append(escape({second}))
second = time.perf_counter()
import json
print(json.dumps({{"import": imported - began, "first": first - imported, "second": second - first, "times": times}}))
"""

SCANS = {
    "sweep": """
def scan(scales, seeds):
    options = dict(width={width}, depth=depths, activation="tanh", scale=scales, seed=seeds)
    return np.ravel(sj.sweep(task, until=sj.Escape(loss_fraction=0.5), **options).log_escape_time)
""",
    "loop over gradient_flow": """
def scan(scales, seeds):
    half = sj.Escape(loss_fraction=0.5)
    lanes = [(d, e, s) for d in depths for e in scales for s in seeds]
    return np.array([float(sj.gradient_flow(network(*lane), task, half).log_escape_time) for lane in lanes])
""",
    "loop over jit(diffrax in t)": """
import diffrax, optimistix
from saddlejax.objective import task_loss
from saddlejax.tasks.task import zero_loss
@jax.jit
def solve(net, atol):
    loss = lambda w: task_loss(net.with_weights(w), task)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, w, args: jax.tree.map(jnp.negative, jax.grad(loss)(w))),
        diffrax.Tsit5(), 0.0, 1e30, None, net.weights, max_steps=100_000, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=atol),
        event=diffrax.Event(lambda t, y, args, **_: loss(y) - 0.5 * zero_loss(task), optimistix.Newton(1e-6, 1e-6)),
    ).ts[-1]
def scan(scales, seeds):
    lanes = [(d, e, s) for d in depths for e in scales for s in seeds]
    return np.log([float(solve(network(*lane), 1e-4 * lane[1])) for lane in lanes])
""",
}

COUNTED = """
import time
import jax, jax.numpy as jnp, saddlejax as sj
compiled = []
def listen(name, seconds, **_):
    if name == "/jax/core/compile/backend_compile_duration":
        compiled.append(seconds)
jax.monitoring.register_event_duration_secs_listener(listen)
{problem}
depths = {depths}
{scan}
import json
for scales, seeds in (([1e-1, 1e-2, 1e-3], [0, 1]), ([1e-2, 1e-3, 1e-4], [2, 3])):
    compiled.clear()
    began = time.perf_counter()
    found = scan(scales, seeds)
    seconds = time.perf_counter() - began
    large = sum(s > 1 for s in compiled)
    print(json.dumps({{"seconds": seconds, "compilations": len(compiled), "large": large, "compiling": sum(compiled),
        "lanes": found.size, "median_log_time": float(np.nanmedian(found))}}))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "start_up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--imports", nargs="+", choices=IMPORTS, default=list(IMPORTS))
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--scans", nargs="+", choices=SCANS, default=list(SCANS))
    parser.add_argument("--warm", action=argparse.BooleanOptionalAction, default=True, help="also with a warm cache")
    options = common.parse(parser, arguments, QUICK)
    left_out = {name for name, package in NEEDED.items() if importlib.util.find_spec(package) is None}
    for name in left_out:
        common.missing(NEEDED[name], name)
    imports = import_times(options, left_out)
    first = first_results(options, left_out)
    scans = compilations(options)
    numbers = {"imports": imports, "first_results": first, "scans": scans}
    common.save(options, [imports_table(imports), first_table(first), scans_table(scans)], numbers, figure(first))


def child(code: str, cache: Path | None = None) -> list[str]:
    """The lines a fresh process prints; only with the compilation cache given, if any."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(common.ROOT), environment.get("PYTHONPATH", "")])
    if cache is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"A measured process failed:\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()


def import_times(options: argparse.Namespace, left_out: set[str]) -> dict[str, list[float]]:
    """Seconds of every repeat; the first round, which fills the disk's cache, does not count."""
    names = [name for name in options.imports if name not in left_out]
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in track(range(options.repeats + 1), description="imports"):
        for name in names:
            code = f"import time; t = time.perf_counter(); import {IMPORTS[name]}; print(time.perf_counter() - t)"
            seconds = float(child(code)[0])
            if turn:
                found[name].append(seconds)
    return found


def first_results(options: argparse.Namespace, left_out: set[str]) -> dict[str, dict[str, Any]]:
    """Medians of import, first and second result, and the escape times found."""
    result: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = {"width": options.width, "samples": options.samples, "threads": options.threads}
        settings["data"] = write_data(Path(folder), options)
        for name in track([name for name in options.rivals if name not in left_out], description="first results"):
            imports, body = RIVALS[name]
            code = FIRST.format(imports=imports, body=body.format(**settings), second=SECOND_SCALE)
            result[name] = medians([json.loads(child(code)[0]) for _ in range(options.repeats)])
            if options.warm and "jax" in imports:
                cache = Path(folder) / name
                child(code, cache)
                runs = [json.loads(child(code, cache)[0]) for _ in range(options.repeats)]
                result[f"{name}, warm cache"] = medians(runs)
    return result


def write_data(folder: Path, options: argparse.Namespace) -> str:
    """The problem as arrays, for rivals without saddlejax; written by a process of its own."""
    path = str(folder / "problem.npz")
    code = "import jax, jax.numpy as jnp, saddlejax as sj" + PROBLEM.format(**vars(options))
    code += "weights = {f'w{i}': np.asarray(w) for i, w in enumerate(network(4, 1.0).weights)}\n"
    child(code + f"np.savez({path!r}, x=np.asarray(task.x), y=np.asarray(task.y), **weights)")
    return path


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **{part: float(np.median([run[part] for run in runs])) for part in ("import", "first", "second")},
        "times": runs[0]["times"],
    }


def compilations(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Of every way to scan: what its first call compiles, and a second one with other scales and seeds."""
    found = {}
    problem = PROBLEM.format(**vars(options))
    for name in track(options.scans, description="scans"):
        code = COUNTED.format(problem=problem, scan=SCANS[name].format(**vars(options)), depths=options.depths)
        found[name] = [json.loads(line) for line in child(code)]
    return found


def imports_table(imports: dict[str, list[float]]) -> common.Table:
    base = np.median(imports["jax"])
    rows = [
        [name, f"{np.median(seconds):.2f}", f"{np.median(seconds) / base:.2f}"] for name, seconds in imports.items()
    ]
    return common.Table("Import in a fresh process", ["package", "seconds", "against JAX alone"], rows)


def first_table(first: dict[str, dict[str, Any]]) -> common.Table:
    columns = [
        "method",
        "import (s)",
        "first result (s)",
        "together (s)",
        "against saddlejax",
        "second result (s)",
        "escape times",
    ]
    base = first["saddlejax"]["import"] + first["saddlejax"]["first"]
    rows = []
    for name, run in first.items():
        together = run["import"] + run["first"]
        seconds = [f"{run['import']:.2f}", f"{run['first']:.2f}", f"{together:.2f}", f"{together / base:.2f}"]
        rows.append([name, *seconds, f"{run['second']:.3f}", ", ".join(f"{t:.5g}" for t in run["times"])])
    return common.Table("First escape of a process (ε = 1e-3), and a second at ε = 1e-4", columns, rows)


def scans_table(scans: dict[str, list[dict[str, Any]]]) -> common.Table:
    columns = [
        "scan",
        "flows",
        "compilations",
        "of them large",
        "compiling (s)",
        "seconds",
        "second scan: compilations",
        "seconds",
    ]
    rows = []
    for name, (first, second) in scans.items():
        counts = [f"{first[key]}" for key in ("lanes", "compilations", "large")]
        seconds = [f"{first['compiling']:.1f}", f"{first['seconds']:.1f}"]
        rows.append([name, *counts, *seconds, f"{second['compilations']}", f"{second['seconds']:.2f}"])
    return common.Table("A scan over depths, scales and seeds; then again with other scales and seeds", columns, rows)


def figure(first: dict[str, dict[str, Any]]) -> Figure:
    """Bars of import and first result."""
    result, ((ax,),) = common.axes(1, width=6.4, height=1.0 + 0.32 * len(first))
    names = list(first)[::-1]
    left = np.zeros(len(names))
    for i, (part, label) in enumerate((("import", "import"), ("first", "first result"), ("second", "second result"))):
        seconds = np.array([first[name][part] for name in names])
        hatch = ("", "", "///")[i]
        ax.barh(names, seconds, left=left, height=0.6, color=common.style(i)["color"], hatch=hatch, label=label)
        left += seconds
    ax.grid(False, axis="y")
    ax.set_xlabel("seconds since the start of the process")
    result.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return result


if __name__ == "__main__":
    main()
