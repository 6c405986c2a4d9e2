"""What does one escape cost, and how right is its time, against the init scale?

    python benchmarks/plateau.py [--scales 1e-1 1e-2 1e-3 1e-4 1e-5 1e-6] [--depth 4] [--budget 10]

A tanh network on a single-index teacher (10 inputs, 100 samples, width 32) leaves the plateau of small weights; the escape
is where the loss falls to half of its value at zero weights. In one run, with as many threads each:

- saddlejax with its defaults;
- full-batch gradient descent at its largest stable learning rate, in JAX (optax and `lax.scan`) and in PyTorch: of 2/λ, 1.9/λ,
  … 0.5/λ, with λ the sharpness at the escape, the largest with which the loss falls in every step. Its escape time is steps ×
  learning rate, so its error is that of the discretisation;
- diffrax's Tsit5 in time t with an event, with usual tolerances (rtol 1e-4, atol 1e-6), and with an absolute tolerance that
  follows the init scale, 1e-4 ε, without which small scales go wrong;
- SciPy's LSODA and BDF with dense Hessians from JAX, and torchdiffeq's dopri5, all with tolerances that follow the scale.

Errors are relative to saddlejax with Dopri8 at rtol 1e-10, which is itself compared with LSODA at 1e-10 for the largest
scale. Seconds are medians after a call to warm up, compilation apart. A method that is expected to need more than
`--budget` seconds is not run; its work and seconds are then extrapolated, in brackets and dashed: gradient descent's as
τ / learning rate, that of others by the power law of their last two scales.

Larger: `--width 512 --samples 10000`; on a GPU, JAX and PyTorch both take it.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from rich.progress import track
from scipy.integrate import solve_ivp

import saddlejax as sj
from saddlejax.curvature.sharpness import sharpness
from saddlejax.objective import task_loss
from saddlejax.tasks.task import zero_loss

try:
    import torch
except ImportError:
    torch = None
try:
    import torchdiffeq
except ImportError:
    torchdiffeq = None

jax.config.update("jax_enable_x64", True)

RTOL, USUAL_ATOL = 1e-4, 1e-6
MOST_STEPS = 100_000
STABLE_FACTORS = np.arange(2.0, 0.45, -0.1)
TRIED_STEPS = 20_000
HALF = sj.Escape(loss_fraction=0.5)
SMALL = sj.Save(steps=False, singular_values=False)
QUICK = {"scales": [1e-1, 3e-2], "depth": 3, "width": 4, "samples": 10, "budget": 0.5}


class Run(NamedTuple):
    """One method at one scale: the escape time it found (NaN for none), its work, seconds, and those of compilation."""

    time: float
    gradients: float
    seconds: float
    compilation: float
    hessians: int = 0
    extrapolated: bool = False


class Problem(NamedTuple):
    """A network at a scale, for every rival, with its escape time and the largest stable learning rate."""

    net: sj.MLP
    task: sj.Task
    half: float
    rate: float
    log_time: float
    scale: float

    @property
    def time(self) -> float:
        return float(np.exp(self.log_time))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "plateau")
    parser.add_argument("--scales", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--budget", type=float, default=10, help="seconds that a run may take")
    options = common.parse(parser, arguments, QUICK)
    if torch is not None:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")
    rivals = dict(METHODS)
    for package, there in (("torch", torch), ("torchdiffeq", torch and torchdiffeq)):
        if there is None:
            name = {"torch": "gradient descent, PyTorch", "torchdiffeq": "torchdiffeq dopri5"}[package]
            common.missing(package, name)
            del rivals[name]
    problems: list[Problem] = []
    for scale in sorted(options.scales, reverse=True):
        problems.append(make(options, scale, problems[-1] if problems else None))
    agreement = abs(scipy_method("LSODA", 1e-10)(problems[0]).time / problems[0].time - 1)
    results = {name: measure(name, method, problems, options.budget) for name, method in rivals.items()}
    notes = [
        f"The reference agrees with LSODA at 1e-10 to {agreement:.0e} at ε = {problems[0].scale:g}. In brackets: extrapolated.",
    ]
    numbers = {
        "reference": {"against_lsoda": agreement, "log_times": {f"{p.scale:g}": p.log_time for p in problems}},
        "learning_rates": {f"{p.scale:g}": p.rate for p in problems},
        "runs": {name: {f"{s:g}": run._asdict() for s, run in runs.items()} for name, runs in results.items()},
    }
    tables = [work_table(results, problems), seconds_table(results, problems), error_table(results, problems)]
    common.save(options, tables, numbers, figure(results, problems), notes)


def make(options: argparse.Namespace, scale: float, larger: Problem | None) -> Problem:
    """The problem at a scale, with its reference time and learning rate, which at long plateaus is that of the larger scale."""
    task = sj.tasks.single_index(jnp.tanh, in_size=10, samples=options.samples, key=jax.random.key(1))
    sizes = [10, *[options.width] * (options.depth - 1), 1]
    net = sj.scale_layers(sj.MLP(sizes, "tanh", key=jax.random.key(0)), scale)
    flow = sj.gradient_flow(net, task, HALF, rtol=1e-10, solver=dfx.Dopri8(), save=SMALL)
    half, log_time = 0.5 * float(zero_loss(task)), float(flow.log_escape_time)
    unit = 1 / float(sharpness(flow.net, task))
    if larger is not None and np.exp(log_time) > TRIED_STEPS * unit:
        return Problem(net, task, half, larger.rate, log_time, scale)
    factors = (f for f in STABLE_FACTORS if bool(descends(net, task, f * unit, half)))
    return Problem(net, task, half, unit * next(factors, STABLE_FACTORS[-1]), log_time, scale)


@jax.jit
def descends(net: sj.MLP, task: sj.Task, rate: float, half: float) -> jax.Array:
    """Whether gradient descent gets below half of the loss, every step lowering it."""

    def step(carry):
        weights, before, _, count = carry
        value, slopes = jax.value_and_grad(lambda w: task_loss(net.with_weights(w), task))(weights)
        return tuple(w - rate * g for w, g in zip(weights, slopes, strict=True)), value, value < before, count + 1

    def going(carry):
        return carry[2] & (carry[1] > half) & (carry[3] < 10 * TRIED_STEPS)

    return jax.lax.while_loop(going, step, (net.weights, jnp.inf, True, 0))[2]


def measure(name: str, method: Callable[[Problem], Run], problems: list[Problem], budget: float) -> dict[float, Run]:
    """The method at every scale: run where that is fast enough, extrapolated elsewhere."""
    found: dict[float, Run] = {}
    for problem in track(problems, description=name):
        expected = expect(name, problem, found)
        if expected is None or expected.seconds <= budget:
            found[problem.scale] = method(problem)
        elif expected.extrapolated:
            found[problem.scale] = expected
    return found


def expect(name: str, problem: Problem, found: dict[float, Run]) -> Run | None:
    """Work and seconds at a smaller scale than those known; None where nothing is known, the last run where no more is."""
    known = list(found.items())
    if not known:
        return None
    last = known[-1][1]
    if "descent" in name:
        steps = problem.time / problem.rate
        return Run(problem.time, steps, steps * last.seconds / last.gradients, 0.0, 0, True)
    if len(known) == 1:
        return last
    (before_scale, before), (last_scale, _) = known[-2:]

    def continued(field: str) -> float:
        return common.power_law(before_scale, last_scale, problem.scale, getattr(before, field), getattr(last, field))

    return Run(problem.time, continued("gradients"), continued("seconds"), 0.0, round(continued("hessians")), True)


def saddlejax(problem: Problem) -> Run:
    run, compilation = compiled(escape_time, problem.net, problem.task)
    (log_time, gradients), seconds = common.timed(lambda: run(problem.net, problem.task))
    return Run(float(np.exp(log_time)), int(gradients), seconds, compilation)


@functools.cache
def executable(function: Callable, structure: Any, shapes: tuple) -> tuple[Callable, float]:
    like = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    return common.compiled(function, *like)


def compiled(function: Callable, *arguments: Any) -> tuple[Callable, float]:
    """A function compiled once for all scales, and the seconds that took."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, arguments))
    return executable(function, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))


