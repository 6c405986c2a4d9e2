"""saddlejax: how deep networks leave the plateaus of training from small weights."""

from . import tasks as tasks
from .activations import ACTIVATIONS as ACTIVATIONS
from .losses import cross_entropy as cross_entropy, mse as mse
from .networks import MLP as MLP, scale_layers as scale_layers
from .tasks import Task as Task
from .flow import (
    Escape as Escape,
    Flow as Flow,
    Loss as Loss,
    Save as Save,
    Status as Status,
    Time as Time,
    gradient_flow as gradient_flow,
)
