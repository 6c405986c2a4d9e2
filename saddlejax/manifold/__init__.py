"""The symmetric submanifolds: wide networks of identical neurons, reduced to narrow ones, and what happens beside them."""

from ..networks.block_mlp import BlockMLP as BlockMLP
from .blocks import Blocks as Blocks
from .reduction import distance as distance, expand as expand, project as project, reduce as reduce
from .scalar_chain import balanced_log_times as balanced_log_times, chain as chain
from .transverse import (
    growth_rates as growth_rates,
    off_block_growth as off_block_growth,
    transverse_amplification as transverse_amplification,
    transverse_growth as transverse_growth,
)
