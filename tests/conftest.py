"""The tests run in double precision; importing saddlejax itself changes no setting.

Nearly all of their time is compilation, so they let XLA optimise less. What it computes is the same up to rounding.
"""

import os

os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax

jax.config.update("jax_enable_x64", True)
