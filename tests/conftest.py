"""The tests run in double precision; importing saddlejax itself changes no setting."""

import jax

jax.config.update("jax_enable_x64", True)
