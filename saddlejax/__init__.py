"""saddlejax: how deep networks leave the plateaus of training from small weights."""

from . import saddle as saddle, tasks as tasks
from .activations import ACTIVATIONS as ACTIVATIONS
from .losses import cross_entropy as cross_entropy, mse as mse
from .networks import MLP as MLP, scale_layers as scale_layers
from .saddle import (
    escape_direction as escape_direction,
    low_rank_margin as low_rank_margin,
    signal_energy as signal_energy,
)
from .tasks import Task as Task
