"""What does a ReLU network cost past its first escape, against gradient descent, steps across kinks, and LSODA?

    python benchmarks/kinks.py [--seeds 5] [--budget 100000]

From He-normal weights times 1e-2 to the losses in the table: three layers of width 8 on 24 samples of a ReLU teacher in three dimensions, and
four layers of width 20 on 200 digits. The rivals are gradient descent at its largest stable rate, found among powers of two; explicit steps that
do not know of kinks, as saddlejax 0.1 took them; and LSODA of SciPy. Work is gradients: 1.8 for a Hessian-vector product, one over the number of
samples for the Jacobian of one unit on one sample. LSODA finds its Jacobians by differences of gradients.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import common
import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from scipy.integrate import LSODA

import saddlejax as sj
from saddlejax.objective import task_loss

jax.config.update("jax_enable_x64", True)

QUICK = {"seeds": 1, "budget": 500, "steps": 50, "only": ["teacher"]}
SCALE, EXPLICIT_RTOL, MIN_STEP, LSODA_RTOL = 1e-2, 2e-4, 2e-3, 1e-5
HALVINGS, RISE = 8, 1.01


class Case(NamedTuple):
    """A problem: its task, the sizes of the layers, losses to reach, and the tolerance of the flow (None for the default)."""

    name: str
    task: sj.Task
    sizes: list[int]
    levels: tuple[float, ...]
    rtol: float | None
    seeds: int


class Passage(NamedTuple):
    """What a method found and spent: `log t` at the levels, NaN where they were not reached."""

    log_times: np.ndarray
    work: float
    seconds: float
    remark: str


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, "kinks")
    parser.add_argument("--seeds", type=int, default=5, help="initialisations of the small problem")
    parser.add_argument("--budget", type=int, default=100_000, help="the most gradients of a rival")
    parser.add_argument("--steps", type=int, default=4096, help="the most steps of a flow")
    parser.add_argument("--only", nargs="+", choices=["teacher", "digits"], default=["teacher", "digits"])
    options = common.parse(parser, arguments, QUICK)
    methods: dict[str, Callable[[Case, sj.MLP], Passage]] = {
        "saddlejax, along kinks": lambda case, net: along_kinks(case, net, options.steps),
        "gradient descent, largest stable rate": lambda case, net: descent(case, net, options.budget),
        "explicit steps across kinks, as in 0.1": lambda case, net: across_kinks(case, net, options.budget),
        "SciPy's LSODA": lambda case, net: lsoda(case, net, options.budget),
    }
    numbers, tables = [], []
    for case in (case for case in cases(options.seeds) if case.name in options.only):
        rows = []
        for name, method in methods.items():
            found = [method(case, start(case, seed)) for seed in range(case.seeds)]
            numbers += [{"case": case.name, "method": name, "seed": s, **one._asdict()} for s, one in enumerate(found)]
            rows.append((name, found))
            print(case.name, name, found[0], flush=True)
        tables.append(table(case, rows))
    common.save(options, tables, numbers, figure(numbers))


def cases(seeds: int) -> list[Case]:
    """The two problems."""
    normal = np.random.default_rng(1)
    x = normal.standard_normal((24, 3))
    relu = lambda z: np.maximum(z, 0)  # noqa: E731
    y = relu(x @ [1.0, 0.2, 0.0]) - 0.8 * relu(x @ [-0.3, 1.0, 0.4]) + 0.5 * relu(x @ [0.2, -0.5, 1.0])
    teacher = sj.Task(x, y[:, None])
    high = float(jnp.mean(y**2) / 2)
    digits = sj.tasks.digits()
    inputs, labels = digits.x[:200], digits.y[:200]
    some = sj.Task(inputs - np.mean(inputs, axis=0), labels - np.mean(labels, axis=0))
    return [
        Case("teacher", teacher, [3, 8, 8, 1], (0.4 * high, 0.2 * high, 0.1 * high, 0.02 * high), None, seeds),
        Case("digits", some, [64, 20, 20, 20, 10], (0.42, 0.41, 0.38, 0.35, 0.32), 1e-2, 1),
    ]


def start(case: Case, seed: int) -> sj.MLP:
    return sj.scale_layers(sj.MLP(case.sizes, "relu", key=jax.random.key(seed)), SCALE)


def along_kinks(case: Case, net: sj.MLP, steps: int) -> Passage:
    """This library's flow."""
    until = sj.Loss(case.levels[-1])
    call = lambda: sj.gradient_flow(net, case.task, until, rtol=case.rtol, max_steps=steps)  # noqa: E731
    flow, seconds = common.timed(call, repeats=1)
    stats = {name: int(count) for name, count in flow.stats.items()}
    work = stats["gradient_evaluations"] + 1.8 * stats["hessian_vector_products"]
    work += stats["unit_jacobians"] / case.task.samples
    log_times = crossings(np.asarray(flow.log_times), np.asarray(flow.losses), case.levels)
    return Passage(log_times, work, seconds, sj.Status[flow.status].partition(":")[0])


