"""Threads: work side by side that an interruption ends soon, and linear algebra that keeps to one of them."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The function of every item, computed in threads, one a core.

    After an error or an interruption what has not begun is left out, and what runs is waited for: a program that ends
    while its threads compute can crash.
    """
    pool = ThreadPoolExecutor(available_cores(), thread_name_prefix="saddlejax")
    try:
        return [future.result() for future in [pool.submit(function, item) for item in items]]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _OneBlasThread:
    """The limit of one thread, set by the first of the calls that overlap and lifted after the last.

    A thread of its own does both: threadpoolctl lets only the thread that set a limit lift it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._ended = threading.Event()
        self._holder = threading.Thread()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._calls == 0:
                self._begin()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0:
                    self._ended.set()
                    self._holder.join()

    def _begin(self) -> None:
        began, ended = threading.Event(), threading.Event()

        def hold() -> None:
            try:
                with threadpool_limits(limits=1, user_api="blas"):
                    began.set()
                    ended.wait()
            finally:
                began.set()

        self._ended, self._holder = ended, threading.Thread(target=hold, name="saddlejax-blas", daemon=True)
        self._holder.start()
        began.wait()


one_blas_thread = _OneBlasThread()
"""A context in which the linear algebra of NumPy, SciPy and JAX on CPUs uses one thread, in the whole process.

The limit is a setting of the process: calls that overlap and each restore what they found would leave it behind.
"""
