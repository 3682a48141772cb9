"""The map from tiles to experts."""

from __future__ import annotations

import pytest
import torch

import cachepass
from cachepass.moe.task_map import task_map


def test_the_task_map() -> None:
    sizes = torch.tensor([0, 130, 0, 7, 33])
    prefix, task, height = task_map(sizes.cumsum(0).to(torch.int32), columns=200, across=128)
    # Two tiles across: 2 x 2 of 128 rows, 1 x 2 of 16, 1 x 2 of 64.
    assert prefix.tolist() == [4, 6, 8, 8, 8, 8, 8, 8]
    assert task[:3].tolist() == [1, 3, 4]
    assert height[[1, 3, 4]].tolist() == [128, 16, 64]
    decoded = [int(task[(prefix <= tile).sum()]) for tile in range(8)]
    assert decoded == [1, 1, 1, 1, 3, 3, 4, 4]


def test_more_experts_than_the_map_holds() -> None:
    with pytest.raises(
        cachepass.CachePassError,
        match=r"has 1025 routed experts: the task map of the kernel holds at most 1024\. Split",
    ):
        task_map(torch.arange(1, 1026, dtype=torch.int32), columns=8, across=128)
