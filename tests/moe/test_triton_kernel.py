"""The kernel in Triton's interpreter, against a loop; in a process of its own.

Triton reads whether to interpret when it is imported, and torch looks for Triton, too.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPARE = """
import torch
import torch.nn.functional as F

from cachepass.moe.grouped import route
from cachepass.moe.tiles import CHOICES
from cachepass.moe.triton_kernel import triton_grouped_linear

torch.manual_seed(0)
EXPERTS, COLUMNS = 6, 136  # no multiple of a tile
LOADS = {
    "balanced": [24] * 6,
    "one heavy": [300, 1, 1, 1, 1, 1],
    "empty": [0, 5, 0, 17, 60, 0],
    "single rows": [1] * 6,
    "heights": [16, 17, 33, 65, 129, 0],
    "rests": [144, 160, 192, 224, 256, 290],
}
for name, sizes in LOADS.items():
    flat = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(sizes))
    flat = flat[torch.randperm(len(flat))]
    for biased, INNER in ((False, 40), (True, 40), (True, 64)):  # half a tile left, or none
        x = torch.randn(len(flat), INNER)
        weights = [torch.randn(COLUMNS, INNER) for _ in range(EXPERTS)]
        biases = [torch.randn(COLUMNS) for _ in range(EXPERTS)] if biased else []
        rows, offsets, _ = route(flat[:, None], EXPERTS)
        got = triton_grouped_linear(x, rows, offsets, weights, biases)
        start = 0
        for i, end in enumerate(offsets.tolist()):
            wanted = F.linear(x[rows[start:end]], weights[i], biases[i] if biased else None)
            torch.testing.assert_close(got[start:end], wanted, rtol=1e-4, atol=1e-4, msg=name)
            start = end
        wide = torch.randn(len(flat), 2 * INNER)[:, ::2].copy_(x)
        columnwise = [w.t().contiguous().t() for w in weights]
        apart = [torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w) for w in weights]
        for tiles in CHOICES:
            again = triton_grouped_linear(x[rows], None, offsets, weights, biases, tiles)
            assert torch.equal(again, got), (name, tiles)
            again = triton_grouped_linear(x, rows, offsets, weights, biases, tiles)
            assert torch.equal(again, got), (name, tiles)
            if not tiles.by_tma:  # it wants weights by rows, at multiples of 16 bytes
                again = triton_grouped_linear(x, rows, offsets, apart, biases, tiles)
                assert torch.equal(again, got), (name, tiles)
                again = triton_grouped_linear(wide, rows, offsets, columnwise, biases, tiles)
                assert torch.equal(again, got), (name, tiles)
    nothing = offsets.new_zeros(EXPERTS)
    assert not triton_grouped_linear(x, rows[:0], nothing, weights, biases).numel()
print("equal")
"""


def test_equals_the_loop() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
