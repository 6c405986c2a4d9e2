"""How a flow ended."""

import equinox as eqx


class Status(eqx.Enumeration):
    """The outcome of a flow, one for each lane of a batch. The first four are what was asked for."""

    escaped = "escaped"
    time_reached = "time reached"
    loss_reached = "loss reached"
    steps_taken = "all steps taken"
    no_plateau = "no plateau: nothing had to be waited for, so that there is nothing to escape from"
    stationary = "stationary: the gradient vanished, so the flow cannot move on"
    below_rounding = "below rounding: what is still to be learned is too small beside what has been learned for this floating-point type"
    no_signal = "no signal: the loss has no slope at zero output, so the origin is a minimum and not a saddle"
    met_at_start = "target already met at the start"
    step_limit = "step limit reached before the target"
    underflow = "underflow: the gradient is too small for this floating-point type"
    stuck = "stuck: no step was found that lowers the loss, though all numbers are finite"
    non_finite = "non-finite: no step was found whose result is finite and does not raise the loss"


AS_ASKED = (Status.escaped, Status.time_reached, Status.loss_reached, Status.steps_taken)
"""The outcomes that were asked for."""
