"""What the benchmarks share: options, threads, timings, tables, and files that name the machine.

A script builds its parser with `parser`, reads it with `parse`, and ends with `save`. Its JSON file holds the command, the machine, the
options, the tables as printed (`benchmarks/page.py` puts them into the documentation) and all numbers.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from threadpoolctl import threadpool_limits

import saddlejax as sj

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("saddlejax", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "scipy", "torch", "torchdiffeq")
BUSY = 0.3
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
ONE = 1 if hasattr(os, "sched_setaffinity") else len(CORES)
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


class Table(NamedTuple):
    """A table as printed and as the documentation shows it; a newline in a cell begins a new line there."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(
        prog=f"benchmarks/{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    result.add_argument("--threads", type=int, default=ONE, help="threads for every rival")
    result.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="file to write all numbers to")
    result.add_argument("--figure", type=Path, default=RESULTS / f"{name}.png", help="file to draw to")
    return result


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: dict[str, Any]
) -> argparse.Namespace:
    """The options, with other defaults under `--quick`; sets the threads and says where timings are not to be trusted."""
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**quick)
    options = parser.parse_args(arguments)
    options.command = command(parser.prog, sys.argv[1:] if arguments is None else arguments)
    options.question = (parser.description or "").strip().partition("\n")[0]
    use_threads(options.threads)
    if LOAD > BUSY:
        Console().print(f"[yellow]This machine is busy (load {LOAD:.1f}): seconds will be too long, ratios rough.[/]")
    return options


def command(program: str, arguments: Sequence[str]) -> str:
    """The command that does the same, wherever it writes to."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--json", "--figure"):
            next(rest)
        elif not argument.startswith(("--json=", "--figure=")):
            kept.append(argument)
    return shlex.join(["python", program, *kept])


def use_threads(count: int) -> None:
    """As many threads for JAX, BLAS, OpenMP and PyTorch. JAX takes its own from the cores that the process may use."""
    if count < len(CORES):
        if not hasattr(os, "sched_setaffinity"):
            raise SystemExit("--threads needs an operating system that pins processes to cores, such as Linux.")
        os.sched_setaffinity(0, CORES[:count])
    threadpool_limits(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, versions, precision and date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "cpu": _cpu(),
        "device": jax.devices()[0].device_kind if jax.default_backend() != "cpu" else "cpu",
        "cores": len(CORES),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "dtype": "float64" if jax.config.jax_enable_x64 else "float32",
        "date": datetime.date.today().isoformat(),
        "load_before": LOAD,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def compiled(function: Callable, *arguments: Any) -> tuple[Callable, float]:
    """A function compiled for such arguments, and the seconds that took."""
    begin = time.perf_counter()
    executable = jax.jit(function).lower(*arguments).compile()
    return executable, time.perf_counter() - begin


def timed(call: Callable[[], Any], repeats: int = 5, enough: float = 5.0, warm_up: bool = True) -> tuple[Any, float]:
    """The result of a call and its median seconds, after one call to warm up; no more repeats once they took `enough`.

    JAX arrays in the result are waited for. Without `warm_up` the first call counts too: for what was compiled before and may be slow.
    """
    result = jax.block_until_ready(call()) if warm_up else None
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < enough:
        begin = time.perf_counter()
        result = jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return result, float(np.median(seconds))


def missing(package: str, rival: str) -> None:
    """Say that a rival is left out, and how to have it."""
    Console().print(f"[yellow]Without {rival}: it is not installed (pip install {package}).[/]")


def save(
    options: argparse.Namespace, tables: Sequence[Table], numbers: Any, figure: Figure | None, notes: Sequence[str] = ()
) -> None:
    """Print the tables and notes; write them with all numbers and the machine as JSON, and draw the figure."""
    console = Console(width=max(Console().width, 160))
    for table in tables:
        shown = rich.table.Table(title=table.title, title_justify="left")
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for note in notes:
        console.print(note)
    kept_apart = ("command", "question", "json", "figure")
    settings = {name: value for name, value in vars(options).items() if name not in kept_apart}
    record = {
        "question": options.question,
        "command": options.command,
        "machine": machine(options.threads),
        "options": settings,
        "tables": [table._asdict() for table in tables],
        "notes": list(notes),
        "numbers": numbers,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1, default=_as_plain, ensure_ascii=False) + "\n")
    files = [options.json]
    if figure is not None:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.figure, dpi=160)
        files.append(options.figure)
    console.print(f"written: {', '.join(map(str, files))}")


def _as_plain(value: Any) -> Any:
    """Arrays and their scalars as plain Python."""
    return np.asarray(value).tolist()


def number(value: float, digits: int = 2) -> str:
    """A positive number for a table: thousands with commas, very large and small ones as powers of ten."""
    if not np.isfinite(value):
        return "–"
    if value >= 1e6 or 0 < value < 1e-2:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.0f}" if value >= 10**digits else f"{value:.{digits}g}"


def power_law(x0: float, x1: float, x: float, y0: float, y1: float) -> float:
    """The power law through two points, at `x`; zero where they are."""
    return float(y1 * (y1 / y0) ** (np.log(x / x1) / np.log(x1 / x0))) if y0 > 0 else 0.0


def axes(
    columns: int, rows: int = 1, width: float = 4.2, height: float = 3.5, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure with quiet axes, as those of `saddlejax.plot`."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False, **options
    )
    for ax in grid.flat:
        quiet(ax)
    return figure, grid


def quiet(ax: Axes) -> Axes:
    """No frame above and right, a light grid below."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the rivals by number, told apart without colour too."""
    colours, markers = (*sj.plot.COLOURS, "0.35", "0.6"), (*sj.plot.MARKERS, "X", "*")
    return {"color": colours[number % len(colours)], "marker": markers[number % len(markers)]}
