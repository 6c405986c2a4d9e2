"""Data sets, teachers, and the checks of data."""

import gzip
import struct

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saddlejax as sj
from saddlejax.objective import as_problem, task_loss
from saddlejax.tasks.task import zero_loss

KEY = jax.random.key(5)


def test_digits_are_centred_and_scaled():
    task = sj.tasks.digits()
    assert task.x.shape == (1797, 64)
    assert task.y.shape == (1797, 10)
    np.testing.assert_allclose(jnp.mean(task.x, axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(jnp.mean(task.y, axis=0), 0, atol=1e-10)
    assert float(jnp.mean(jnp.sum(task.x**2, axis=1))) == pytest.approx(1)
    labels = sj.tasks.digits(loss=sj.cross_entropy)
    np.testing.assert_array_equal(labels.y, jnp.argmax(task.y, axis=1))
    assert labels.out_size == 10
    assert float(zero_loss(labels)) == pytest.approx(np.log(10))


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist_arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 28, 28), dtype=np.uint8), rng.integers(0, 10, 12, dtype=np.uint8)


def test_mnist_from_idx_gzip_and_npz_agree(tmp_path, mnist_arrays):
    images, labels = mnist_arrays
    folders = {name: tmp_path / name for name in ("plain", "zipped", "dotted")}
    for folder in folders.values():
        folder.mkdir()
    (folders["plain"] / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folders["plain"] / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (folders["zipped"] / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folders["zipped"] / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (folders["dotted"] / "train-images.idx3-ubyte").write_bytes(idx(images))
    (folders["dotted"] / "train-labels.idx1-ubyte").write_bytes(idx(labels))
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images[:3], y_test=labels[:3])
    flat = images.reshape(12, 784).astype(float)
    centred = flat - flat.mean(axis=0)
    expected = centred / np.sqrt((centred**2).sum(axis=1).mean())
    for source in (*folders.values(), tmp_path / "mnist.npz", str(tmp_path / "mnist.npz")):
        task = sj.tasks.mnist(source)
        np.testing.assert_allclose(task.x, expected, atol=1e-10)
        np.testing.assert_array_equal(np.argmax(task.y, axis=1), labels)
    assert sj.tasks.mnist(tmp_path / "mnist.npz", split="test").samples == 3
    assert sj.tasks.mnist(folders["plain"], samples=5).samples == 5


def test_missing_or_damaged_mnist_files_are_named(tmp_path, mnist_arrays):
    with pytest.raises(FileNotFoundError) as missing:
        sj.tasks.mnist(tmp_path)
    for name in ("train-images-idx3-ubyte,", "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte", str(tmp_path)):
        assert name in str(missing.value)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.npz"):
        sj.tasks.mnist(tmp_path / "absent.npz")
    images, labels = mnist_arrays
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images)[:-5])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(ValueError, match="is not a whole IDX file"):
        sj.tasks.mnist(tmp_path)
    np.savez(tmp_path / "half.npz", x_train=images)
    with pytest.raises(ValueError, match="must hold y_train"):
        sj.tasks.mnist(tmp_path / "half.npz")
    with pytest.raises(ValueError, match="split must be"):
        sj.tasks.mnist(tmp_path, split="validation")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    with pytest.raises(ValueError, match="samples must be at most 12"):
        sj.tasks.mnist(tmp_path, samples=13)


def test_labels_that_are_no_classes_are_refused(tmp_path, mnist_arrays):
    images, labels = mnist_arrays
    for wrong, words in (
        (labels + 0.5, "whole numbers from 0 to 9, but 12 were not"),
        (labels * 0.0 - 1, "12 were not: -1"),
        (labels * 0.0 + 10, "12 were not: 10"),
        (np.eye(10)[labels], r"of shape \(12, 10\)"),
    ):
        np.savez(tmp_path / "wrong.npz", x_train=images, y_train=wrong)
        with pytest.raises(ValueError, match=f"^source: .*{words}"):
            sj.tasks.mnist(tmp_path / "wrong.npz")
    np.savez(tmp_path / "whole.npz", x_train=images, y_train=labels.astype(float))
    np.testing.assert_array_equal(
        sj.tasks.mnist(tmp_path / "whole.npz").x, sj.tasks.load(str(tmp_path / "whole.npz")).x
    )


