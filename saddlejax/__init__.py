"""saddlejax: how deep networks leave the plateaus of training from small weights."""

from . import tasks as tasks
from .activation_classes import ActivationClass as ActivationClass, classify_activation as classify_activation
from .activations import ACTIVATIONS as ACTIVATIONS
from .gradient_descent import gradient_descent as gradient_descent
from .imbalance import (
    imbalance as imbalance,
    imbalance_matrices as imbalance_matrices,
    imbalance_rate as imbalance_rate,
)
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
