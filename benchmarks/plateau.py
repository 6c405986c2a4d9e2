"""What one escape costs, and how right its time is, against the init scale.

    python benchmarks/plateau.py [--scales 1e-1 1e-2 1e-3 1e-4 1e-5 1e-6] [--depth 4] [--budget 20]

A tanh network on a single-index teacher (10 inputs, 100 samples, width 32) leaves the plateau of small weights; the escape
is where the loss falls to half of its value at zero weights. In one run:

- saddlejax with its defaults;
- gradient descent at 1/λ, λ the largest Hessian eigenvalue at the escape (above, up to 2/λ, it oscillates or diverges), in JAX with optax and, where
  installed, in PyTorch: `steps × learning rate` is its escape time;
- diffrax's Tsit5 in time t with an event; SciPy's LSODA and BDF; torchdiffeq's dopri5, where installed. Their absolute
  tolerance follows the init scale, without which they are wrong at small scales.

Errors are relative to saddlejax with Dopri8 at rtol 1e-10, which is itself compared with LSODA at 1e-10 for the largest
scale. Seconds are medians of three runs after compilation. A method that needs more than `--budget` seconds is not run at
smaller scales; gradient descent is then extrapolated, steps = time / learning rate, in brackets and on a dashed line.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.integrate import solve_ivp

import saddlejax as sj
from saddlejax.hessian import sharpness
from saddlejax.tasks.task import task_loss, zero_loss

try:
    import torch
    import torchdiffeq
except ImportError:
    torch = None

jax.config.update("jax_enable_x64", True)

RTOL = 1e-4
HALF = sj.Escape(loss_fraction=0.5)
SMALL = sj.Save(steps=False, singular_values=False)
REPEATS = 3


class Run(NamedTuple):
    """One method at one scale: the escape time it found, gradients or steps, seconds, and those of compilation."""

    time: float
    gradients: float
    seconds: float
    compilation: float
    extrapolated: bool = False


class Problem(NamedTuple):
    """A network at a scale, as arrays for every rival."""

    net: sj.MLP
    task: sj.Task
    half: float
    rate: float
    log_time: float
    scale: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument(
        "--budget", type=float, default=20, help="seconds a run may take before smaller scales are left out"
    )
    parser.add_argument("--json", default="plateau.json", help="file to write all numbers to")
    parser.add_argument("--figure", default="plateau.png", help="file to draw to")
    options = parser.parse_args()
    if torch is not None:
        torch.set_num_threads(os.cpu_count() or 1)
        torch.set_default_dtype(torch.float64)
    problems = [make(options, scale) for scale in sorted(options.scales, reverse=True)]
    print(f"reference against LSODA at 1e-10, ε = {problems[0].scale:g}: {check(problems[0]):.1e} relative")
    results: dict[str, dict[float, Run]] = {}
    for name, method in METHODS.items():
        results[name] = measure(name, method, problems, options.budget)
    Console(width=170).print(table(results, problems))
    with open(options.json, "w") as file:
        machine = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "jax": jax.__version__,
        }
        rows = {name: {f"{s:g}": run._asdict() for s, run in runs.items()} for name, runs in results.items()}
        json.dump({**machine, "runs": rows}, file, indent=1)
    figure(results, problems).savefig(options.figure, dpi=150)


def make(options: argparse.Namespace, scale: float) -> Problem:
    """The problem at a scale, with its reference time and the learning rate 1/λ."""
    task = sj.tasks.single_index(jnp.tanh, in_size=10, samples=options.samples, key=jax.random.key(1))
    sizes = [10, *[options.width] * (options.depth - 1), 1]
    net = sj.scale_layers(sj.MLP(sizes, "tanh", key=jax.random.key(0)), scale)
    flow = sj.gradient_flow(net, task, HALF, rtol=1e-10, solver=dfx.Dopri8(), save=SMALL)
    rate = 1 / float(sharpness(flow.net, task))
    return Problem(net, task, 0.5 * float(zero_loss(task)), rate, float(flow.log_escape_time), scale)


def measure(name: str, method: Callable, problems: list[Problem], budget: float) -> dict[float, Run]:
    """The method at every scale for which it is fast enough."""
    found: dict[float, Run] = {}
    spent, per_gradient = 0.0, 0.0
    for problem in track(problems, description=name):
        steps = np.exp(problem.log_time) / problem.rate
        descends = "descent" in name
        if spent > budget or (descends and per_gradient * steps > budget):
            if descends:
                found[problem.scale] = Run(np.exp(problem.log_time), steps, steps * per_gradient, 0.0, True)
            continue
        run = method(problem)
        if run is None:
            break
        found[problem.scale] = run
        spent, per_gradient = run.seconds, run.seconds / max(run.gradients, 1)
    return found


def timed(call: Callable, first: float) -> tuple[object, float]:
    """The result and the median seconds; a single run where the first took long."""
    seconds = []
    for _ in range(1 if first > 5 else REPEATS):
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
    return result, float(np.median(seconds))


def compiled(function: Callable, *arguments) -> tuple[Callable, float]:
    """A jitted function, compiled, and the seconds that took."""
    begin = time.perf_counter()
    executable = jax.jit(function).lower(*arguments).compile()
    return executable, time.perf_counter() - begin


def saddlejax(problem: Problem) -> Run:
    def escape(net):
        flow = sj.gradient_flow(net, problem.task, HALF, save=SMALL)
        return flow.log_escape_time, flow.stats["gradient_evaluations"]

    run, compilation = compiled(escape, problem.net)
    (log_time, gradients), seconds = timed(lambda: jax.block_until_ready(run(problem.net)), 0)
    return Run(float(np.exp(log_time)), int(gradients), seconds, compilation)


def optax_descent(problem: Problem) -> Run:
    optimiser = optax.sgd(problem.rate)

    def descend(net):
        def going(carry):
            return carry[3] > problem.half

        def step(carry):
            net, state, steps, loss, _ = carry
            value, slopes = jax.value_and_grad(lambda w: task_loss(net.with_weights(w), problem.task))(net.weights)
            updates, state = optimiser.update(slopes, state)
            return net.with_weights(optax.apply_updates(net.weights, updates)), state, steps + 1, value, loss

        return jax.lax.while_loop(going, step, (net, optimiser.init(net.weights), 0, jnp.inf, jnp.inf))[2:]

    run, compilation = compiled(descend, problem.net)
    begin = time.perf_counter()
    jax.block_until_ready(run(problem.net))
    first = time.perf_counter() - begin
    (steps, loss, before), seconds = timed(lambda: jax.block_until_ready(run(problem.net)), first)
    # The loss of the last gradient is below half, that before it was above: `steps − 2` steps and a part of one.
    part = float((before - problem.half) / (before - loss))
    return Run(problem.rate * (int(steps) - 2 + part), int(steps), seconds, compilation)


def torch_descent(problem: Problem) -> Run | None:
    if torch is None:
        return None
    x, y = torch.tensor(np.array(problem.task.x)), torch.tensor(np.array(problem.task.y))

    def descend():
        weights = [torch.tensor(np.array(w), requires_grad=True) for w in problem.net.weights]
        optimiser = torch.optim.SGD(weights, lr=problem.rate)
        before, steps = np.inf, 0
        while True:
            optimiser.zero_grad()
            loss = torch_loss(weights, x, y)
            value = loss.item()
            if value <= problem.half:
                return problem.rate * (steps - 1 + (before - problem.half) / (before - value)), steps
            loss.backward()
            optimiser.step()
            before, steps = value, steps + 1

    torch_loss([torch.tensor(np.array(w)) for w in problem.net.weights], x, y)  # starts its threads
    begin = time.perf_counter()
    descend()
    (found, steps), seconds = timed(descend, time.perf_counter() - begin)
    return Run(found, steps, seconds, 0.0)


def torch_loss(weights, x, y):
    h = x
    for w in weights[:-1]:
        h = torch.tanh(h @ w.T)
    return 0.5 * ((h @ weights[-1].T - y) ** 2).sum(dim=1).mean()


def diffrax_time(problem: Problem) -> Run:
    end = 2 * float(np.exp(problem.log_time))

    def escape(net):
        def velocity(t, weights, args):
            slopes = jax.grad(lambda w: task_loss(net.with_weights(w), problem.task))(weights)
            return tuple(-slope for slope in slopes)

        def above(t, y, args, **_):
            return task_loss(net.with_weights(y), problem.task) - problem.half

        solution = dfx.diffeqsolve(
            dfx.ODETerm(velocity),
            dfx.Tsit5(),
            0.0,
            end,
            None,
            net.weights,
            stepsize_controller=dfx.PIDController(rtol=RTOL, atol=RTOL * problem.scale),
            event=dfx.Event(above, root_finder=optimistix.Newton(rtol=1e-9, atol=1e-9 * end)),
            max_steps=None,
            throw=False,
        )
        return solution.ts[-1], solution.stats["num_steps"]

    run, compilation = compiled(escape, problem.net)
    (found, steps), seconds = timed(lambda: jax.block_until_ready(run(problem.net)), 0)
    return Run(float(found), 6 * int(steps) + 1, seconds, compilation)


def scipy_method(name: str, rtol: float = RTOL) -> Callable[[Problem], Run]:
    def run(problem: Problem) -> Run:
        flat, unravel = ravel_pytree(problem.net.weights)
        loss = jax.jit(lambda v: task_loss(problem.net.with_weights(unravel(v)), problem.task))
        slope = jax.jit(jax.grad(lambda v: task_loss(problem.net.with_weights(unravel(v)), problem.task)))
        count = 0

        def velocity(t, v):
            nonlocal count
            count += 1
            return -np.asarray(slope(v))

        def above(t, v):
            return float(loss(v)) - problem.half

        above.terminal = True
        begin = time.perf_counter()
        velocity(0, np.asarray(flat)), above(0, np.asarray(flat))
        compilation = time.perf_counter() - begin
        end = 2 * np.exp(problem.log_time)
        options = {"rtol": rtol, "atol": rtol * problem.scale, "events": above}

        def solve():
            nonlocal count
            count = 0
            return solve_ivp(velocity, (0, end), np.asarray(flat), method=name, **options)

        begin = time.perf_counter()
        solve()
        done, seconds = timed(solve, time.perf_counter() - begin)
        reached = done.t_events[0]
        return Run(float(reached[0]) if len(reached) else np.nan, count, seconds, compilation)

    return run


def torchdiffeq_time(problem: Problem) -> Run | None:
    if torch is None:
        return None
    x, y = torch.tensor(np.array(problem.task.x)), torch.tensor(np.array(problem.task.y))
    start = tuple(torch.tensor(np.array(w)) for w in problem.net.weights)
    count = 0

    def velocity(t, weights):
        nonlocal count
        count += 1
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in weights]
            return tuple(-g for g in torch.autograd.grad(torch_loss(leaves, x, y), leaves))

    def above(t, weights):
        with torch.no_grad():
            return torch_loss(weights, x, y) - problem.half

    def solve():
        nonlocal count
        count = 0
        return torchdiffeq.odeint_event(
            velocity, start, torch.tensor(0.0), event_fn=above, method="dopri5", rtol=RTOL, atol=RTOL * problem.scale
        )[0]

    begin = time.perf_counter()
    solve()
    found, seconds = timed(solve, time.perf_counter() - begin)
    return Run(float(found), count, seconds, 0.0)


METHODS = {
    "saddlejax": saddlejax,
    "gradient descent, optax": optax_descent,
    "gradient descent, PyTorch": torch_descent,
    "diffrax Tsit5 in t": diffrax_time,
    "SciPy LSODA": scipy_method("LSODA"),
    "SciPy BDF": scipy_method("BDF"),
    "torchdiffeq dopri5": torchdiffeq_time,
}


def check(problem: Problem) -> float:
    """Relative difference of the reference from LSODA at a tight tolerance."""
    return abs(scipy_method("LSODA", 1e-10)(problem).time / np.exp(problem.log_time) - 1)


def table(results: dict[str, dict[float, Run]], problems: list[Problem]) -> Table:
    """Gradients, seconds, ratio of seconds to saddlejax's, and error, for every method and scale."""
    shown = Table(title="One escape: gradient evaluations | seconds (times saddlejax's) | relative error of the time")
    shown.add_column("method")
    shown.add_column("compile (s)", justify="right")
    for problem in problems:
        shown.add_column(f"ε = {problem.scale:g}", justify="right")
    for name, runs in results.items():
        cells = [cell(runs.get(p.scale), p, results["saddlejax"].get(p.scale)) for p in problems]
        first = next(iter(runs.values()), None)
        shown.add_row(name, f"{first.compilation:.1f}" if first else "not installed", *cells)
    return shown


