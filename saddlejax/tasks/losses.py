"""Losses of one sample; a task averages them over its samples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mse(prediction: Float[Array, " out"], target: Float[Array, " out"]) -> Float[Array, ""]:
    """Squared error `½‖f − y‖²`, summed over outputs."""
    return 0.5 * jnp.sum(jnp.square(prediction - target))


def cross_entropy(prediction: Float[Array, " out"], target: Int[Array, ""] | Float[Array, " out"]) -> Float[Array, ""]:
    """Cross-entropy `−Σ_k p_k log softmax(f)_k` of the logits `f`.

    `target` is a class number, or a vector of probabilities `p`.
    """
    log_probabilities = jax.nn.log_softmax(prediction)
    if jnp.ndim(target) == 0:
        return -log_probabilities[target]
    return -jnp.sum(target * log_probabilities)
