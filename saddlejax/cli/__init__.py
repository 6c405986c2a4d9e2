"""The command line."""

from . import direction as direction, escape as escape, staircase as staircase, sweep as sweep
from ._app import app as app