def descent(case: Case, net: sj.MLP, budget: int) -> Passage:
    """Gradient descent at the largest power of two as a rate at which the loss never rises by more than a hundredth."""
    flat, unravel = ravel_pytree(net.weights)
    levels = jnp.asarray(case.levels)
    slope = jax.value_and_grad(lambda v: task_loss(net.with_weights(unravel(v)), case.task))

    @jax.jit
    def run(rate):
        def step(carry):
            v, loss, when, steps, sound = carry
            new, gradient = slope(v)
            part = jnp.where(new < loss, (loss - levels) / jnp.where(new < loss, loss - new, 1), 0)
            crossed = jnp.isnan(when) & (new <= levels)
            when = jnp.where(crossed, rate * (steps - 1 + part), when)
            return v - rate * gradient, new, when, steps + 1, sound & (new <= RISE * loss)

        def unfinished(carry):
            _, _, when, steps, sound = carry
            return jnp.isnan(when[-1]) & (steps < budget) & sound

        begin = (flat, jnp.inf, jnp.full(len(levels), jnp.nan), 0, True)
        return jax.lax.while_loop(unfinished, step, begin)[2:]

    for halving in range(HALVINGS):
        rate = 4.0 * 0.5**halving
        (when, steps, sound), seconds = common.timed(lambda rate=rate: run(rate), repeats=1)
        if bool(sound):
            return Passage(np.log(np.asarray(when)), int(steps), seconds, f"rate {rate:g}")
    return Passage(np.full(len(levels), np.nan), float("nan"), float("nan"), "no stable rate")


def across_kinks(case: Case, net: sj.MLP, budget: int) -> Passage:
    """Bosh3 in the plateau clock, with a step below which errors no longer shorten it: what saddlejax 0.1 did at kinks."""

    @jax.jit
    def run(net):
        clock = sj.plateau_clock(net, case.task)
        solution = dfx.diffeqsolve(
            clock.term,
            sj.PlateauSolver(dfx.Bosh3()),
            0.0,
            jnp.inf,
            None,
            clock.y0,
            args=clock.args,
            stepsize_controller=sj.PlateauController(EXPLICIT_RTOL, MIN_STEP, to_escape=False),
            event=clock.event(sj.Loss(case.levels[-1])),
            saveat=dfx.SaveAt(steps=True, fn=lambda s, y, args: (clock.log_time(y), clock.loss(y))),
            adjoint=dfx.ForwardMode(),
            max_steps=budget // 3,
            throw=False,
        )
        return solution.ys, solution.stats["num_accepted_steps"], solution.stats["num_steps"], solution.result

    (rows, accepted, tried, result), seconds = common.timed(lambda: run(net), repeats=1)
    log_times, losses = (np.asarray(a)[: int(accepted)] for a in rows)
    remark = "ended" if result == dfx.RESULTS.event_occurred else "out of steps"
    if result == dfx.RESULTS.dt_min_reached:
        remark = f"no step at a loss of {losses[-1]:.3g}"
    return Passage(crossings(log_times, losses, case.levels), 3 * int(tried), seconds, remark)


