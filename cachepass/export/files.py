"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from cachepass.errors import CachePassError


def target_of(path: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    """A path to write to, checked before hours are spent on what is to be written."""
    target = pathlib.Path(path)
    if target.suffix != suffix:
        raise CachePassError(f"`path`={str(path)!r}: must end in {suffix}")
    if not target.parent.is_dir():
        raise CachePassError(f"`path`={str(path)!r}: {target.parent} is no folder")
    return target


@contextlib.contextmanager
def all_or_nothing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to in a folder of its own; all that is there moves to the target's."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield pathlib.Path(folder, target.name)
        for file in sorted(pathlib.Path(folder).iterdir(), key=lambda f: f.name == target.name):
            file.replace(target.with_name(file.name))
