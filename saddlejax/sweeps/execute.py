"""Compute the blocks of a sweep on an executor, write them as they come, try the lost ones again."""

import contextlib
import functools
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from .._host.stopping import obey
from .._host.threads import available_cores, one_blas_thread
from .grid import Block, size
from .problem import FAILED, AbstractProblem, blank, failure

IN_FLIGHT_ELSEWHERE = 256
_PROCESS = os.getpid()  # of the process that imported this module; a forked one inherits it


class Progress(NamedTuple):
    """How far a sweep is.

    - `lanes`: of the whole sweep; `done`: computed by now; `kept`: those of them that an earlier call computed.
    - `failed`: lanes recorded as failed; `retries`: blocks tried again.
    - `rate`: lanes a second in this call.
    """

    lanes: int
    done: int
    kept: int
    failed: int
    retries: int
    rate: float


@runtime_checkable
class Store(Protocol):
    """Where results go."""

    block_shape: tuple[int, ...]

    def missing(self) -> list[Block]:
        """The blocks yet to compute."""

    def write(self, block: Block, values: dict[str, np.ndarray]) -> None:
        """Keep the results of a block."""


def execute(
    problem: AbstractProblem,
    store: Store,
    executor: Executor | None,
    retries: int,
    on_progress: Callable[[Progress], None],
) -> None:
    """Compute all blocks that the store lacks.

    A block whose computation raises, or is lost with the machine it ran on, is submitted again up to `retries` times;
    then its lanes are recorded as failed, and a later call tries them anew. After an error or an interruption the blocks
    that are finished are written before it is passed on.
    """
    missing = _share(problem, store)
    kept = problem.grid.lanes - sum(_lanes(block) for block in missing)
    progress = Progress(problem.grid.lanes, kept, kept, 0, 0, 0.0)
    began = time.monotonic()
    on_progress(progress)
    stop = threading.Event()
    with _workers(executor, stop) as (pool, in_flight):
        submit = _submitter(problem, pool, local=executor is None)
        waiting = iter(_interleaved(missing))
        running: dict[Future, tuple[Block, int]] = {}

        def fill() -> None:
            while len(running) < in_flight and (block := next(waiting, None)) is not None:
                running[submit(block)] = (block, 0)

        try:
            fill()
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    block, tries = running[future]
                    try:
                        values = future.result()
                    except ForkedProcess as error:
                        raise RuntimeError(
                            "executor must not be a pool of forked processes: JAX has threads, which a fork does not "
                            "copy, so that the workers would hang. Use concurrent.futures.ProcessPoolExecutor("
                            "mp_context=multiprocessing.get_context('spawn')), or leave executor out to use all cores."
                        ) from error
                    except BrokenExecutor as error:
                        raise RuntimeError(
                            "executor broke down; what it had computed is kept. Call the sweep again with a new one."
                        ) from error
                    except Exception as error:
                        if tries < retries:
                            del running[future]
                            progress = progress._replace(retries=progress.retries + 1)
                            running[submit(block)] = (block, tries + 1)
                            continue
                        values = blank(problem.outputs, _lanes(block), failure(error))
                    store.write(block, values)
                    del running[future]
                    failed = sum(str(one).startswith(FAILED) for one in values["status"])
                    done = progress.done + _lanes(block)
                    rate = (done - kept) / max(time.monotonic() - began, 1e-9)
                    progress = progress._replace(done=done, failed=progress.failed + failed, rate=rate)
                    on_progress(progress)
                fill()
        except BaseException:
            stop.set()
            _keep_finished(store, running, wait_for_rest=executor is None)
            raise


def _keep_finished(store: Store, running: dict[Future, tuple[Block, int]], *, wait_for_rest: bool) -> None:
    """Write what is finished by now; blocks that have not begun are dropped."""
    begun = [future for future in running if not future.cancel()]
    if wait_for_rest:
        wait(begun)
    for future in begun:
        if future.done() and not future.cancelled() and future.exception() is None:
            with contextlib.suppress(OSError):  # the error that is being passed on says as much
                store.write(running[future][0], future.result())


def _share(problem: AbstractProblem, store: Store) -> list[Block]:
    """The missing blocks; where JAX runs as several processes, those that are this one's."""
    processes, own = jax.process_count(), jax.process_index()
    owners = {_corner(block): number % processes for number, block in enumerate(problem.grid.blocks(store.block_shape))}
    return [block for block in store.missing() if owners[_corner(block)] == own]


def _corner(block: Block) -> tuple[int, ...]:
    return tuple(part.start for part in block)


def _interleaved(blocks: Sequence[Block]) -> list[Block]:
    """Blocks ordered by their last positions: those of different programs alternate, so that programs compile side by side."""
    return sorted(blocks, key=lambda block: _corner(block)[::-1])


@contextlib.contextmanager
def _workers(executor: Executor | None, stop: threading.Event) -> Iterator[tuple[Executor, int]]:
    """The executor, or threads of this process: one a core, shared out among the devices.

    Threads stop soon after the event.
    """
    if executor is not None:
        yield executor, IN_FLIGHT_ELSEWHERE
        return
    devices = jax.local_devices()
    count = max(len(devices), available_cores())
    numbers = itertools.count()

    def begin() -> None:
        _own.device = devices[next(numbers) % len(devices)]
        obey(stop)

    pool = ThreadPoolExecutor(count, thread_name_prefix="saddlejax-sweep", initializer=begin)
    try:
        yield pool, 2 * count
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_own = threading.local()


def _submitter(problem: AbstractProblem, pool: Executor, *, local: bool) -> Callable[[Block], Future]:
    if local:
        return lambda block: pool.submit(_compute_here, problem, block)
    problem.outputs  # noqa: B018  worked out once here, and not by every worker
    blob, x64, own = _dumps(problem), bool(jax.config.jax_enable_x64), os.getpid()  # type: ignore[attr-defined]
    return lambda block: pool.submit(compute_elsewhere, blob, block, x64, own)


def _dumps(problem: AbstractProblem) -> bytes:
    """The problem as bytes; functions defined in a script or notebook travel with cloudpickle, where installed."""
    try:
        import cloudpickle  # type: ignore[import-untyped]
    except ImportError:
        return pickle.dumps(problem)
    return cloudpickle.dumps(problem)


@functools.lru_cache(maxsize=4)
def _loads(blob: bytes) -> AbstractProblem:
    return pickle.loads(blob)


class ForkedProcess(Exception):
    """A worker is a forked copy of a process that has JAX running."""


def compute_elsewhere(blob: bytes, block: Block, x64: bool, caller: int) -> dict[str, np.ndarray]:
    """A block on a worker of an executor, in the precision of the caller. The problem is unpacked once a process."""
    if os.getpid() not in (_PROCESS, caller):
        raise ForkedProcess
    with jax.enable_x64(x64):
        return _compute(_loads(blob), block)


def _compute_here(problem: AbstractProblem, block: Block) -> dict[str, np.ndarray]:
    """A block on the device of this thread."""
    with jax.default_device(_own.device):
        return _compute(problem, block)


def _compute(problem: AbstractProblem, block: Block) -> dict[str, np.ndarray]:
    with one_blas_thread():  # every core has a lane of its own
        return problem.run(problem.grid.points(block))


def _lanes(block: Block) -> int:
    return int(np.prod(size(block)))
