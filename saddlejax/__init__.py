"""saddlejax: how deep networks leave the plateaus of training from small weights."""

import importlib
from typing import TYPE_CHECKING

from . import law as law, manifold as manifold, saddle as saddle, staircase as staircase, tasks as tasks
from .bottleneck import bottleneck_layers as bottleneck_layers
from .curvature.stationary import StationaryPoint as StationaryPoint, nearby_stationary_point as nearby_stationary_point
from .flow import (
    Escape as Escape,
    ExponentialRosenbrock as ExponentialRosenbrock,
    Flow as Flow,
    Loss as Loss,
    PlateauClock as PlateauClock,
    PlateauController as PlateauController,
    PlateauSolver as PlateauSolver,
    Save as Save,
    SlidingSolver as SlidingSolver,
    Status as Status,
    StiffPlateauSolver as StiffPlateauSolver,
    Time as Time,
    gradient_flow as gradient_flow,
    plateau_clock as plateau_clock,
)
from .flow.descent import gradient_descent as gradient_descent
from .law import escape_time as escape_time
from .law.budget import bottleneck_for_steps as bottleneck_for_steps, scale_for_steps as scale_for_steps
from .law.exponent import critical_exponent as critical_exponent
from .law.predict import predict_escape as predict_escape
from .law.prediction import EscapePrediction as EscapePrediction
from .law.universality import collapse as collapse
from .networks.activation_class import ActivationClass as ActivationClass, classify_activation as classify_activation
from .networks.activations import ACTIVATIONS as ACTIVATIONS
from .networks.kinked import kinked as kinked
from .networks.mlp import MLP as MLP
from .norm_imbalance import (
    imbalance as imbalance,
    imbalance_matrices as imbalance_matrices,
    imbalance_rate as imbalance_rate,
)
from .saddle import (
    EscapeDirection as EscapeDirection,
    escape_direction as escape_direction,
    low_rank_margin as low_rank_margin,
    saddle_order as saddle_order,
    signal_energy as signal_energy,
)
from .saddle.energy_growth import signal_growth as signal_growth
from .saddle.signal import signal_strength as signal_strength
from .scaling import scale_layers as scale_layers
from .sweeps import sweep as sweep
from .sweeps.scan import escape_scan as escape_scan
from .tasks import Task as Task
from .tasks.losses import cross_entropy as cross_entropy, mse as mse

if TYPE_CHECKING:
    from . import plot as plot


def __getattr__(name: str) -> object:
    """`saddlejax.plot` on its first use: Matplotlib takes long to import."""
    if name == "plot":
        return importlib.import_module(".plot", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "plot"})
