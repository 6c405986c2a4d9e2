"""Put the results of the benchmarks into the documentation.

    python benchmarks/page.py [--results benchmarks/results]

Reads every `NAME.json` there and replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in `docs/benchmarks.md` by its
figure, command, machine and tables; copies `NAME.png` to `docs/benchmarks/NAME.png`. What has no results is left as it is. With `--check`
it writes nothing and fails where the page would change.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to read")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would change")
    options = parser.parse_args(arguments)
    text = PAGE.read_text()
    figures = []
    for path in sorted(options.results.glob("*.json")):
        marks = f"<!-- {path.stem} -->", f"<!-- /{path.stem} -->"
        if not all(mark in text for mark in marks):
            print(f"{path.name}: no {' … '.join(marks)} in {PAGE.name}, left out")
            continue
        figure = path.with_suffix(".png")
        figures += [figure] if figure.exists() else []
        content = section(json.loads(path.read_text()), f"benchmarks/{figure.name}" if figure.exists() else None)
        before, _, rest = text.partition(marks[0])
        text = f"{before}{marks[0]}\n\n{content}\n{marks[1]}{rest.partition(marks[1])[2]}"
    changed = text != PAGE.read_text()
    if not options.check:
        PAGE.write_text(text)
        FIGURES.mkdir(exist_ok=True)
        for figure in figures:
            shutil.copy(figure, FIGURES / figure.name)
    print(f"{PAGE.name}: {'changed' if changed else 'as before'}, {len(figures)} figures")
    return int(options.check and changed)


def section(record: dict, figure: str | None = None) -> str:
    """Figure, command, machine, tables and notes of one benchmark in Markdown."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    words = (
        f"*`{record['command']}` on {machine['date']}: {device}{machine['cpu']}, {plural(machine['cores'], 'core')}, "
        f"{plural(machine['threads'], 'thread')}, {machine['dtype']}, Python {machine['python']}, {versions}.*"
    )
    image = [f"![{record['question']}]({figure})"] if figure else []
    parts = [*image, words, *(markdown(table) for table in record["tables"]), *record["notes"]]
    return "\n\n".join(parts) + "\n"


def plural(count: int, name: str) -> str:
    """A count with its noun."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def markdown(table: dict) -> str:
    """A table under its title."""

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), '<br>') for cell in cells)} |"

    rule = f"| --- |{' ---: |' * (len(table['columns']) - 1)}"
    return "\n".join([f"**{table['title']}**", "", line(table["columns"]), rule, *map(line, table["rows"])])


if __name__ == "__main__":
    sys.exit(main())
