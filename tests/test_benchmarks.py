"""Benchmarks run at a tiny size, and their results can be put into the documentation.

Left out are those that are nearly all compilation: `directions_along_flow`, `exponents`, `predictions`, `start_up`, `sweep`.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = (
    "directions",
    "plateau",
    "staircase",
    "work_precision",
)


@pytest.fixture
def load(monkeypatch):
    """Import a script as its command would, without keeping the folder on the path."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in (*SCRIPTS, "common", "implicit", "page"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs(name, load, tmp_path, capsys):
    script = load(name)
    script.main(
        [
            "--quick",
            "--threads",
            str(os.cpu_count()),
            "--json",
            f"{tmp_path}/{name}.json",
            "--figure",
            f"{tmp_path}/{name}.png",
        ]
    )
    plt.close("all")
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").stat().st_size > 0
    assert record["command"].startswith(f"python benchmarks/{name}.py --quick")
    assert record["machine"]["versions"]["jax"] and record["numbers"]
    text = load("page").section(record)
    for table in record["tables"]:
        assert table["title"] in text
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
