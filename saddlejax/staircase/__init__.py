"""From saddle to saddle: the plateaus of a flow."""

from ..flow.plateaus import (
    Plateau as Plateau,
    Plateaus as Plateaus,
    crossing_log_time as crossing_log_time,
    plateaus as plateaus,
)