def escape_time(net: sj.MLP, task: sj.Task) -> tuple[jax.Array, jax.Array]:
    flow = sj.gradient_flow(net, task, HALF, save=SMALL)
    return flow.log_escape_time, flow.stats["gradient_evaluations"]


def optax_descent(problem: Problem) -> Run:
    """`lax.scan` over as many steps as a tenth of those expected, up to a thousand, until the loss is low enough.

    Where the rate, found at a larger scale, diverges at the escape, the next smaller one is taken.
    """
    chunk = int(np.clip(problem.time / problem.rate / 10, 1, 1000))

    def descend(net, rate):
        optimiser = optax.sgd(rate)

        def step(carry, _):
            net, state = carry
            value, slopes = jax.value_and_grad(lambda w: task_loss(net.with_weights(w), problem.task))(net.weights)
            updates, state = optimiser.update(slopes, state)
            return (net.with_weights(optax.apply_updates(net.weights, updates)), state), value

        def turn(carry):
            inner, steps, losses = carry
            inner, following = jax.lax.scan(step, inner, length=chunk)
            return inner, steps + chunk, jnp.append(losses[-1], following)

        start = (net, optimiser.init(net.weights)), 0, jnp.full(chunk + 1, jnp.inf)
        most = 2 * problem.time / rate + 1000
        return jax.lax.while_loop(lambda carry: jnp.all(carry[2] > problem.half) & (carry[1] < most), turn, start)[1:]

    run, compilation = common.compiled(descend, problem.net, jnp.asarray(problem.rate))
    for factor in STABLE_FACTORS:
        rate = jnp.asarray(problem.rate * factor / STABLE_FACTORS[0])
        # The losses before and after every step of the last chunk; the first of them is that before it.
        steps, losses = (np.asarray(found) for found in run(problem.net, rate))
        if np.any(losses <= problem.half):
            break
    else:
        return Run(np.nan, int(steps), np.nan, compilation)
    _, seconds = common.timed(lambda: run(problem.net, rate))
    below = int(np.argmax(losses <= problem.half))
    part = float((losses[below - 1] - problem.half) / (losses[below - 1] - losses[below]))
    whole = int(steps) - chunk + below - 2  # steps to the last loss above
    return Run(float(rate) * (whole + part), whole + 2, seconds, compilation)


