"""The tests run in double precision; importing saddlejax itself changes no setting.

Nearly all of their time is compilation, so they let XLA optimise less. What it computes is the same up to rounding.
"""

import os

os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest

jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled():
    """Every compiled function maps memory, of which Linux lets a process have a limited number of pieces."""
    yield
    jax.clear_caches()
