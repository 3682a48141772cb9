"""A function of torch's set aside for a while, one thread at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

_PATCHING = threading.RLock()


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Let ``make(original)`` stand for a function of a class or a module meanwhile."""
    # Looked up under the lock: else the stand-in of another thread would be taken for torch's.
    with _PATCHING:
        own = vars(owner)[name]
        setattr(owner, name, make(getattr(owner, name)))
        try:
            yield
        finally:
            setattr(owner, name, own)