def torch_descent(problem: Problem) -> Run:
    x, y = torch.tensor(np.array(problem.task.x)), torch.tensor(np.array(problem.task.y))

    def descend():
        weights = [torch.tensor(np.array(w), requires_grad=True) for w in problem.net.weights]
        optimiser = torch.optim.SGD(weights, lr=problem.rate)
        before, steps = np.inf, 0
        while steps < 2 * problem.time / problem.rate + 1000:
            optimiser.zero_grad()
            loss = torch_loss(weights, x, y)
            value = loss.item()
            if value <= problem.half:
                return problem.rate * (steps - 1 + (before - problem.half) / (before - value)), steps + 1
            loss.backward()
            optimiser.step()
            before, steps = value, steps + 1
        return np.nan, steps

    (found, steps), seconds = common.timed(descend)
    return Run(found, steps, seconds, 0.0)


def torch_loss(weights, x, y):
    h = x
    for w in weights[:-1]:
        h = torch.tanh(h @ w.T)
    return 0.5 * ((h @ weights[-1].T - y) ** 2).sum(dim=1).mean()


def diffrax_method(follows_scale: bool) -> Callable[[Problem], Run]:
    def method(problem: Problem) -> Run:
        atol = RTOL * problem.scale if follows_scale else USUAL_ATOL
        arguments = problem.net, problem.task, problem.half, 2 * problem.time, atol
        run, compilation = compiled(diffrax_escape, *arguments)
        arguments = jax.tree.map(jnp.asarray, arguments)
        (found, steps), seconds = common.timed(lambda: run(*arguments))
        return Run(float(found), 6 * int(steps) + 1, seconds, compilation)

    return method


