"""A convex quadratic problem with bounds on every variable, by projected Newton steps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MOST_STEPS = 60
MOST_HALVINGS = 30
RIDGE = 50
CONVERGED = 500
NO_VARIABLE = 1e-12
NEAR_BOUND = 1e-3


def solve_box(
    matrix: Float[Array, "n n"], linear: Float[Array, " n"], top: Float[Array, " n"], start: Float[Array, " n"]
) -> Float[Array, " n"]:
    """The minimum of `½ xᵀKx − cᵀx` over `0 ≤ x ≤ top`, with a positive semidefinite `K`.

    Projected Newton steps (Bertsekas, SIAM J. Control Optim. 20, 1982) in variables in which the diagonal of `K` is one.
    A variable whose row vanishes, or whose bound is zero, is zero. The search ends where the projected gradient is nothing
    but rounding, or where no step lowers the function.
    """
    eps = jnp.finfo(linear.dtype).eps
    diagonal = jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0))
    counts = (diagonal > NO_VARIABLE * jnp.max(diagonal)) & (top > 0)
    scale = jnp.where(counts, diagonal, 1)
    both = counts[:, None] & counts[None, :]
    scaled = jnp.where(both, matrix / (scale[:, None] * scale[None, :]), 0)
    scaled = scaled + jnp.diag(jnp.where(counts, RIDGE * eps, 1))
    c, ends = jnp.where(counts, linear / scale, 0), jnp.where(counts, top * scale, 0)
    size = jnp.max(jnp.abs(c))

    def slope(x: Array) -> Array:
        return jnp.matmul(scaled, x, precision="highest") - c

    def projected(x: Array, g: Array) -> Array:
        return jnp.max(jnp.abs(jnp.clip(x - g, 0, ends) - x))

    def unfinished(carry: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        _, steps, done = carry
        return ~done & (steps < MOST_STEPS)

    def newton(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, steps, _ = carry
        g = slope(x)
        near = jnp.minimum(jnp.minimum(projected(x, g), NEAR_BOUND * jnp.max(ends)), ends / 2)
        held = ((x <= near) & (g > 0)) | ((x >= ends - near) & (g < 0)) | ~counts
        free = ~held[:, None] & ~held[None, :]
        system = jnp.where(free, scaled, 0) + jnp.diag(jnp.where(held, 1, 0).astype(x.dtype))
        step = -jnp.where(held, g, jnp.linalg.solve(system, jnp.where(held, 0, g)))

        def change(share: Array) -> tuple[Array, Array]:
            moved = jnp.clip(x + share * step, 0, ends) - x
            return moved, jnp.dot(g + 0.5 * jnp.matmul(scaled, moved, precision="highest"), moved, precision="highest")

        def too_long(carry: tuple[Array, Array]) -> Bool[Array, ""]:
            share, halvings = carry
            return ~(change(share)[1] < 0) & (halvings < MOST_HALVINGS)

        share, halvings = jax.lax.while_loop(
            too_long, lambda carry: (0.5 * carry[0], carry[1] + 1), (jnp.ones_like(size), jnp.asarray(0))
        )
        lowered = halvings < MOST_HALVINGS
        x = jnp.where(lowered, x + change(share)[0], x)
        return x, steps + 1, ~lowered | (projected(x, slope(x)) <= CONVERGED * eps * size)

    x = jnp.clip(jnp.where(counts, start * scale, 0), 0, ends)
    done = projected(x, slope(x)) <= CONVERGED * eps * size
    x, _, _ = jax.lax.while_loop(unfinished, newton, (x, jnp.asarray(0), done))
    return jnp.where(counts, x / scale, 0)
