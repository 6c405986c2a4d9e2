"""What the package promises about itself."""

import subprocess
import sys

import pytest

import saddlejax as sj


def test_every_public_name_is_documented():
    names = [name for name in vars(sj) if not name.startswith("_")]
    public = {name: value for name, value in vars(sj).items() if name in names and callable(value)}
    assert {"MLP", "Task", "gradient_flow", "escape_direction", "classify_activation"} <= set(public)
    missing = [name for name, value in public.items() if not (value.__doc__ or "").strip()]
    assert missing == []


def test_importing_changes_no_global_setting():
    code = (
        "import jax; before = dict(jax.config.values); import saddlejax; "
        "after = dict(jax.config.values); assert before == after; import jax.numpy as jnp; "
        "assert jnp.ones(()).dtype == 'float32'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_takes_long_to_import_waits_for_its_use():
    script = (
        "import sys, saddlejax\n"
        "print(*sorted({'matplotlib', 'pandas', 'scipy.optimize', 'sklearn', 'xarray', 'zarr'} & set(sys.modules)))\n"
        "print(saddlejax.plot.flow.__name__, 'plot' in dir(saddlejax))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["", "flow True"]
    with pytest.raises(AttributeError, match="has no attribute 'plots'"):
        _ = sj.plots
