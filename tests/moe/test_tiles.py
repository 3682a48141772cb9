"""Which tiles are had where: a table of devices and layouts, asked on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cachepass.moe import tiles
from cachepass.moe.tiles import CHOICES, Tiles, fitting

H100, A100, RTX_4090, ROCM = (True, 232_448), (False, 166_912), (False, 101_376), (False, 0)


def _first(
    monkeypatch: pytest.MonkeyPatch,
    device: tuple[bool, int],
    weight: Tensor,
    x: Tensor,
    *,
    aligned: bool = True,
    gathers: bool = True,
) -> Tiles:
    monkeypatch.setattr(tiles, "_device", lambda _: device)
    return fitting(x, [weight] * 2, aligned=aligned, gathers=gathers)[0]


@pytest.mark.parametrize(
    ("device", "columns", "stages", "by_tma"),
    [(H100, 256, 4, True), (A100, 128, 3, False), (RTX_4090, 128, 3, False), (ROCM, 128, 2, False)],
)
def test_by_device(
    monkeypatch: pytest.MonkeyPatch,
    device: tuple[bool, int],
    columns: int,
    stages: int,
    by_tma: bool,
) -> None:
    weight, x = torch.zeros(512, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    found = _first(monkeypatch, device, weight, x)
    assert (found.columns, found.stages, found.by_tma) == (columns, stages, by_tma)
    assert found.shared <= max(device[1], CHOICES[-1].shared)


def _bfloat16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


LAYOUTS: dict[str, tuple[Tensor, Tensor, bool, tuple[int, bool]]] = {
    # weight, x, aligned -> columns, by_tma
    "narrow": (_bfloat16(128, 64), _bfloat16(8, 64), True, (128, True)),
    "float32": (torch.zeros(512, 64), torch.zeros(8, 64), True, (128, True)),
    "between 16 bytes": (_bfloat16(512, 64), _bfloat16(8, 64), False, (128, False)),
    "odd rows": (_bfloat16(512, 66), _bfloat16(8, 66), True, (128, False)),
    "transposed": (_bfloat16(64, 512).t(), _bfloat16(8, 64), True, (256, False)),
    "transposed, odd": (_bfloat16(64, 514).t(), _bfloat16(8, 64), True, (128, False)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_by_layout_on_a_hopper(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    weight, x, aligned, wanted = LAYOUTS[name]
    found = _first(monkeypatch, H100, weight, x, aligned=aligned)
    assert (found.columns, found.by_tma) == wanted


def test_sorted_rows_have_to_be_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = _bfloat16(512, 64), _bfloat16(8, 66)[:, :64]
    assert _first(monkeypatch, H100, weight, x).by_tma
    assert not _first(monkeypatch, H100, weight, x, gathers=False).by_tma