def test_a_file_of_ones_own_is_classes_or_a_regression(tmp_path):
    from sklearn.datasets import load_digits

    path, raw = tmp_path / "own.npz", load_digits()
    np.savez(path, x=raw.data, y=raw.target)
    own, digits = sj.tasks.load(str(path)), sj.tasks.digits()
    np.testing.assert_array_equal(own.x, digits.x)
    np.testing.assert_array_equal(own.y, digits.y)
    x, y = np.arange(12.0).reshape(4, 3), np.array([0.5, -1.0, 2.0, 0.0])
    for targets in (y, y[:, None], np.stack([y, y], axis=1).astype(np.float32), (2 * y[:, None]).astype(int)):
        np.savez(path, x=x, y=targets)
        task = sj.tasks.load(str(path), 3)
        np.testing.assert_array_equal(task.x, x[:3])
        np.testing.assert_array_equal(task.y, targets.reshape(4, -1)[:3])
        assert task.loss is sj.mse
    for arrays, words in (
        ({"x": x}, "data: .* must hold y, or x_train and y_train, but it holds"),
        ({"x": x, "y": y[:3]}, "data: .* as many rows of y as of x"),
        ({"x": x, "y": np.array(list("abcd"))}, "data: .* must hold real numbers, but y"),
        ({"x": x, "y": np.array([0, 1, -1, 0])}, "data: .* whole numbers from 0, but 1 were not: -1"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=words):
            sj.tasks.load(str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"data: .* is not a whole \.npz file"):
        sj.tasks.load(str(path))
    with pytest.raises(FileNotFoundError, match="data: no file"):
        sj.tasks.load("nowhere.npz")


def test_linear_teacher_is_whitened_with_known_plateaus():
    task = sj.tasks.linear_teacher([4.0, 2.0, 1.0, 0.5], in_size=8)
    np.testing.assert_allclose(task.x.T @ task.x / task.samples, np.eye(8), atol=1e-10)
    covariance = task.y.T @ task.x / task.samples
    np.testing.assert_allclose(jnp.linalg.svd(covariance)[1], [4, 2, 1, 0.5])
    assert float(zero_loss(task)) == pytest.approx(10.625)


def test_single_index_teacher_depends_on_one_direction():
    task = sj.tasks.single_index(jnp.tanh, in_size=5, samples=300, key=KEY)
    direction = jnp.linalg.lstsq(task.x, jnp.arctanh(task.y))[0]
    assert float(jnp.linalg.norm(direction)) == pytest.approx(1)
    np.testing.assert_allclose(task.y, jnp.tanh(task.x @ direction), atol=1e-10)


def test_loss_is_the_weighted_mean_over_samples():
    x, y = jax.random.normal(KEY, (4, 3)), jax.random.normal(KEY, (4, 2))
    net = sj.MLP([3, 5, 2], "tanh", key=KEY)
    each = jnp.array([sj.mse(net(a), b) for a, b in zip(x, y, strict=True)])
    assert float(task_loss(net, sj.Task(x, y))) == pytest.approx(float(jnp.mean(each)))
    weights = jnp.array([0.1, 0.2, 0.3, 0.4])
    assert float(task_loss(net, sj.Task(x, y, sample_weights=weights))) == pytest.approx(float(weights @ each))
    custom = sj.Task(x, y, loss=lambda f, t: jnp.sum(jnp.cosh(f - t)))
    assert float(zero_loss(custom)) == pytest.approx(float(jnp.mean(jnp.sum(jnp.cosh(y), axis=1))))


X, Y = np.ones((4, 3)), np.ones((4, 2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sj.Task(X, Y[:3]), "y must have one row for each of the 4 samples"),
        (lambda: sj.Task(X[:0], Y[:0]), "x must be a non-empty matrix"),
        (lambda: sj.Task(X[0], Y), r"x must be a non-empty matrix .* One number a sample is x\[:, None\]"),
        (lambda: sj.Task(np.ones((4, 2, 0)), Y), r"x must be a non-empty matrix .* but it was of shape \(4, 2, 0\)"),
        (lambda: sj.Task(np.ones((4, 1, 3)), Y).in_size, r"task\.x must be a matrix .* \(4, 1, 3\)\. Flatten"),
        (
            lambda: sj.gradient_flow(sj.MLP([3, 2], key=KEY), sj.Task(np.ones((4, 1, 3)), Y)),
            "a perceptron takes vectors|one sample",
        ),
        (lambda: sj.signal_strength(X), "task must be a saddlejax.Task, but it was ndarray"),
        (lambda: sj.Task(X, Y[:, 0]), r"y must be a non-empty matrix .* One output a sample is y\[:, None\]"),
        (lambda: sj.Task(X * np.nan, Y), "x must be finite, but it was an array with 12 NaN"),
        (lambda: sj.Task(X, Y / 0.0), "y must be finite"),
        (lambda: sj.Task(X, np.arange(4)), "y must hold one row of numbers a sample for squared error"),
        (lambda: sj.Task(X, np.arange(4) - 1, sj.cross_entropy), "y must hold labels"),
        (lambda: sj.Task(X, Y, sj.cross_entropy), "y must hold probabilities"),
        (lambda: sj.Task(X, Y, "mse"), "loss must be a function"),
        (lambda: sj.Task(X, Y, sample_weights=np.ones(4)), "sample_weights must be non-negative with sum one"),
        (lambda: sj.Task(X, Y, sample_weights=np.ones(3)), "sample_weights must have shape"),
        (lambda: sj.Task(X, Y, out_size=3), "out_size must be 2"),
        (lambda: sj.Task(X, np.arange(4), sj.cross_entropy, out_size=3), "out_size must exceed the largest label"),
        (lambda: sj.Task(X * 1j, Y), "x and y must be real"),
        (lambda: sj.Task(X.astype("float16"), Y), r"x must be in single or double precision.*\.astype\('float32'\)"),
        (lambda: sj.Task(X, jnp.asarray(Y, jnp.bfloat16)), "y must be in single or double precision.*bfloat16"),
        (lambda: sj.Task(X, Y, sample_weights=np.full(4, 0.25, "float16")), "sample_weights must be in single"),
        (lambda: sj.Task(X, Y).astype("float16"), "dtype must be in single or double precision"),
        (lambda: sj.tasks.linear_teacher([], 3), "singular_values must be a list"),
        (lambda: sj.tasks.linear_teacher([1.0, 2.0], 1), "singular_values must be a list of 1 to 1"),
        (lambda: sj.tasks.linear_teacher([-1.0], 1), "singular_values must not be negative"),
        (lambda: sj.tasks.single_index("tanh", 3, 4, key=KEY), "link must be a JAX function"),
        (lambda: sj.tasks.single_index(jnp.tanh, 3, 0, key=KEY), "samples must be a whole number"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_data_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_labels_know_their_classes():
    task = sj.Task(X, np.array([0, 1, 1, 0]), sj.cross_entropy)
    assert task.out_size == 2
    assert sj.Task(X, np.array([0, 1, 1, 0]), sj.cross_entropy, out_size=4).out_size == 4
    assert "cross_entropy" in str(task)


class OfImages(eqx.Module):
    """A convolution, and a linear layer."""

    convolution: eqx.nn.Conv2d
    linear: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.convolution = eqx.nn.Conv2d(1, 2, 3, key=first)
        self.linear = eqx.nn.Linear(32, 3, key=second)

    def __call__(self, x):
        return self.linear(jnp.ravel(jnp.tanh(self.convolution(x))))


def test_samples_may_have_any_shape():
    images = jax.random.normal(KEY, (5, 1, 6, 6))
    task = sj.Task(images, jnp.array([0, 2, 1, 0, 1]), sj.cross_entropy, sample_weights=[0.1, 0.2, 0.3, 0.2, 0.2])
    assert (task.samples, task.out_size) == (5, 3)
    assert str(task) == "Task: 5 samples of shape (1, 6, 6), 3 outputs, loss cross_entropy, float64"
    model = OfImages(KEY)
    loop = sum(p * sj.cross_entropy(model(x), y) for p, x, y in zip(task.sample_weights, task.x, task.y, strict=True))
    np.testing.assert_allclose(task_loss(model, task), loop, rtol=1e-10)
    np.testing.assert_allclose(as_problem(model, task).objective.plateau(), np.log(3), rtol=1e-10)
    assert task.astype("float32").x.dtype == jnp.float32
    # Flattened, they are the task of a perceptron, and its linear signal is the same.
    flat = sj.Task(images.reshape(5, -1), task.y, sj.cross_entropy, sample_weights=task.sample_weights)
    assert flat.in_size == 36
    np.testing.assert_allclose(sj.signal_strength(task), sj.signal_strength(flat), rtol=1e-10)


def test_signal_strength_is_the_largest_singular_value_of_the_covariance():
    strengths = [2.0, 4.0, 0.5]
    assert float(sj.signal_strength(sj.tasks.linear_teacher(strengths, in_size=5))) == pytest.approx(4.0)
    x, y = jax.random.normal(KEY, (30, 4)), jax.random.normal(KEY, (30, 3))
    p = jax.nn.softmax(jax.random.normal(KEY, (30,)))
    expected = np.linalg.norm(np.einsum("i,io,ij->oj", p, y, x), 2)
    np.testing.assert_allclose(sj.signal_strength(sj.Task(x, y, sample_weights=p)), expected, rtol=1e-10)
    # Cross-entropy at outputs of zero pulls by the labels, less their uniform share.
    labels = jnp.argmax(y, axis=1)
    centred = sj.Task(x, jax.nn.one_hot(labels, 3) - 1 / 3)
    of_labels = sj.signal_strength(sj.Task(x, labels, sj.cross_entropy))
    np.testing.assert_allclose(of_labels, sj.signal_strength(centred), rtol=1e-10)
    # A parity of three signs has none, and an escape direction has the speed α^{L−1} Γ.
    signs = np.array(np.meshgrid(*3 * [[-1.0, 1.0]])).reshape(3, -1).T
    assert float(sj.signal_strength(sj.Task(signs, signs.prod(axis=1, keepdims=True)))) == pytest.approx(0, abs=1e-12)
    best = sj.escape_direction(sj.Task(x, y), [4, 3, 3], "erf", starts=1, key=KEY)
    np.testing.assert_allclose(best.speed, 2 / np.sqrt(np.pi) * sj.signal_strength(sj.Task(x, y)), rtol=1e-6)
