"""Runs the notebooks and writes each as a page of the documentation, with its output and figures.

    python notebooks/render.py            # all of them, some minutes
    python notebooks/render.py 1 3

The pages, docs/notebooks/*.md, are committed, so that the notebooks can be read with their results, in the repository and on the
site. The tests check that their text and code are those of the notebooks; they do not compare outputs.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import matplotlib

NOTEBOOKS = Path(__file__).parent
PAGES = NOTEBOOKS.parent / "docs" / "notebooks"
MARKDOWN = "[markdown]"


def cells(notebook: Path) -> list[tuple[str, str]]:
    """Kind (`markdown` or `python`) and text of every cell of a notebook in percent format, the header left out."""
    found = []
    for part in notebook.read_text().split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == MARKDOWN:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("python", body.strip()))
    return found


def source(kind: str, text: str) -> str:
    """A cell as it stands on the page."""
    return text if kind == "markdown" else f"```python\n{text}\n```"


def render(notebook: Path) -> None:
    """Run a notebook and write its page and figures."""
    import matplotlib.pyplot as plt

    for old in PAGES.glob(f"{notebook.stem}*"):
        old.unlink()
    names: list[str] = []

    def show() -> None:
        for number in plt.get_fignums():
            names.append(f"{notebook.stem}-{len(names) + 1}.png")
            plt.figure(number).savefig(PAGES / names[-1], dpi=100)
        plt.close("all")

    plt.show = show
    namespace: dict = {"__name__": notebook.stem}
    page, heading = [], notebook.stem
    for kind, text in cells(notebook):
        page.append(source(kind, text))
        if kind == "markdown":
            heading = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), heading)
            continue
        shown, printed = len(names), io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, notebook.name, "exec"), namespace)
        output = "\n".join(line.rpartition("\r")[2].rstrip() for line in printed.getvalue().strip("\n").split("\n"))
        page += [f"```text\n{output}\n```"] if output else []
        page += [f"![{heading}]({name})" for name in names[shown:]]
    (PAGES / f"{notebook.stem}.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    matplotlib.use("Agg")
    PAGES.mkdir(exist_ok=True)
    chosen = [
        path.resolve()
        for path in sorted(NOTEBOOKS.glob("[1-9]_*.py"))
        if path.name[0] in (sys.argv[1:] or path.name[0])
    ]
    for path in chosen:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            render(path)
        print(os.path.relpath(PAGES / f"{path.stem}.md"))
