"""Gradient flow in the plateau clock."""

from ._gradient_flow import gradient_flow as gradient_flow
from .exponential import ExponentialRosenbrock as ExponentialRosenbrock
from .record import Save as Save
from .result import Flow as Flow
from .status import Status as Status
from .until import Escape as Escape, Loss as Loss, Time as Time
