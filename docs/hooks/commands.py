"""The help of the commands in the documentation, asked of the commands themselves when the site is built."""

import re

from typer.testing import CliRunner

from saddlejax.cli import app

HELP = re.compile(r"<!-- help: (\w+) -->")


def _help(match: re.Match) -> str:
    asked = CliRunner().invoke(app, [match[1], "--help"], prog_name="saddlejax", terminal_width=88)
    assert asked.exit_code == 0, asked.output
    return f"```text\n{asked.output.rstrip()}\n```"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by MkDocs with the source of every page."""
    return HELP.sub(_help, markdown)
