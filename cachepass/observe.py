"""Observers of the pass manager: numbered text dumps."""

from __future__ import annotations

import logging
import os
import pathlib

from torch import fx

from cachepass.ir.printer import format_graph
from cachepass.pass_manager import Observer

log = logging.getLogger(__name__)


def dump_to(folder: str | os.PathLike[str]) -> Observer:
    """Write the graph after each pass to ``<folder>/<nn>-<pass>.txt``."""
    root = pathlib.Path(folder)
    root.mkdir(parents=True, exist_ok=True)

    def observe(number: int, name: str, gm: fx.GraphModule) -> None:
        path = root / f"{number:02d}-{name}.txt"
        path.write_text(format_graph(gm), encoding="utf-8")
        log.info("wrote %s", path)

    return observe
