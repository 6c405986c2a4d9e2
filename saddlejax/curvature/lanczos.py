"""Eigenvalues of a large symmetric matrix, and its functions times a vector, from products with the matrix alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._numerics import safe_norm

FIRST = 8  # most spaces need no more vectors; up to there the error is estimated after every one of them,
BLOCK = 4  # beyond after so many
CLOSED = 1e3
NEAR = 10
TAYLOR_TERMS = 18

Function = Callable[[Array], Array]
Product = Callable[[Float[Array, " n"]], Float[Array, " n"]]


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


class Lanczos(eqx.Module):
    """The Lanczos process for a symmetric matrix, with one pass of reorthogonalisation.

    - `basis`: the orthonormal basis of the Krylov space so far, a row each, `(size, n)`; zero where not used.
    - `diagonal`, `off_diagonal`: the tridiagonal matrix in that basis. The last used entry of `off_diagonal`, which
      couples the basis to `next_vector`, is zero where the space is closed, that is, mapped into itself.
    - `next_vector`: the unit vector to be added next, zero where the space is closed.
    - `used`: how many vectors have been added.
    """

    basis: Float[Array, "size n"]
    diagonal: Float[Array, " size"]
    off_diagonal: Float[Array, " size"]
    next_vector: Float[Array, " n"]
    used: Int[Array, ""]

    @classmethod
    def start(cls, vector: Float[Array, " n"], size: int) -> "Lanczos":
        """The empty space from which a vector grows one of at most `size` dimensions."""
        norm, zeros = safe_norm(vector), jnp.zeros(size, vector.dtype)
        basis = jnp.zeros((size, vector.size), vector.dtype)
        return cls(basis, zeros, zeros, vector / jnp.where(norm > 0, norm, 1), jnp.asarray(0))

    def extended(self, product: Product) -> "Lanczos":
        """The space with one vector more, from one product with the matrix."""
        k, current = self.used, self.next_vector
        basis = self.basis.at[k].set(current)
        before = jnp.maximum(k - 1, 0)
        image = product(current)
        diagonal = jnp.dot(current, image, precision="highest")
        rest = image - diagonal * current - jnp.where(k > 0, self.off_diagonal[before], 0) * basis[before]
        rest = rest - jnp.matmul(jnp.matmul(basis, rest, precision="highest"), basis, precision="highest")
        norm = safe_norm(rest)
        # Beyond a closed space there is nothing but rounding.
        closed = norm <= CLOSED * jnp.finfo(rest.dtype).eps * safe_norm(image)
        return Lanczos(
            basis,
            self.diagonal.at[k].set(diagonal),
            self.off_diagonal.at[k].set(jnp.where(closed, 0, norm)),
            jnp.where(closed, 0, rest / jnp.where(closed, 1, norm)),
            k + jnp.any(current != 0),
        )

    def enlarged(self, size: int) -> "Lanczos":
        """The same with room for `size` vectors."""
        more = size - self.diagonal.size
        ends = jnp.pad(self.diagonal, (0, more)), jnp.pad(self.off_diagonal, (0, more))
        return Lanczos(jnp.pad(self.basis, ((0, more), (0, 0))), *ends, self.next_vector, self.used)

    def eigh(self, unused: Array | float = 0) -> tuple[Float[Array, " size"], Float[Array, "size size"]]:
        """Eigenvalues, in increasing order, and eigenvectors of the matrix in this basis.

        Those of places not used are `unused`. All eigenvalues are NaN where the matrix is not finite.
        """
        places = jnp.arange(self.diagonal.size)
        diagonal = jnp.where(places < self.used, self.diagonal, unused)
        coupling = jnp.where(places[1:] < self.used, self.off_diagonal[:-1], 0)
        matrix = jnp.diag(diagonal) + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)
        finite = jnp.all(jnp.isfinite(matrix))
        values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0), symmetrize_input=False)
        return jnp.where(finite, values, jnp.nan), vectors


def ritz_values(product: Product, start: Float[Array, " n"], size: int) -> Float[Array, " size"]:
    """Approximate eigenvalues of a symmetric matrix in increasing order, from a Krylov space of at most `size` vectors.

    The ends of the spectrum are approached first and from within; an eigenvalue appears once, however often it occurs.
    Where the space closes early the places left over are NaN, at the end.
    """
    size = min(size, start.size)
    space = jax.lax.fori_loop(0, size, lambda _, space: space.extended(product), Lanczos.start(start, size))
    # The places not used get a value above the spectrum, by which they come last.
    beyond = 1 + jnp.max(jnp.abs(space.diagonal)) + 2 * jnp.max(space.off_diagonal)
    values, _ = space.eigh(unused=beyond)
    return jnp.where(jnp.arange(size) < space.used, values, jnp.nan)


def extreme_eigenvalues(product: Product, start: Float[Array, " n"], size: int) -> tuple[Array, Array]:
    """The lowest and highest eigenvalue of a symmetric matrix, from a Krylov space of the given size.

    Both values lie within the spectrum.
    """
    values = ritz_values(product, start, size)
    return values[0], jnp.nanmax(values)


class KrylovSpace(eqx.Module):
    """What Lanczos knows of a symmetric matrix `A` near a vector `v`: `g(A) v ≈ ‖v‖ V Q g(Λ) Qᵀ e_1`.

    - `basis`: the orthonormal rows `V`, `(size, n)`, zero where not used.
    - `values`: the eigenvalues `Λ` of the projected matrix, `(size,)`; those of unused rows are zero.
    - `vectors`: its eigenvectors `Q`, `(size, size)`.
    - `norm`: `‖v‖`.
    - `error`: the estimated error of the function that the space was made for.
    - `used`: the number of vectors in the space, each of which took a product.
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


