"""Gradient flow in the plateau clock."""

from ._gradient_flow import gradient_flow as gradient_flow
from .clock import PlateauClock as PlateauClock, plateau_clock as plateau_clock
from .controller import PlateauController as PlateauController
from .exponential import ExponentialRosenbrock as ExponentialRosenbrock
from .record import Save as Save
from .result import Flow as Flow
from .sliding_solver import SlidingSolver as SlidingSolver
from .solvers import PlateauSolver as PlateauSolver
from .status import Status as Status
from .stiff_solver import StiffPlateauSolver as StiffPlateauSolver
from .until import Escape as Escape, Loss as Loss, Time as Time