def cell(run: Run | None, problem: Problem, ours: Run | None) -> str:
    if run is None or ours is None:
        return "–"
    ratio = run.seconds / ours.seconds
    if run.extrapolated:
        return f"({run.gradients:.0e}\n{run.seconds:.0e} s, ×{ratio:.0e})"
    error = abs(run.time / np.exp(problem.log_time) - 1)
    return f"{run.gradients:.0f}\n{run.seconds:.3g} s (×{ratio:.3g})\n{error:.0e}"


def figure(results: dict[str, dict[float, Run]], problems: list[Problem]):
    """Gradients, seconds and errors against the scale."""
    result, axes = plt.subplots(1, 3, figsize=(12.5, 3.8), layout="constrained")
    reference = {p.scale: np.exp(p.log_time) for p in problems}
    for i, (name, runs) in enumerate(results.items()):
        style = {"color": (*sj.plot.COLOURS, "0.4")[i % 7], "marker": (*sj.plot.MARKERS, "*")[i % 7]}
        style |= {"markersize": 4, "linewidth": 1.2}
        run = {scale: r for scale, r in runs.items() if not r.extrapolated}
        beyond = {scale: r for scale, r in runs.items() if scale <= min(run, default=0)}
        for ax, field in zip(axes, ("gradients", "seconds"), strict=False):
            ax.loglog(run.keys(), [getattr(r, field) for r in run.values()], label=name, **style)
            if len(beyond) > 1:
                ax.loglog(
                    beyond.keys(), [getattr(r, field) for r in beyond.values()], ls="--", **style | {"marker": ""}
                )
        errors = [max(abs(r.time / reference[scale] - 1), 1e-12) for scale, r in run.items()]
        axes[2].loglog(run.keys(), errors, **style)
    for ax, label in zip(axes, ("gradient evaluations", "seconds after compilation", "relative error"), strict=True):
        ax.invert_xaxis()
        ax.spines[["top", "right"]].set_visible(False)
        ax.set(xlabel=r"init scale $\varepsilon$", ylabel=label)
    axes[0].legend(frameon=False, fontsize="x-small")
    axes[0].set_title("dashed: extrapolated", fontsize="small", loc="left")
    return result


if __name__ == "__main__":
    main()