class Estimate(eqx.Module):
    """A Krylov space while it grows, and how good it is.

    The estimated error is `coefficient · next_vector`. `size` is the measure of `next_vector`, or of an earlier one as
    long as the error is far above the tolerance.
    """

    lanczos: Lanczos
    values: Float[Array, " size"]
    vectors: Float[Array, "size size"]
    coefficient: Float[Array, ""]
    size: Float[Array, ""]
    converged: Bool[Array, ""]

    @classmethod
    def start(cls, vector: Float[Array, " n"], size: int) -> "Estimate":
        """Of the empty space."""
        zero = jnp.zeros((), vector.dtype)
        values, vectors = jnp.zeros(size, vector.dtype), jnp.zeros((size, size), vector.dtype)
        return cls(Lanczos.start(vector, size), values, vectors, zero, zero, jnp.asarray(False))

    def enlarged(self, size: int) -> "Estimate":
        """The same with room for `size` vectors."""
        more = size - self.values.size
        values, vectors = jnp.pad(self.values, (0, more)), jnp.pad(self.vectors, (0, more))
        return Estimate(self.lanczos.enlarged(size), values, vectors, self.coefficient, self.size, self.converged)

    def space(self, norm: Array) -> KrylovSpace:
        """The space as it stands, for a vector of the given norm."""
        lanczos = self.lanczos
        error = self.coefficient * lanczos.next_vector
        return KrylovSpace(lanczos.basis, self.values, self.vectors, norm, error, lanczos.used)


@dataclass(frozen=True)
class KrylovProblem:
    """A Krylov space of `A` and a vector `v`, to be made good enough for a function `g`.

    The error after `m` vectors is estimated by its leading term `‖v‖ t_{m+1,m} [r(T)]_{m,1} v_{m+1}` (Saad, SIAM J.
    Numer. Anal. 29, 1992), where `r(z)` is the `remainder` `(g(z) − g(0))/z` of the function, and compared with the
    `tolerance` in the norm `measure`. At most `size` vectors are spent, rounded up to a multiple of four; the error that
    is then left is returned.
    """

    product: Product
    vector: Float[Array, " n"]
    remainder: Function
    measure: Callable[[Float[Array, " n"]], Float[Array, ""]]
    tolerance: Float[Array, ""]
    size: int

    def space(self) -> KrylovSpace:
        """The space itself, with room for `size` vectors."""
        return self._large(self._small()).space(safe_norm(self.vector))

    def apply(self, *functions: Function) -> Applied:
        """Functions of `A` times `v`; room for `size` vectors is taken only where it is needed."""
        norm = safe_norm(self.vector)

        def applied(estimate: Estimate) -> Applied:
            space = estimate.space(norm)
            return Applied(space.apply(*functions), space.extremes, space.error, space.used)

        small = self._small()
        if self._room(self.size) == self._room(FIRST):
            return applied(small)
        return jax.lax.cond(small.converged, applied, lambda estimate: applied(self._large(estimate)), small)

    def _room(self, size: int) -> int:
        return BLOCK * -(-min(size, self.size, self.vector.size) // BLOCK)

    def _small(self) -> Estimate:
        return self._grown(Estimate.start(self.vector, self._room(FIRST)), 1)

    def _large(self, small: Estimate) -> Estimate:
        size = self._room(self.size)
        return small if size == small.values.size else self._grown(small.enlarged(size), BLOCK)

    def _grown(self, estimate: Estimate, every: int) -> Estimate:
        """Add vectors, so many at a time, until the space is good enough or full."""
        norm = safe_norm(self.vector)

        def advance(estimate: Estimate) -> Estimate:
            lanczos = jax.lax.fori_loop(0, every, lambda _, space: space.extended(self.product), estimate.lanczos)
            values, vectors = lanczos.eigh()
            last = lanczos.used - 1
            coupling = lanczos.off_diagonal[last]
            coefficient = norm * coupling * _projected(values, vectors, self.remainder)[last]
            coefficient = jnp.where(coupling == 0, 0, coefficient)
            # The measure may cost more than a product: it is taken where it may decide.
            near = ~(jnp.abs(coefficient) * estimate.size > NEAR * self.tolerance)
            measured = jax.lax.cond(near, self.measure, lambda _: estimate.size, lanczos.next_vector)
            converged = near & (jnp.abs(coefficient) * measured <= self.tolerance)
            return Estimate(lanczos, values, vectors, coefficient, measured, converged)

        def unfinished(estimate: Estimate) -> Array:
            room = estimate.lanczos.used < estimate.values.size
            return room & ~estimate.converged & jnp.isfinite(estimate.coefficient)

        return jax.lax.while_loop(unfinished, advance, estimate)


def _projected(values: Array, vectors: Array, function: Function) -> Array:
    return jnp.matmul(vectors, function(values) * vectors[0], precision="highest")
