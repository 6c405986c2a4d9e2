"""Arguments of a sweep in the types of JSON, for the store and the attributes of the results."""

import functools
import hashlib
import inspect
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..activations import ACTIVATIONS, activation_name
from ..tasks.task import Task


def describe_function(function: Callable[..., Any]) -> str:
    """A name that changes when the code of a function does."""
    if any(function is known for known in ACTIVATIONS.values()):
        return activation_name(function)
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = repr(getattr(getattr(function, "__code__", None), "co_code", name))
    return f"{name} ({digest(source.encode())})"


def describe_task(task: Task) -> dict[str, Any]:
    """The size of a task and a digest of its data."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(task)]
    return {
        "samples": task.samples,
        "inputs": task.in_size,
        "outputs": task.out_size,
        "loss": describe_function(task.loss),
        "data": digest(*(array.tobytes() + str(array.dtype).encode() for array in arrays)),
    }


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
    return {
        "saddlejax": _version("saddlejax"),
        "commit": commit(),
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "diffrax": _version("diffrax"),
        "equinox": _version("equinox"),
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
    }


@functools.cache
def commit() -> str:
    """The commit of the source tree that this package lies in, if it does."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", str(folder)], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if found.returncode != 0 or tracked.returncode != 0:
        return "unknown"
    return found.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
