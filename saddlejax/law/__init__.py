"""The escape-time law: in closed form, measured by differentiating flows, and predicted for a real network."""

from .closed_form import escape_time as escape_time, log_escape_time as log_escape_time