def diffrax_escape(net: sj.MLP, task: sj.Task, half: jax.Array, end: jax.Array, atol: jax.Array) -> tuple:
    """The time at which the loss falls to `half`, NaN where that is not before `end`, and the steps tried."""

    def velocity(t, weights, args):
        slopes = jax.grad(lambda w: task_loss(net.with_weights(w), task))(weights)
        return tuple(-slope for slope in slopes)

    def above(t, y, args, **_):
        return task_loss(net.with_weights(y), task) - half

    solution = dfx.diffeqsolve(
        dfx.ODETerm(velocity),
        dfx.Tsit5(),
        0.0,
        end,
        None,
        net.weights,
        stepsize_controller=dfx.PIDController(rtol=RTOL, atol=atol),
        event=dfx.Event(above, root_finder=optimistix.Newton(rtol=1e-9, atol=1e-9 * end)),
        max_steps=MOST_STEPS,
        throw=False,
    )
    happened = solution.result == dfx.RESULTS.event_occurred
    return jnp.where(happened, solution.ts[-1], jnp.nan), solution.stats["num_steps"]


def flat_loss(flat: jax.Array, net: sj.MLP, task: sj.Task) -> jax.Array:
    return task_loss(net.with_weights(ravel_pytree(net.weights)[1](flat)), task)


DERIVATIVES = (flat_loss, jax.grad(flat_loss), jax.hessian(flat_loss))


def scipy_method(name: str, rtol: float = RTOL) -> Callable[[Problem], Run]:
    def method(problem: Problem) -> Run:
        flat = ravel_pytree(problem.net.weights)[0]
        (loss, first), (slope, second), (hessian, third) = (
            compiled(derivative, flat, problem.net, problem.task) for derivative in DERIVATIVES
        )
        rest = jax.tree.map(jnp.asarray, (problem.net, problem.task))
        gradients = hessians = 0

        def velocity(t, v):
            nonlocal gradients
            gradients += 1
            return -np.asarray(slope(v, *rest))

        def jacobian(t, v):
            nonlocal hessians
            hessians += 1
            return -np.asarray(hessian(v, *rest))

        def above(t, v):
            return float(loss(v, *rest)) - problem.half

        above.terminal = True

        def solve():
            nonlocal gradients, hessians
            gradients = hessians = 0
            options = {"rtol": rtol, "atol": rtol * problem.scale, "events": above, "jac": jacobian}
            done = solve_ivp(velocity, (0, 2 * problem.time), np.asarray(flat), method=name, **options)
            return done.t_events[0]

        reached, seconds = common.timed(solve, warm_up=False)
        compilation = first + second + (third if hessians else 0)
        return Run(float(reached[0]) if len(reached) else np.nan, gradients, seconds, compilation, hessians)

    return method


def torchdiffeq_time(problem: Problem) -> Run:
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
        tolerances = {"rtol": RTOL, "atol": RTOL * problem.scale}
        found = torchdiffeq.odeint_event(
            velocity, start, torch.tensor(0.0), event_fn=above, method="dopri5", **tolerances
        )
        return float(found[0])

    found, seconds = common.timed(solve)
    return Run(found, count, seconds, 0.0)


METHODS = {
    "saddlejax": saddlejax,
    "gradient descent, optax": optax_descent,
    "gradient descent, PyTorch": torch_descent,
    "diffrax Tsit5 in t, atol 1e-4 ε": diffrax_method(True),
    "diffrax Tsit5 in t, atol 1e-6": diffrax_method(False),
    "SciPy LSODA": scipy_method("LSODA"),
    "SciPy BDF": scipy_method("BDF"),
    "torchdiffeq dopri5": torchdiffeq_time,
}


