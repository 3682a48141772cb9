from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each test starts with empty compile caches of dynamo and zeroed counters."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The models are tiny: threads would only wait for each other."""
    torch.set_num_threads(1)
