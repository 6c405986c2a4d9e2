"""What the package promises about itself."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

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


ROOT = Path(__file__).parent.parent
DOTTED = re.compile(r"(?<![\w./@-])(?:saddlejax|sj)((?:\.[A-Za-z_]\w*)+)(?![\w/-])")
# Of the site, which checks its own links: their targets, and where an entry with a heading of its own is defined.
TARGET = re.compile(r"\]\[saddlejax[\w.]*\]|^::: \S+$(?=\n    options:\n      heading: )", re.MULTILINE)
IMPORT = re.compile(r"from (saddlejax[\w.]*) import ([\w, ]+)")
FILE = re.compile(r"\.(toml|zarr|md|png|json|py|dev|com|org)$")


def documentation():
    """README, the pages of the site and the docstrings, by where they stand."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        yield page.relative_to(ROOT).as_posix(), page.read_text()
    for module in sorted((ROOT / "saddlejax").rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_text())):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield f"{module.relative_to(ROOT).as_posix()}:{node.lineno}", node.value.value


def reached(path):
    found = sj
    for name in path.strip(".").split("."):
        found = getattr(found, name)
    return found


def test_every_name_that_the_documentation_mentions_can_be_reached():
    missing, count = [], 0
    for where, text in documentation():
        for module, names in IMPORT.findall(text):
            missing += [
                f"{where}: {module} has no {name}"
                for name in names.replace(" ", "").split(",")
                if not hasattr(importlib.import_module(module), name)
            ]
        for match in DOTTED.finditer(TARGET.sub("", IMPORT.sub("", text))):
            if FILE.search(match[1]):
                continue
            count += 1
            try:
                reached(match[1])
            except AttributeError:
                missing.append(f"{where}: {match[0]}")
    assert missing == [] and count > 100