def cells_table(
    title: str, problems: list[Problem], results: dict, cell: Callable, more: dict[str, list]
) -> common.Table:
    columns = ["method", *more, *(f"ε = {p.scale:g}" for p in problems)]
    rows = []
    for i, (name, runs) in enumerate(results.items()):
        rows.append(
            [
                name,
                *(column[i] for column in more.values()),
                *(cell(p, runs[p.scale]) if p.scale in runs else "–" for p in problems),
            ]
        )
    return common.Table(title, columns, rows)


def bracketed(run: Run, words: str) -> str:
    return f"({words})" if run.extrapolated else words


def work_table(results: dict[str, dict[float, Run]], problems: list[Problem]) -> common.Table:
    parameters = sum(w.size for w in problems[0].net.weights)

    def cell(problem: Problem, run: Run) -> str:
        dense = f" + {run.hessians} H" if run.hessians else ""
        return bracketed(run, common.number(run.gradients) + dense)

    return cells_table(f"Gradient evaluations (+ dense Hessians H of {parameters:,} rows)", problems, results, cell, {})


def seconds_table(results: dict[str, dict[float, Run]], problems: list[Problem]) -> common.Table:
    ours = results["saddlejax"]

    def cell(problem: Problem, run: Run) -> str:
        ratio = run.seconds / ours[problem.scale].seconds
        return bracketed(run, f"{common.number(run.seconds)}, ×{common.number(ratio)}")

    compilation = [f"{next(iter(runs.values())).compilation:.1f}" for runs in results.values()]
    title = "Seconds after compilation, and as a multiple of saddlejax's"
    return cells_table(title, problems, results, cell, {"compilation (s)": compilation})


def error_table(results: dict[str, dict[float, Run]], problems: list[Problem]) -> common.Table:
    def cell(problem: Problem, run: Run) -> str:
        if run.extrapolated:
            return "–"
        return f"{error(problem, run):.0e}" if np.isfinite(run.time) else "no escape found"

    return cells_table("Relative error of the escape time", problems, results, cell, {})


def error(problem: Problem, run: Run) -> float:
    return abs(run.time / problem.time - 1)


def figure(results: dict[str, dict[float, Run]], problems: list[Problem]) -> Figure:
    """Gradients, seconds and errors against the scale."""
    result, ((left, middle, right),) = common.axes(3)
    for i, (name, runs) in enumerate(results.items()):
        style = {**common.style(i), "markersize": 5 if i == 0 else 4, "linewidth": 2.2 if i == 0 else 1.1}
        measured = [(p, runs[p.scale]) for p in problems if p.scale in runs and not runs[p.scale].extrapolated]
        scales = [p.scale for p, _ in measured]
        beyond = [scale for scale, run in runs.items() if run.extrapolated]
        for ax, field in ((left, "gradients"), (middle, "seconds")):
            values = [getattr(run, field) for _, run in measured]
            ax.loglog(scales, values, label=name, zorder=3 if i == 0 else 2, **style)
            if beyond:
                dashed = [scales[-1], *beyond]
                values = [getattr(runs[scale], field) for scale in dashed]
                ax.loglog(dashed, values, **{**style, "linestyle": "--", "marker": ""})
        right.loglog(scales, [max(error(p, run), 1e-12) for p, run in measured], **style)
    left.set_ylabel("gradient evaluations to the escape")
    middle.set_ylabel("seconds after compilation")
    right.set_ylabel("relative error of the escape time")
    left.set_title("dashed: extrapolated", fontsize="small", loc="left", color="0.35")
    for ax in (left, middle, right):
        ax.invert_xaxis()
        ax.set_xlabel(r"init scale $\varepsilon$")
    result.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    return result


if __name__ == "__main__":
    main()
