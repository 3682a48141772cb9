"""The command line: ``cachepass models [words]``."""

from __future__ import annotations

import argparse
import importlib.resources
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it went well."""
    parser = argparse.ArgumentParser(prog="cachepass", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    models = commands.add_parser("models", help="what was found in diffusers' transformers")
    models.add_argument("words", nargs="*", help="only the rows that hold one of these")
    given = parser.parse_args(arguments)
    table = importlib.resources.files("cachepass").joinpath("models.md").read_text("utf-8")
    shown = 0
    for number, line in enumerate(rows := [x for x in table.splitlines() if x.startswith("|")]):
        heading = number < _HEADING
        wanted = not given.words or any(word.lower() in line.lower() for word in given.words)
        if heading or wanted:
            print(line)  # noqa: T201
            shown += not heading
    if not shown:
        parser.error(f"none of {len(rows) - _HEADING} rows holds {' or '.join(given.words)}")
    return 0


_HEADING = 2  # names of columns, and the line below
