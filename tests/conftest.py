"""The tests run in double precision; importing saddlejax itself changes no setting.

Nearly all of their time is compilation, so they let XLA optimise less. What it computes is the same up to rounding. And
what one test has compiled, no other test of the same run compiles again, be it in another process: JAX keeps programs in
a folder, made for the run and deleted with it. It finds them by their contents, so what is tested stays what is written.
"""

import atexit
import contextlib
import gc
import importlib.metadata
import os
import pathlib
import shutil
import signal
import tempfile

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell: the programs that tests stop
    signal.signal(signal.SIGINT, signal.default_int_handler)  # would inherit it, and never hear Ctrl-C
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers are as many as the cores
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # and share the memory of a GPU
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that later versions end the process for
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of pytest-xdist inherit it
    _programs = tempfile.mkdtemp(prefix="saddlejax-tests-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("saddlejax", "beartype.beartype")  # before anything imports saddlejax
jax.config.update("jax_enable_x64", True)
gc.set_threshold(200_000, 50, 100)  # tracing makes many objects that live


MAPPED = pathlib.Path("/proc/self/maps")
MOST_MAPPED = 20_000


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    """Every compiled function maps memory, of which Linux lets a process have 65,530 pieces; more end it."""
    yield
    if MAPPED.exists() and MAPPED.read_bytes().count(b"\n") > MOST_MAPPED:
        jax.clear_caches()
        gc.collect()


_raises = pytest.raises


@contextlib.contextmanager
def _raises_untyped(*arguments, **options):
    """`pytest.raises`, without run-time checks of types: what is given there is wrong on purpose, and the package says so."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with _raises(*arguments, **options) as found:
            yield found
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


pytest.raises = _raises_untyped
