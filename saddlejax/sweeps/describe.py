"""Arguments of a sweep in the types of JSON, for the store and the attributes of the results."""

import functools
import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import _check
from ..tasks.task import Task
from .identity import CannotDescribe, describe

FORMAT = 2
"""Of the descriptions in a store; version 0.1 of saddlejax wrote none."""


def identify(argument: str, value: Any) -> str:
    """A function or object in a word, with a digest of what it computes.

    **Raises:** `ValueError` where that is not known.
    """
    try:
        return describe(value)
    except CannotDescribe as error:
        raise _check.fail(
            argument,
            "be a function whose whole state can be described where a store is given, so that its results are not taken "
            "for another's",
            f"one that refers to {error}",
            "Let it use numbers, strings, arrays, and functions and objects made of these, or leave store out.",
        ) from None


def describe_task(task: Task) -> dict[str, Any]:
    """The size of a task and a digest of its data."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(task)]
    described = {
        "samples": task.samples,
        "inputs": task.in_size,
        "outputs": task.out_size,
        "loss": identify("task.loss", task.loss),
        "data": digest(*(f"{array.dtype} {array.shape}".encode() + array.tobytes() for array in arrays)),
    }
    return described if type(task) is Task else {**described, "class": identify("task", type(task))}


def random_numbers() -> str:
    """A digest of what the generator draws: its kind is a setting of JAX."""
    return digest(np.asarray(jax.random.bits(jax.random.key(0), (5,))).tobytes())


def digest(*parts: bytes) -> str:
    """A short digest of bytes."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]


def differences(stored: Any, asked: Any, path: str = "") -> list[str]:
    """What differs between two specifications, a line each."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        lines = []
        for key in [*stored, *(key for key in asked if key not in stored)]:
            inside = f"{path}.{key}" if path else key
            lines += differences(stored.get(key, "nothing"), asked.get(key, "nothing"), inside)
        return lines
    return [] if stored == asked else [f"{path}: {stored} in the store, {asked} asked for"]


def versions() -> dict[str, str]:
    """What computed the results: versions, machine and commit."""
    device = jax.devices()[0]
    known = commit()
    return {
        "saddlejax": _version("saddlejax"),
        **({} if known is None else {"commit": known}),
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "diffrax": _version("diffrax"),
        "equinox": _version("equinox"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
    }


@functools.cache
def commit() -> str | None:
    """The commit of the source tree that this package lies in; None where it lies in none."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", str(folder)], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode != 0 or tracked.returncode != 0:
        return None
    return found.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
