"""Ctrl-C during a computation."""

import ctypes
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def safe_to_interrupt(function: Callable[P, R]) -> Callable[P, R]:
    """A function that computes with JAX, made safe to interrupt.

    On Ctrl-C JAX leaves a compilation, or a program, that goes on in a thread of its own. Where the interpreter ends
    before it does, it destroys JAX's client under it: from JAX 0.10 on, a segmentation fault, or a wait until the program
    has run. So after an interrupt the client is kept until the process itself ends.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            # A reference that nothing ever gives back, as Python's own would be when the interpreter ends.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(jax.local_devices()[0].client))
            raise

    return call
