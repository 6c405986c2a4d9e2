"""Functions of a large symmetric matrix times a vector, from products with the matrix alone."""

import math
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..networks import safe_norm

CHECK_EVERY = 4
CLOSED = 1e3
TAYLOR_TERMS = 18


def phi(order: int, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`φ_k(z) = ∫_0^1 e^{(1−x) z} x^{k−1}/(k−1)! dx`, so that `φ_0 = e^z` and `φ_{k+1}(z) = (φ_k(z) − 1/k!)/z`.

    By recursion where `|z| > 1`, by the Taylor series `Σ_j z^j/(j+k)!` elsewhere.
    """
    if order == 0:
        return jnp.exp(z)
    small = jnp.abs(z) <= 1
    near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
    series = jnp.zeros_like(z)
    for j in reversed(range(TAYLOR_TERMS)):
        series = series * near + 1 / math.factorial(j + order)
    value = jnp.exp(far)
    for k in range(order):
        value = (value - 1 / math.factorial(k)) / far
    return jnp.where(small, series, value)


class KrylovSpace(eqx.Module):
    """What Lanczos knows of a symmetric matrix `A` near a vector `v`: `g(A) v ≈ ‖v‖ V Q g(Λ) Qᵀ e_1`.

    - `basis`: the orthonormal rows `V`, `(size, n)`, zero where not used.
    - `values`: the eigenvalues `Λ` of the projected matrix, `(size,)`; those of unused rows are zero.
    - `vectors`: its eigenvectors `Q`, `(size, size)`.
    - `norm`: `‖v‖`.
    """

    basis: Float[Array, "size n"]
    values: Float[Array, " size"]
    vectors: Float[Array, "size size"]
    norm: Float[Array, ""]

    def apply(self, function: Callable[[Array], Array]) -> Float[Array, " n"]:
        """`g(A) v` for a scalar function `g` given on arrays."""
        return self.norm * jnp.matmul(_projected(self.values, self.vectors, function), self.basis, precision="highest")


def _projected(values: Array, vectors: Array, function: Callable[[Array], Array]) -> Array:
    return jnp.matmul(vectors, function(values) * vectors[0], precision="highest")


def krylov_space(
    product: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    vector: Float[Array, " n"],
    remainder: Callable[[Array], Array],
    measure: Callable[[Float[Array, " n"]], Float[Array, ""]],
    tolerance: Float[Array, ""],
    size: int,
) -> tuple[KrylovSpace, Float[Array, " n"], Int[Array, ""]]:
    """A Krylov space of `A` and `v` good enough for a function `g`, the error left, and the products spent.

    Lanczos with one pass of reorthogonalisation. The error after `m` vectors is estimated by its leading term
    `‖v‖ t_{m+1,m} [r(T)]_{m,1} v_{m+1}` (Saad, SIAM J. Numer. Anal. 29, 1992), where `r(z)` is the `remainder`
    `(g(z) − g(0))/z` of the function (`v` is the `vector`), and compared with the `tolerance` in the norm `measure`
    after every four vectors. At most `size` vectors are spent; what is then left is returned as an error and not hidden.
    """
    size = CHECK_EVERY * -(-min(size, vector.size) // CHECK_EVERY)

    def orthogonalise(basis: Array, block: Array, rest: Array) -> Array:
        # Block by block of the vectors there are: most spaces use a few of the rows that they have room for.
        rows = jax.lax.dynamic_slice_in_dim(basis, block * CHECK_EVERY, CHECK_EVERY)
        return rest - jnp.matmul(jnp.matmul(rows, rest, precision="highest"), rows, precision="highest")

    eps = jnp.finfo(vector.dtype).eps
    norm = safe_norm(vector)
    first = vector / jnp.where(norm > 0, norm, 1)
    zeros = jnp.zeros(size, vector.dtype)

    def extend(k: Array, carry: tuple) -> tuple:
        basis, diagonal, beside = carry
        image = product(basis[k])
        alpha = jnp.dot(basis[k], image, precision="highest")
        rest = image - alpha * basis[k] - jnp.where(k > 0, beside[k - 1], 0) * basis[k - 1]
        rest = jax.lax.fori_loop(0, k // CHECK_EVERY + 1, partial(orthogonalise, basis), rest)
        beta = jnp.linalg.norm(rest)
        # What is left of a closed space is rounding.
        more = beta > CLOSED * eps * jnp.linalg.norm(image)
        beta = jnp.where(more, beta, 0)
        following = jnp.where(more, rest / jnp.where(more, beta, 1), 0)
        return basis.at[k + 1].set(following), diagonal.at[k].set(alpha), beside.at[k].set(beta)

    def advance(carry: tuple) -> tuple:
        basis, diagonal, beside, used = carry[:4]
        basis, diagonal, beside = jax.lax.fori_loop(used, used + CHECK_EVERY, extend, (basis, diagonal, beside))
        used = used + CHECK_EVERY
        # Entries beyond those used are zero, and so is the coupling to them.
        coupling = jnp.where(jnp.arange(size - 1) + 1 < used, beside[:-1], 0)
        projected = jnp.diag(diagonal) + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)
        values, vectors = jnp.linalg.eigh(projected, symmetrize_input=False)
        last = beside[used - 1] * _projected(values, vectors, remainder)[used - 1]
        error = jnp.where(beside[used - 1] > 0, norm * last, 0) * basis[used]
        return basis, diagonal, beside, used, values, vectors, error

    def unfinished(carry: tuple) -> Array:
        used, error = carry[3], carry[6]
        return (used < size) & ~(measure(error) <= tolerance) & jnp.all(jnp.isfinite(error))

    basis = jnp.zeros((size + 1, vector.size), vector.dtype).at[0].set(first)
    carry = advance((basis, zeros, zeros, jnp.asarray(0)))
    basis, _, _, used, values, vectors, error = jax.lax.while_loop(unfinished, advance, carry)
    return KrylovSpace(basis[:-1], values, vectors, norm), error, used
