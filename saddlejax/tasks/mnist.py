"""MNIST, from files the user has or fetched from OpenML when asked by name."""

import gzip
import struct
from pathlib import Path

import numpy as np

from .. import _check
from ..losses import mse
from .digits import classification_task
from .task import SampleLoss, Task

_IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_NPZ_KEYS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
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

    **Raises:** `FileNotFoundError` naming every file that was looked for; `ValueError` for damaged files.
    """
    if split not in _IDX_NAMES:
        raise _check.fail("split", "be 'train' or 'test'", repr(split))
    if samples is not None:
        _check.whole_number("samples", samples)
    if str(source) == "openml":
        images, labels = _from_openml(split)
    elif Path(source).suffix == ".npz":
        images, labels = _from_npz(Path(source), split)
    else:
        images, labels = _from_idx(Path(source), split)
    if samples is not None and samples > len(labels):
        raise _check.fail("samples", f"be at most {len(labels)}, the size of the {split} split", samples)
    return classification_task(images[:samples], labels[:samples], 10, loss)


def _from_openml(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import fetch_openml

    data = fetch_openml("mnist_784", version=1, as_frame=False)
    part = slice(0, 60_000) if split == "train" else slice(60_000, None)
    return data.data[part], data.target[part].astype(int)


def _from_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(
            f"source: no file {path}. An .npz file of MNIST holds x_train, y_train, x_test, y_test."
        )
    with np.load(path) as arrays:
        missing = [key for key in _NPZ_KEYS[split] if key not in arrays]
        if missing:
            raise ValueError(f"source: {path} must hold {' and '.join(missing)}, but it holds {sorted(arrays)}.")
        images, labels = (arrays[key] for key in _NPZ_KEYS[split])
    return images, labels


def _from_idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (_read_idx(folder, name) for name in _IDX_NAMES[split])
    if len(images) != len(labels):
        raise ValueError(f"source: {folder} holds {len(images)} images but {len(labels)} labels.")
    return images, labels


def _read_idx(folder: Path, name: str) -> np.ndarray:
    # Distributors write the name with a hyphen or a dot before "idx".
    stems = (name, name.replace("-idx", ".idx"))
    candidates = [folder / (stem + ending) for stem in stems for ending in ("", ".gz")]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        looked = ", ".join(candidate.name for candidate in candidates)
        raise FileNotFoundError(
            f"source: no MNIST file in {folder}. Looked for {looked}. "
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
        raise ValueError(f"source: {path} is not a whole IDX file ({error}).") from error
