"""Implicit rivals of the stiff integrator for `benchmarks/staircase.py`, in time t.

- `dense`: SciPy's BDF, Radau or LSODA with the Hessian as a matrix, from JAX;
- `kvaerno`: diffrax's Kvaerno5, which forms the Hessian too;
- `matrix_free`: Rodas4, a linearly implicit method of order four, with conjugate gradients on Hessian-vector products.

All start from a network with small weights; their absolute tolerance follows the init scale, or their error norm is relative to the
singular values of a layer, as that of the library's stiff integrator is.
"""

from collections.abc import Callable
from typing import NamedTuple

import common
import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicHermiteSpline

import saddlejax as sj
from saddlejax.objective import task_loss

MOST_STEPS = 5_000
LONGEST = 1e15
CG_ITERATIONS = 300

# Rodas4, L-stable with an embedded method of order three, in the form that needs no products with the Jacobian (Hairer & Wanner, Solving
# Ordinary Differential Equations II, section IV.7).
GAMMA = 0.25
STAGES = (
    (),
    (1.544,),
    (0.9466785280815826, 0.2557011698983284),
    (3.314825187068521, 2.896124015972201, 0.9986419139977817),
    (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.6878860361058950),
    (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.6878860361058950, 1.0),
)
COUPLING = (
    (),
    (-5.6688,),
    (-2.430093356833875, -0.2063599157091915),
    (-0.1073529058151375, -9.594562251023355, -20.47028614809616),
    (7.496443313967647, -10.24680431464352, -33.99990352819905, 11.70890893206160),
    (8.083246795921522, -7.981132988064893, -31.52159432874371, 16.31930543123136, -6.058818238834054),
)


class Passage(NamedTuple):
    """What a method found and spent: `log t` at the levels (NaN where not reached), and its work.

    `gradients` is None where the method does not count them; a dense Hessian counts in `hessians`.
    """

    log_times: np.ndarray
    gradients: int | None
    products: int
    hessians: int
    steps: int
    seconds: float


def dense(method: str, rtol: float) -> Callable[..., Passage]:
    """SciPy's method with compiled gradients and Hessians."""

    def run(net: sj.MLP, task: sj.Task, levels: tuple[float, ...], scale: float) -> Passage:
        flat, unravel = ravel_pytree(net.weights)

        def loss_at(v):
            return task_loss(net.with_weights(unravel(v)), task)

        loss, slope, hessian = (jax.jit(f(loss_at)).lower(flat).compile() for f in (lambda f: f, jax.grad, jax.hessian))
        count = {"gradients": 0, "hessians": 0}

        def velocity(_, v):
            count["gradients"] += 1
            return -np.asarray(slope(v))

        def jacobian(_, v):
            count["hessians"] += 1
            return -np.asarray(hessian(v))

        events = [lambda _, v, level=level: float(loss(v)) - level for level in levels]
        events[-1].terminal = True  # type: ignore[attr-defined]

        def solve():
            count.update(gradients=0, hessians=0)
            tolerances = {"rtol": rtol, "atol": rtol * scale}
            return solve_ivp(velocity, (0, LONGEST), flat, method=method, events=events, jac=jacobian, **tolerances)

        done, seconds = common.timed(solve, repeats=3, warm_up=False)
        times = [found[0] if len(found) else np.nan for found in done.t_events]
        return Passage(np.log(times), count["gradients"], 0, count["hessians"], len(done.t) - 1, seconds)

    return run


def kvaerno(rtol: float) -> Callable[..., Passage]:
    """diffrax's Kvaerno5 with the Hessian as a matrix."""

    def run(net: sj.MLP, task: sj.Task, levels: tuple[float, ...], scale: float) -> Passage:
        flat, unravel = ravel_pytree(net.weights)

        def loss_at(v):
            return task_loss(net.with_weights(unravel(v)), task)

        def row(t, v, args):
            value, slope = jax.value_and_grad(loss_at)(v)
            return value, -jnp.sum(slope**2)

        def solve(flat):
            solution = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, v, args: -jax.grad(loss_at)(v)),
                dfx.Kvaerno5(),
                0.0,
                LONGEST,
                1e-3,
                flat,
                stepsize_controller=dfx.PIDController(rtol=rtol, atol=rtol * scale),
                saveat=dfx.SaveAt(t0=True, steps=True, fn=row),
                event=dfx.Event(lambda t, y, args, **_: loss_at(y) - 0.9 * levels[-1]),
                max_steps=MOST_STEPS,
                throw=False,
            )
            return solution.ts, *solution.ys, solution.stats["num_steps"]

        solve_compiled, _ = common.compiled(solve, flat)
        call = lambda: solve_compiled(flat)  # noqa: E731
        (times, losses, slopes, steps), seconds = common.timed(call, repeats=3, warm_up=False)
        log_times = crossings(np.asarray(times), np.asarray(losses), np.asarray(slopes), levels)
        return Passage(log_times, None, 0, 0, int(steps), seconds)

    return run


def matrix_free(rtol: float, cg_rtol: float) -> Callable[..., Passage]:
    """Rodas4 with conjugate gradients."""

    def run(net: sj.MLP, task: sj.Task, levels: tuple[float, ...], scale: float) -> Passage:
        end = jnp.asarray(levels[-1])

        def solve(net):
            return rodas4(net, task, end, jnp.asarray(rtol), jnp.asarray(cg_rtol))

        solve_compiled, _ = common.compiled(solve, net)
        (times, losses, slopes, count), seconds = common.timed(lambda: solve_compiled(net), repeats=3)
        accepted, attempts, products = map(int, count)
        rows = slice(accepted + 1)
        log_times = crossings(np.asarray(times)[rows], np.asarray(losses)[rows], np.asarray(slopes)[rows], levels)
        return Passage(log_times, 1 + 7 * attempts, products, 0, accepted, seconds)

    return run


