"""What the package promises about itself."""

import subprocess
import sys

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
