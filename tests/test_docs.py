"""Every example of the documentation runs, the numbers it promises come out, and its links lead somewhere.

A line `expression  # → 1.9998` promises a result: numbers within two per cent, words exactly.
"""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import saddlejax as sj

DIGITS = sj.tasks.digits()
FEW = sj.Task(DIGITS.x[:300], DIGITS.y[:300])
ROOT = Path(__file__).parent.parent
NOTEBOOK_PAGES = sorted((ROOT / "docs" / "notebooks").glob("*.md"))
DOCS = sorted(set((ROOT / "docs").rglob("*.md")) - set(NOTEBOOK_PAGES))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
NOT_RUN = "<!-- not run by the tests:"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")
PROMISE = re.compile(r"#\s*→\s*(.+?)\s*$")
CLOSE = 0.02


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page with the lines they start at, those left out that say why they cannot run."""
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        if NOT_RUN not in text[: match.start()].rstrip().rpartition("\n")[2]:
            found.append((text.count("\n", 0, match.start()) + 1, match[1]))
    return found


def promises(code: str) -> dict[int, str]:
    """What the comments at the ends of lines promise, by line."""
    lines = enumerate(code.splitlines(), start=1)
    return {number: match[1] for number, line in lines if (match := PROMISE.search(line))}


def run(code: str, namespace: dict, where: str) -> None:
    """Execute a block statement by statement and hold every promise to its result."""
    promised = promises(code)
    for statement in ast.parse(code).body:
        text = promised.pop(statement.end_lineno, None)
        if text is None:
            exec(compile(ast.Module([statement], []), where, "exec"), namespace)
            continue
        assert isinstance(statement, ast.Expr), f"{where}: only an expression can promise a result"
        check(eval(compile(ast.Expression(statement.value), where, "eval"), namespace), text, where)
    assert not promised, f"{where}: promises beside no statement: {promised}"


def check(value: object, text: str, where: str) -> None:
    """Compare the numbers of a result with those promised, or its words."""
    got = str(value) if isinstance(value, str | tuple | list) else str(np.asarray(value, dtype=object))
    expected, found = ([float(number) for number in NUMBER.findall(part)] for part in (text, got))
    if expected:
        np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=1e-10, err_msg=f"{where}: {got} and {text}")
    else:
        assert got == text, f"{where}: {got} instead of {text}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_examples(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    if page.name == "README.md":  # what takes long there promises no numbers, so fewer samples will do
        for name in ("sweep", "escape_direction"):
            function = getattr(sj, name)
            monkeypatch.setattr(sj, name, lambda task, *args, f=function, **options: f(FEW, *args, **options))
    namespace: dict = {"__name__": page.stem}
    for line, code in blocks(page):
        run(code, namespace, f"{page.name}:{line}")
    plt.close("all")


def test_a_broken_promise_is_noticed():
    run("x = 2\nx + 1  # → 3.01\n'a'  # → a", {}, "here")
    for code in ("2 + 2  # → 5", "'a'  # → b", "[1, 2]  # → 1"):
        with pytest.raises(AssertionError):
            run(code, {}, "here")


def test_site_builds_and_its_links_resolve(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {page: page.read_text() for page in (tmp_path / "site").rglob("index.html")}
    names = [name for name, value in vars(sj).items() if not name.startswith("_") and callable(value)]
    reference = "".join(text for page, text in pages.items() if "reference" in page.parts)
    # What users subclass or are given, as docs/extending.md says, is there too.
    names += [
        "networks.AbstractNetwork",
        "flow.until.AbstractUntil",
        "flow.field.PlateauField",
        "flow.state.ClockState",
    ]
    names += ["StiffPlateauSolver", "saddle.SaddleOrder", "parameters.Parameters"]
    assert "gradient_flow" in names and [name for name in names if f'id="saddlejax.{name}"' not in reference] == []
    # Formulas are MathML by now, TeX and all: no script draws them.
    for page, text in pages.items():
        assert "<mtext>\\" not in text and "\\[" not in re.sub("<pre.*?</pre>", "", text, flags=re.DOTALL), page
    assert (tmp_path / "site" / "concepts" / "law" / "index.html").read_text().count("<math") > 20
    assert "--bottleneck" in (tmp_path / "site" / "cli" / "index.html").read_text()


NOTEBOOKS = sorted((ROOT / "notebooks").glob("[1-7]_*.py"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_runs(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SADDLEJAX_SEEDS", "1")  # of the sweep
    matplotlib.use("Agg")
    runpy.run_path(str(notebook))
    assert plt.get_fignums(), "a notebook draws what it finds"
    plt.close("all")


def test_pages_of_notebooks_are_theirs():
    assert [page.stem for page in NOTEBOOK_PAGES] == [notebook.stem for notebook in NOTEBOOKS] and len(NOTEBOOKS) == 7
    render = runpy.run_path(str(ROOT / "notebooks" / "render.py"), run_name="render")
    for page, notebook in zip(NOTEBOOK_PAGES, NOTEBOOKS, strict=True):
        rest = page.read_text()
        for kind, text in render["cells"](notebook):  # in the same order, with output between them
            _, found, rest = rest.partition(render["source"](kind, text))
            assert found, f"{page.name} lacks a cell of its notebook; run notebooks/render.py: {text[:200]}"
        for figure in re.findall(r"!\[.*\]\((.*)\)", page.read_text()):
            assert (page.parent / figure).is_file(), figure
