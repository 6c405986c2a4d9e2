"""Figures: matplotlib Axes in, Axes out."""

from ._directions import directions as directions, singular_values as singular_values, speeds as speeds
from ._flows import flow as flow, staircase as staircase
from ._style import COLOURS as COLOURS, MARKERS as MARKERS, quiet as quiet
from ._sweeps import collapse as collapse, escape_times as escape_times, exponents as exponents
