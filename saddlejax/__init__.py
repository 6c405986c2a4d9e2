"""saddlejax: how deep networks leave the plateaus of training from small weights."""

import importlib
from typing import TYPE_CHECKING

from . import (
    law as law,
    manifold as manifold,
    saddle as saddle,
    staircase as staircase,
    tasks as tasks,
)
from .activation_classes import ActivationClass as ActivationClass, classify_activation as classify_activation
from .activations import ACTIVATIONS as ACTIVATIONS
from .bottleneck import bottleneck_layers as bottleneck_layers
from .critical_exponent import critical_exponent as critical_exponent
from .escape_scan import escape_scan as escape_scan
from .flow import (
    Escape as Escape,
    ExponentialRosenbrock as ExponentialRosenbrock,
    Flow as Flow,
    Loss as Loss,
    Save as Save,
    Status as Status,
    Time as Time,
    gradient_flow as gradient_flow,
)
from .gradient_descent import gradient_descent as gradient_descent
from .imbalance import (
    imbalance as imbalance,
    imbalance_matrices as imbalance_matrices,
    imbalance_rate as imbalance_rate,
)
from .law import escape_time as escape_time
from .losses import cross_entropy as cross_entropy, mse as mse
from .networks import MLP as MLP, scale_layers as scale_layers
from .prediction import (
    EscapePrediction as EscapePrediction,
    bottleneck_for_steps as bottleneck_for_steps,
    predict_escape as predict_escape,
    scale_for_steps as scale_for_steps,
)
from .saddle import (
    EscapeDirection as EscapeDirection,
    escape_direction as escape_direction,
    low_rank_margin as low_rank_margin,
    signal_energy as signal_energy,
)
from .signal_growth import signal_growth as signal_growth
from .stationary import StationaryPoint as StationaryPoint, nearby_stationary_point as nearby_stationary_point
from .sweep import sweep as sweep
from .tasks import Task as Task
from .universality import collapse as collapse

if TYPE_CHECKING:
    from . import plot as plot


def __getattr__(name: str) -> object:
    """`saddlejax.plot` on its first use: Matplotlib takes long to import."""
    if name == "plot":
        return importlib.import_module(".plot", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "plot"})
