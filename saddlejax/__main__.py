"""`python -m saddlejax`."""

from .cli import app

app(prog_name="saddlejax")
