"""MNIST, from files the user has or fetched from OpenML when asked by name."""

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from .. import _check
from ._digits import classification_task
from .losses import mse
from .task import SampleLoss, Task

_IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NPZ_KEYS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def mnist(
    source: str | Path,
    *,
    split: str = "train",
    samples: int | None = None,
    loss: SampleLoss = mse,
) -> Task:
    """MNIST handwritten digits as a task with centred inputs, like [`saddlejax.tasks.digits`][].

    **Arguments:**

    - `source`: a folder with the four IDX files (gzipped or not), an `.npz` file with `x_train`, `y_train`,
      `x_test`, `y_test`, or the name `"openml"` to download through `sklearn.datasets.fetch_openml`.
    - `split`: `"train"` or `"test"`.
    - `samples`: take the first so many; by default all.
    - `loss`: as for [`saddlejax.Task`][].

    **Raises:** `FileNotFoundError` naming every file that was looked for; `ValueError` for damaged files, and for labels
    that are not whole numbers from 0 to 9.
    """
    return named_mnist("source", source, split, samples, loss)


def named_mnist(argument: str, source: str | Path, split: str, samples: int | None, loss: SampleLoss) -> Task:
    """As `mnist`, for a caller whose argument has another name, by which the errors call it."""
    if split not in _IDX_NAMES:
        raise _check.fail("split", "be 'train' or 'test'", repr(split))
    if str(source) == "openml":
        images, labels = _from_openml(split)
    elif Path(source).suffix == ".npz":
        _, images, labels = read_npz(argument, Path(source), NPZ_KEYS[split])
    else:
        images, labels = _from_idx(argument, Path(source), split)
    if len(images) != len(labels):
        raise ValueError(f"{argument}: {source} holds {len(images)} images but {len(labels)} labels.")
    _check.at_most_samples(samples, len(labels), f"the {split} split")
    return classification_task(images[:samples], labels[:samples], 10, loss, source=f"{argument}: {source}")


def _from_openml(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import fetch_openml

    data = fetch_openml("mnist_784", version=1, as_frame=False)
    part = slice(0, 60_000) if split == "train" else slice(60_000, None)
    return data.data[part], data.target[part].astype(int)


def read_npz(argument: str, path: Path, *choices: tuple[str, str]) -> tuple[tuple[str, str], np.ndarray, np.ndarray]:
    """The first of the pairs of arrays, `choices`, that an `.npz` file holds: their names, and both of them."""
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: no file {path}. An .npz file must hold {_in_words(choices)}.")
    try:
        with np.load(path) as arrays:
            held = sorted(arrays)
            pair = next((keys for keys in choices if set(keys) <= set(held)), None)
            if pair is not None:
                return pair, np.atleast_1d(arrays[pair[0]]), np.atleast_1d(arrays[pair[1]])
    except (ValueError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{argument}: {path} is not a whole .npz file of numbers ({error}).") from error
    missing = [tuple(key for key in keys if key not in held) for keys in choices]
    raise ValueError(f"{argument}: {path} must hold {_in_words(missing)}, but it holds {held}.")


def _in_words(choices: Sequence[tuple[str, ...]]) -> str:
    return ", or ".join(" and ".join(keys) for keys in choices)


def _from_idx(argument: str, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (_read_idx(argument, folder, name) for name in _IDX_NAMES[split])
    return images, labels


def _read_idx(argument: str, folder: Path, name: str) -> np.ndarray:
    # Distributors write the name with a hyphen or a dot before "idx".
    stems = (name, name.replace("-idx", ".idx"))
    candidates = [folder / (stem + ending) for stem in stems for ending in ("", ".gz")]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        looked = ", ".join(candidate.name for candidate in candidates)
        raise FileNotFoundError(
            f"{argument}: no MNIST file in {folder}. Looked for {looked}. "
            "Give the folder that holds the IDX files, an .npz file, or 'openml' to download."
        )
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        data = file.read()
    try:
        zero, kind, dimensions = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
        if zero != 0:
            raise ValueError("wrong magic number")
        values = np.frombuffer(data, dtype=np.dtype(_IDX_TYPES[kind]), offset=4 + 4 * dimensions)
        return values.reshape(shape)
    except (struct.error, KeyError, ValueError) as error:
        raise ValueError(f"{argument}: {path} is not a whole IDX file ({error}).") from error
