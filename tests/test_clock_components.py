"""The parts of the plateau clock in a `diffrax.diffeqsolve` of one's own, against `gradient_flow` and closed forms."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, network, teacher

import saddlejax as sj

TASK = teacher(50)
NET = network(3, "tanh", 1e-3, width=8)
UNTILS = [sj.Escape(), sj.Escape(loss_fraction=0.5)]


def solve(clock, solver, until, **options):
    """What the documentation of `plateau_clock` shows."""
    return dfx.diffeqsolve(
        clock.term,
        solver,
        0.0,
        options.pop("t1", jnp.inf),
        None,
        clock.y0,
        args=clock.args,
        stepsize_controller=options.pop("controller", sj.PlateauController(rtol=1e-4)),
        event=clock.event(until),
        max_steps=512,
        **options,
    )


def last(solution):
    return jax.tree.map(lambda a: a[-1], solution.ys)


@pytest.mark.parametrize("until", UNTILS, ids=["steepest", "half"])
def test_a_solve_of_ones_own_is_the_flow(until):
    flow, clock = sj.gradient_flow(NET, TASK, until, save=SMALL), sj.plateau_clock(NET, TASK)
    for solver in (dfx.Tsit5(), sj.PlateauSolver()):
        solution = solve(clock, solver, until)
        end = last(solution)
        assert float(clock.log_time(end)) == pytest.approx(float(flow.log_escape_time), abs=1e-12)
        assert int(solution.stats["num_accepted_steps"]) == int(flow.stats["steps"])
        assert int(solution.stats["num_rejected_steps"]) == int(flow.stats["rejected_steps"])
        assert float(clock.loss(end)) == pytest.approx(float(flow.losses[-1]), rel=1e-10)
        for ours, theirs in zip(clock.model(end).weights, flow.net.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [dfx.Dopri5(), dfx.Dopri8(), dfx.Heun()], ids=["Dopri5", "Dopri8", "Heun"])
def test_other_solvers_find_the_same_time(solver):
    reference = sj.gradient_flow(NET, TASK, UNTILS[1], rtol=1e-9, save=SMALL).log_escape_time
    clock = sj.plateau_clock(NET, TASK)
    end = last(solve(clock, solver, UNTILS[1]))
    assert float(clock.log_time(end)) == pytest.approx(float(reference), abs=1e-3)
    if isinstance(solver, dfx.Heun):  # whose last stage is not the first of the next step
        with pytest.raises(ValueError, match="solver must be an explicit first-same-as-last diffrax solver"):
            sj.PlateauSolver(solver)
    else:
        again = last(solve(clock, sj.PlateauSolver(solver), UNTILS[1]))
        assert float(clock.log_time(again)) == pytest.approx(float(clock.log_time(end)), abs=1e-10)


def test_states_at_values_of_s_lie_on_the_flow():
    clock = sj.plateau_clock(NET, TASK)
    ts, controller = jnp.array([1.0, 2.5, 4.0, 5.5]), sj.PlateauController(rtol=1e-7, to_escape=False)
    solutions = [
        solve(clock, solver, UNTILS[1], controller=controller, saveat=saveat)
        for solver in (dfx.Tsit5(), sj.PlateauSolver())
        for saveat in (dfx.SaveAt(ts=ts), dfx.SaveAt(t1=True, dense=True))
    ]
    states = [jax.vmap(s.evaluate)(ts) if s.interpolation is not None else s.ys for s in solutions]
    times = jnp.exp(jax.vmap(clock.log_time)(states[0]))
    flow = sj.gradient_flow(NET, TASK, sj.Time(2 * times[-1]), rtol=1e-7, save=sj.Save(times=times, weights=True))
    for state in states:
        np.testing.assert_allclose(jax.vmap(clock.log_time)(state), flow.log_times, atol=1e-5)
        np.testing.assert_allclose(jax.vmap(clock.loss)(state), flow.losses, rtol=1e-6)
        for ours, theirs in zip(jax.vmap(clock.model)(state).weights, flow.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [dfx.Tsit5(), sj.PlateauSolver()], ids=["Tsit5", "PlateauSolver"])
def test_derivatives_in_both_modes_are_the_exponent(solver):
    def escape(log_scale, adjoint):
        clock = sj.plateau_clock(sj.scale_layers(NET, jnp.exp(log_scale)), TASK)
        return clock.log_time(last(solve(clock, solver, sj.Escape(), adjoint=adjoint)))

    exponent = float(sj.critical_exponent(NET, TASK, layers=range(3)))
    zero = jnp.zeros(())
    _, forward = jax.jvp(lambda a: escape(a, dfx.ForwardMode()), (zero,), (jnp.ones(()),))
    reverse = jax.grad(lambda a: escape(a, dfx.RecursiveCheckpointAdjoint()))(zero)
    assert float(forward) == pytest.approx(-exponent, abs=1e-6)
    assert float(reverse) == pytest.approx(-exponent, abs=1e-6)


def test_a_progress_meter_of_diffrax(capfd):
    clock = sj.plateau_clock(NET, TASK)
    end = last(solve(clock, sj.PlateauSolver(), sj.Escape(), t1=100.0, progress_meter=dfx.TextProgressMeter()))
    assert float(clock.log_time(end)) == pytest.approx(
        float(sj.gradient_flow(NET, TASK, save=SMALL).log_escape_time), abs=1e-12
    )
    assert "%" in capfd.readouterr().out


def test_exponential_steps_in_a_plain_gradient_flow():
    # V = Σ λ y²/2 + y⁴/4, so y' = −λy − y³ and y² = λ/((λ/y₀² + 1) e^{2λt} − 1). An explicit step is at most 3e-4 long.
    rates, start = jnp.array([0.5, 3.0, 1e4]), jnp.array([2.0, -1.0, 0.5])

    def potential(y):
        return jnp.sum(rates * y**2) / 2 + jnp.sum(y**4) / 4

    solution = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: -jax.grad(potential)(y)),
        sj.ExponentialRosenbrock(tolerance=1e-9),
        0.0,
        3.0,
        1e-3,
        start,
        saveat=dfx.SaveAt(ts=jnp.array([0.5, 1.7, 3.0])),
        stepsize_controller=dfx.PIDController(rtol=1e-7, atol=1e-9),
        max_steps=400,
    )
    for t, y in zip(solution.ts, solution.ys, strict=True):
        square = rates * jnp.exp(-2 * rates * t) / (rates / start**2 + 1 - jnp.exp(-2 * rates * t))
        np.testing.assert_allclose(y, jnp.sign(start) * jnp.sqrt(square), rtol=1e-5, atol=1e-8)


def test_nothing_is_compiled_where_only_values_change():
    compiled = []

    def listen(event, duration, **kwargs):
        if event.endswith("jaxpr_to_mlir_module_duration"):
            compiled.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    model = eqx.nn.MLP(10, 1, 8, 2, jnp.tanh, use_bias=False, use_final_bias=False, key=jax.random.key(3))

    def run(scale, size, rtol, fraction):
        here = jax.tree.map(lambda a: scale * a if eqx.is_inexact_array(a) else a, model)
        task = sj.Task(TASK.x, size * TASK.y)
        sj.gradient_flow(here, task, sj.Escape(loss_fraction=fraction), rtol=rtol, save=SMALL)
        clock = sj.plateau_clock(here, task)
        end = last(solve(clock, dfx.Tsit5(), sj.Escape(fraction), controller=sj.PlateauController(jnp.asarray(rtol))))
        clock.log_time(end), clock.loss(end)

    run(1e-2, 1.0, 1e-4, 0.5)
    first = len(compiled)
    assert first > 0
    for values in ((1e-3, 1.0, 1e-4, 0.5), (1e-3, 2.0, 1e-4, 0.5), (1e-3, 2.0, 1e-3, 0.6)):
        run(*values)
    assert compiled[first:] == []


@pytest.mark.parametrize("solver", [dfx.Tsit5(), dfx.Dopri5()], ids=["Tsit5", "Dopri5"])
def test_the_fastest_decay_is_the_largest_eigenvalue_of_the_hessian(solver):
    curvatures = jnp.array([1e-2, 1.0, 30.0])
    clock = sj.plateau_clock(jnp.ones(3), lambda point: 0.5 * jnp.sum(curvatures * point**2))
    at_end = last(solve(clock, sj.PlateauSolver(solver), sj.Time(1.0)))
    np.testing.assert_allclose(jnp.exp(at_end.memory.log_decay), 30, rtol=0.05)


def test_bad_parts_are_named():
    clock = sj.plateau_clock(NET, TASK)
    for call, words in (
        (lambda: clock.event(3.0), r"until must be saddlejax.Escape\(\), Time\(t\) or Loss\(value\)"),
        (lambda: sj.PlateauController(rtol=-1.0), "rtol must be positive"),
        (lambda: sj.PlateauController(rtol=2.0), "rtol must be below one"),
        (lambda: sj.StiffPlateauSolver(rtol=-1.0), "rtol must be positive"),
        (lambda: sj.PlateauSolver(dfx.Kvaerno5()), "solver must be an explicit first-same-as-last"),
        (lambda: sj.plateau_clock(network(3, "tanh", 1e-3, width=8), 3.0), "task must be a saddlejax.Task"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
