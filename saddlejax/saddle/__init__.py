"""The saddle at zero weights: escape directions, their speeds, and how close they are to rank one."""

from ._along_flow import AlongFlow as AlongFlow, along_flow as along_flow
from .alignment import layer_cosines as layer_cosines
from .bounds import SpeedBound as SpeedBound, speed_bound as speed_bound
from .direction import escape_direction as escape_direction
from .energy import instantaneous_speed as instantaneous_speed, signal_energy as signal_energy
from .low_rank import (
    low_rank_margin as low_rank_margin,
    rank_one_excess as rank_one_excess,
    singular_values as singular_values,
    stable_rank as stable_rank,
)
from .model_direction import ModelDirection as ModelDirection
from .optima import Optimum as Optimum
from .order import SaddleOrder as SaddleOrder, saddle_order as saddle_order
from .origin import (
    Tangent as Tangent,
    leading_order_loss as leading_order_loss,
    origin_matrix as origin_matrix,
    tangent as tangent,
)
from .report import (
    directions_over_depth as directions_over_depth,
    directions_table as directions_table,
    record as record,
)
from .result import EscapeDirection as EscapeDirection