def lsoda(case: Case, net: sj.MLP, budget: int) -> Passage:
    """LSODA with compiled gradients, until the budget is spent."""
    flat, unravel = ravel_pytree(net.weights)
    loss_at = jax.jit(lambda v: task_loss(net.with_weights(unravel(v)), case.task))
    slope = jax.jit(jax.grad(loss_at)).lower(flat).compile()
    work = 0

    def velocity(_, v):
        nonlocal work
        work += 1
        return -np.asarray(slope(v))

    begin = time.perf_counter()
    tolerances = {"rtol": LSODA_RTOL, "atol": LSODA_RTOL * SCALE}
    solver = LSODA(velocity, 0.0, np.asarray(flat), 1e12, **tolerances)
    times, losses = [0.0], [float(loss_at(flat))]
    while solver.status == "running" and losses[-1] > case.levels[-1] and work < budget:
        solver.step()
        times.append(float(solver.t))
        losses.append(float(loss_at(solver.y)))
    remark = "ended" if losses[-1] <= case.levels[-1] else f"{work:,} spent at a loss of {losses[-1]:.3g}"
    with np.errstate(divide="ignore"):
        log_times = crossings(np.log(times), np.asarray(losses), case.levels)
    return Passage(log_times, work, time.perf_counter() - begin, remark)


def crossings(log_times: np.ndarray, losses: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Where rows first pass losses, between rows in proportion to the time."""
    found = []
    for level in levels:
        after = int(np.argmax(losses <= level * (1 + 1e-9)))
        if losses[after] > level * (1 + 1e-9):
            found.append(np.nan)
            continue
        before = max(after - 1, 0)
        times, fall = np.exp(log_times[[before, after]]), losses[before] - losses[after]
        share = (losses[before] - level) / fall if fall > 0 else 1.0
        found.append(float(np.log(times[0] + share * (times[1] - times[0]))))
    return np.asarray(found)


def table(case: Case, rows: list[tuple[str, list[Passage]]]) -> common.Table:
    """Work and times of the methods on one problem; medians where there are several initialisations."""
    columns = [
        "method",
        *[f"log t at {level:.3g}" for level in case.levels],
        "work",
        "/ saddlejax",
        "seconds",
        "remark",
    ]
    own = np.median([one.work for one in rows[0][1]])
    lines = []
    for name, found in rows:
        work = np.median([one.work for one in found])
        reached = sum(np.isfinite(one.log_times[-1]) for one in found)
        lines.append(
            [
                name,
                *["–" if np.isnan(t) else f"{t:.4f}" for t in found[0].log_times],
                common.number(work),
                common.number(work / own),
                common.number(float(np.median([one.seconds for one in found]))),
                found[0].remark if len(found) == 1 else f"{reached} of {len(found)} reach the last",
            ]
        )
    size = "-".join(map(str, case.sizes))
    seeds = (
        "" if case.seeds == 1 else f"; times of the first of {case.seeds} initialisations, work and seconds as medians"
    )
    return common.Table(f"{size} on {case.task.samples} samples ({case.name}), ε = {SCALE:g}{seeds}", columns, lines)


def figure(numbers: list[dict]) -> Figure:
    """The work of each method."""
    result, ((ax,),) = common.axes(1, width=6.4)
    names = list(dict.fromkeys(one["method"] for one in numbers))
    for number, name in enumerate(names):
        for position, case in enumerate(dict.fromkeys(one["case"] for one in numbers)):
            mine = [one for one in numbers if one["method"] == name and one["case"] == case]
            for one in mine:
                alpha = 0.9 if np.isfinite(one["log_times"][-1]) else 0.25
                place = position + 0.15 * (number - 1.5)
                ax.semilogy(place, one["work"], ls="none", alpha=alpha, **common.style(number))
        ax.semilogy([], [], ls="none", label=name, **common.style(number))
    kinds = list(dict.fromkeys(one["case"] for one in numbers))
    ax.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="gradients (pale: did not get there)")
    ax.legend(frameon=False, fontsize=8)
    return result


if __name__ == "__main__":
    main()
