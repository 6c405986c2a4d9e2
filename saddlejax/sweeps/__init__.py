"""Sweeps: grids of gradient flows or escape directions, resumable, on one machine or many."""

from ._sweep import sweep as sweep
from .execute import Progress as Progress
from .measures import DIRECTION_VARIABLES as DIRECTION_VARIABLES, FLOW_VARIABLES as FLOW_VARIABLES
