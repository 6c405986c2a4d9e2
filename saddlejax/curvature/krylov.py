"""Functions of a large symmetric matrix times a vector, from products with the matrix alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..networks.mlp import safe_norm

FIRST = 8  # most spaces close within so many vectors, and are looked at after every one of them
BLOCK = 4
CLOSED = 1e3
NEAR = 10
TAYLOR_TERMS = 18

Function = Callable[[Array], Array]


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
    - `error`: what is left of the function that the space was made for.
    - `used`: the vectors in the space, each of which took a product.
    """

    basis: Float[Array, "size n"]
    values: Float[Array, " size"]
    vectors: Float[Array, "size size"]
    norm: Float[Array, ""]
    error: Float[Array, " n"]
    used: Int[Array, ""]

    @property
    def extremes(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The lowest and the highest eigenvalue of `A` seen from `v`, zero if that is positive, or negative."""
        return jnp.min(self.values), jnp.max(self.values)

    def apply(self, *functions: Function) -> Float[Array, "functions n"]:
        """`g(A) v` for scalar functions `g` given on arrays, a row each."""
        projected = jnp.stack([_projected(self.values, self.vectors, function) for function in functions])
        return self.norm * jnp.matmul(projected, self.basis, precision="highest")


class Applied(eqx.Module):
    """Functions of a matrix times a vector.

    - `results`: `g(A) v`, a row for each function.
    - `extremes`: the lowest and the highest eigenvalue of `A` seen from `v`, zero if that is positive, or negative.
    - `error`, `used`: of the Krylov space.
    """

    results: Float[Array, "functions n"]
    extremes: tuple[Float[Array, ""], Float[Array, ""]]
    error: Float[Array, " n"]
    used: Int[Array, ""]


class Lanczos(eqx.Module):
    """A Krylov space while it grows: the tridiagonal projected matrix, its next basis vector, and how good it is.

    `following` is the next basis vector, which is not yet part of the space. The estimated error is `left * following`.
    `weight` is `measure(following)`; while the error is far above the tolerance, the value for an earlier vector serves.
    """

    basis: Float[Array, "size n"]
    diagonal: Float[Array, " size"]
    beside: Float[Array, " size"]
    values: Float[Array, " size"]
    vectors: Float[Array, "size size"]
    following: Float[Array, " n"]
    left: Float[Array, ""]
    weight: Float[Array, ""]
    used: Int[Array, ""]
    closed: Bool[Array, ""]

    def space(self, norm: Array) -> KrylovSpace:
        """The space as it stands, for a vector of the given norm."""
        return KrylovSpace(self.basis, self.values, self.vectors, norm, self.left * self.following, self.used)


@dataclass(frozen=True)
class KrylovProblem:
    """A Krylov space of `A` and a vector `v`, to be made good enough for a function `g`.

    Lanczos with one pass of reorthogonalisation. The error after `m` vectors is estimated by its leading term
    `‖v‖ t_{m+1,m} [r(T)]_{m,1} v_{m+1}` (Saad, SIAM J. Numer. Anal. 29, 1992), where `r(z)` is the `remainder`
    `(g(z) − g(0))/z` of the function, and compared with the `tolerance` in the norm `measure`. At most `size` vectors
    are spent, rounded up to a multiple of four; what is then left is returned as an error and not hidden.
    """

    product: Callable[[Float[Array, " n"]], Float[Array, " n"]]
    vector: Float[Array, " n"]
    remainder: Function
    measure: Callable[[Float[Array, " n"]], Float[Array, ""]]
    tolerance: Float[Array, ""]
    size: int

    def space(self) -> KrylovSpace:
        """The space itself, with room for `size` vectors."""
        return self._whole(self._small()).space(safe_norm(self.vector))

    def apply(self, *functions: Function) -> Applied:
        """Functions of `A` times `v`; the larger room is taken only where it is needed."""
        norm = safe_norm(self.vector)

        def applied(grown: Lanczos) -> Applied:
            space = grown.space(norm)
            return Applied(space.apply(*functions), space.extremes, space.error, space.used)

        small = self._small()
        if self._room(self.size) == self._room(FIRST):
            return applied(small)
        return jax.lax.cond(small.closed, applied, lambda grown: applied(self._whole(grown)), small)

    def _room(self, size: int) -> int:
        return BLOCK * -(-min(size, self.size, self.vector.size) // BLOCK)

    def _small(self) -> Lanczos:
        size, dtype = self._room(FIRST), self.vector.dtype
        norm = safe_norm(self.vector)
        zero = jnp.zeros((), dtype)
        begin = Lanczos(
            basis=jnp.zeros((size, self.vector.size), dtype),
            diagonal=jnp.zeros(size, dtype),
            beside=jnp.zeros(size, dtype),
            values=jnp.zeros(size, dtype),
            vectors=jnp.zeros((size, size), dtype),
            following=self.vector / jnp.where(norm > 0, norm, 1),
            left=zero,
            weight=zero,
            used=jnp.asarray(0),
            closed=jnp.asarray(False),
        )
        return self._grow(begin, 1)

    def _whole(self, small: Lanczos) -> Lanczos:
        more = self._room(self.size) - small.diagonal.size
        if more == 0:
            return small
        rows, square = ((0, more), (0, 0)), ((0, more), (0, more))
        larger = eqx.tree_at(
            lambda space: (space.basis, space.diagonal, space.beside, space.values, space.vectors),
            small,
            (
                jnp.pad(small.basis, rows),
                jnp.pad(small.diagonal, (0, more)),
                jnp.pad(small.beside, (0, more)),
                jnp.pad(small.values, (0, more)),
                jnp.pad(small.vectors, square),
            ),
        )
        return self._grow(larger, BLOCK)

    def _grow(self, begin: Lanczos, every: int) -> Lanczos:
        """Add vectors, so many at a time, until the space is good enough or full."""
        size = begin.diagonal.size
        norm = safe_norm(self.vector)

        def advance(grown: Lanczos) -> Lanczos:
            grown = jax.lax.fori_loop(0, every, lambda _, g: self._extend(g), grown)
            # The coefficient that couples the last vector to the next one is not part of the projected matrix.
            coupling = jnp.where(jnp.arange(size - 1) + 1 < grown.used, grown.beside[:-1], 0)
            projected = jnp.diag(grown.diagonal) + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)
            finite = jnp.all(jnp.isfinite(projected))  # elsewhere the eigenvalues of NaN would be asked for
            values, vectors = jnp.linalg.eigh(jnp.where(finite, projected, 0), symmetrize_input=False)
            last = grown.used - 1
            left = norm * grown.beside[last] * _projected(values, vectors, self.remainder)[last]
            left = jnp.where(grown.beside[last] > 0, left, 0)
            left = jnp.where(finite, left, jnp.nan)
            # The measure may cost more than a product: it is taken where it may decide.
            near = ~(jnp.abs(left) * grown.weight > NEAR * self.tolerance)
            weight = jax.lax.cond(near, self.measure, lambda _: grown.weight, grown.following)
            closed = near & (jnp.abs(left) * weight <= self.tolerance)
            return eqx.tree_at(
                lambda g: (g.values, g.vectors, g.left, g.weight, g.closed),
                grown,
                (values, vectors, left, weight, closed),
            )

        def unfinished(grown: Lanczos) -> Array:
            return (grown.used < size) & ~grown.closed & jnp.isfinite(grown.left)

        return jax.lax.while_loop(unfinished, advance, begin)

    def _extend(self, grown: Lanczos) -> Lanczos:
        """One vector more."""
        k, current = grown.used, grown.following
        basis = grown.basis.at[k].set(current)
        before = jnp.maximum(k - 1, 0)
        image = self.product(current)
        alpha = jnp.dot(current, image, precision="highest")
        rest = image - alpha * current - jnp.where(k > 0, grown.beside[before], 0) * basis[before]
        rest = jax.lax.fori_loop(0, k // BLOCK + 1, partial(_orthogonalise, basis), rest)
        beta = jnp.linalg.norm(rest)
        # What is left of a closed space is rounding.
        more = beta > CLOSED * jnp.finfo(rest.dtype).eps * jnp.linalg.norm(image)
        beta = jnp.where(more, beta, 0)
        return eqx.tree_at(
            lambda g: (g.basis, g.diagonal, g.beside, g.following, g.used),
            grown,
            (
                basis,
                grown.diagonal.at[k].set(alpha),
                grown.beside.at[k].set(beta),
                jnp.where(more, rest / jnp.where(more, beta, 1), 0),
                k + 1,
            ),
        )


def _projected(values: Array, vectors: Array, function: Function) -> Array:
    return jnp.matmul(vectors, function(values) * vectors[0], precision="highest")


def _orthogonalise(basis: Array, block: Array, rest: Array) -> Array:
    # Block by block of the vectors there are: most spaces use a few of the rows that they have room for.
    rows = jax.lax.dynamic_slice_in_dim(basis, block * BLOCK, BLOCK)
    return rest - jnp.matmul(jnp.matmul(rows, rest, precision="highest"), rows, precision="highest")