def rodas4(net: sj.MLP, task: sj.Task, end: jax.Array, rtol: jax.Array, cg_rtol: jax.Array) -> tuple:
    """Times, losses and their slopes at the steps until the loss `end`; steps accepted and attempted, and products."""
    start, unravel = ravel_pytree(net.weights)

    def value_and_slope(v):
        return jax.value_and_grad(lambda v: task_loss(net.with_weights(unravel(v)), task))(v)

    def attempt(v, slope, h):
        _, product = jax.linearize(lambda v: value_and_slope(v)[1], v)

        def operator(p):
            return p / (GAMMA * h) + product(p)

        increments: list[jax.Array] = []
        products, solved = jnp.asarray(0), jnp.asarray(True)
        for moves, couplings in zip(STAGES, COUPLING, strict=True):
            if increments:
                slope = value_and_slope(v + sum(a * k for a, k in zip(moves, increments, strict=True)))[1]
            right = -slope + sum((c / h * k for c, k in zip(couplings, increments, strict=True)), jnp.zeros_like(v))
            increment, spent, converged = conjugate_gradients(operator, right, cg_rtol)
            increments.append(increment)
            products, solved = products + spent, solved & converged
        after = v + sum(m * k for m, k in zip((*STAGES[-1], 1.0), increments, strict=True))
        return after, increments[-1], products, solved

    def step(carry):
        v, t, h, loss, slope, rows, accepted, attempts, products = carry
        after, error, spent, solved = attempt(v, slope, h)
        new_loss, new_slope = value_and_slope(after)
        scaled = relative_to_singular_values(unravel(v), unravel(error)) / rtol
        sound = solved & jnp.isfinite(scaled) & jnp.isfinite(new_loss) & (new_loss <= loss * (1 + 1e-12))
        keep = sound & (scaled <= 1)
        factor = jnp.clip(0.9 * jnp.clip(scaled, 1e-8, 1e8) ** -0.25, 0.2, 5)
        factor = jnp.where(sound, jnp.where(keep, factor, jnp.minimum(factor, 0.9)), 0.25)
        accepted = accepted + keep
        row = (t + h, new_loss, -jnp.sum(new_slope**2))
        rows = tuple(jnp.where(keep, r.at[accepted].set(x), r) for r, x in zip(rows, row, strict=True))
        v, t, loss, slope = (
            jnp.where(keep, new, old) for new, old in ((after, v), (t + h, t), (new_loss, loss), (new_slope, slope))
        )
        return v, t, h * factor, loss, slope, rows, accepted, attempts + 1, products + spent

    loss, slope = value_and_slope(start)
    parts = zip(unravel(start), unravel(slope), strict=True)
    pace = jnp.sqrt(sum(jnp.sum(g**2) / jnp.sum(w**2) for w, g in parts))
    rows = tuple(jnp.zeros(MOST_STEPS + 1).at[0].set(x) for x in (0.0, loss, -jnp.sum(slope**2)))
    first = (
        start,
        jnp.asarray(0.0),
        rtol**0.25 / pace,
        loss,
        slope,
        rows,
        jnp.asarray(0),
        jnp.asarray(0),
        jnp.asarray(0),
    )
    last = jax.lax.while_loop(lambda c: (c[3] > end) & (c[7] < MOST_STEPS), step, first)
    return *last[5], last[6:]


def conjugate_gradients(
    operator: Callable, right: jax.Array, rtol: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The solution, the products spent, and whether the operator proved positive and the residual small."""
    target = (rtol * jnp.linalg.norm(right)) ** 2

    def going(carry):
        *_, square, count, positive = carry
        return positive & (square > target) & (count < CG_ITERATIONS)

    def iterate(carry):
        x, residual, direction, square, count, _ = carry
        image = operator(direction)
        curvature = jnp.dot(direction, image)
        length = square / curvature
        residual = residual - length * image
        new_square = jnp.dot(residual, residual)
        return (
            x + length * direction,
            residual,
            residual + new_square / square * direction,
            new_square,
            count + 1,
            curvature > 0,
        )

    start = (jnp.zeros_like(right), right, right, jnp.dot(right, right), jnp.asarray(0), jnp.asarray(True))
    x, _, _, square, count, positive = jax.lax.while_loop(going, iterate, start)
    return x, count, positive & (square <= target)


def relative_to_singular_values(weights: tuple, error: tuple) -> jax.Array:
    """The largest over layers `W = U diag(σ) Vᵀ` of the norm of `(UᵀEV)_ij/√(σ_i σ_j)`, small `σ` taken for `√eps` of the largest."""
    norms = []
    for w, e in zip(weights, error, strict=True):
        left, values, right = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(jnp.maximum(values, values[0] * jnp.finfo(w.dtype).eps ** 0.5))
        inside = left.T @ e @ right.T / root[:, None] / root
        norms.append(jnp.maximum(jnp.linalg.norm(inside), jnp.linalg.norm(e) / values[0]))
    return jnp.max(jnp.stack(norms))


def crossings(times: np.ndarray, losses: np.ndarray, slopes: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """`log t` where the loss falls to each level, by a cubic polynomial within a step; NaN where it does not."""
    found = []
    for level in levels:
        below = np.flatnonzero(losses <= level)
        if len(below) == 0 or below[0] == 0:
            found.append(np.nan)
            continue
        rows = [below[0] - 1, below[0]]
        curve = CubicHermiteSpline(times[rows], losses[rows] - level, slopes[rows])
        roots = [t for t in curve.roots(extrapolate=False) if times[rows[0]] <= t <= times[rows[1]]]
        found.append(np.log(roots[0] if roots else times[rows[1]]))
    return np.array(found)
