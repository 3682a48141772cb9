"""Programs of torch.export against `compile`."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch
from torch.export import Dim

import cachepass
from cachepass.errors import CachePassError, CaptureError
from tests.export.runners import Compiled, Exported, agree, branches_of, wan_of
from tests.models import WAN, distance

FIRST_BLOCK = cachepass.FirstBlock(threshold=0.3, warmup_steps=1)


def test_a_program_of_torch_export() -> None:
    program = cachepass.export(WAN.model(), WAN.example(), policy=FIRST_BLOCK)
    runner = Exported(program.module(), program.example_inputs[1]["state"])
    agree(runner, Compiled(WAN, FIRST_BLOCK), branches_of(WAN, "cond", "uncond"), 1e-5)


ALONE = """
import sys, torch

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cachepass", "diffusers"):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
program = torch.export.load(sys.argv[1])
torch.save(program.module()(**program.example_inputs[1])["output"], sys.argv[2])
"""


def test_a_saved_program_runs_without_cachepass(tmp_path: pathlib.Path) -> None:
    program = cachepass.export(WAN.model(), WAN.example(), policy=FIRST_BLOCK)
    torch.export.save(program, tmp_path / "model.pt2")
    files = [str(tmp_path / name) for name in ("model.pt2", "output.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, cwd=tmp_path)
    with torch.no_grad():
        want = WAN.model()(**WAN.example())[0]
    assert distance(torch.load(files[1]), want) < 1e-6


# ------------------------------------------------------------------------ open sizes

OPEN = {
    "hidden_states": {0: Dim("rows"), 2: Dim("frames"), 3: Dim("height"), 4: Dim("width")},
    "timestep": {0: Dim("rows")},
    "encoder_hidden_states": {0: Dim("rows"), 1: Dim("words")},
}


@pytest.mark.full
def test_sizes_may_stay_open() -> None:
    two = wan_of(rows=2)
    program = cachepass.export(WAN.model(), two.example(), policy=FIRST_BLOCK, dynamic_shapes=OPEN)
    module = program.module()
    for tiny in (two, wan_of(rows=3, frames=5, height=12, width=10, words=9)):
        # Zeros of the sizes that a compiled graph's own state has.
        cold = cachepass.export(WAN.model(), tiny.example(), policy=FIRST_BLOCK).example_inputs[1][
            "state"
        ]
        branches = branches_of(tiny, "cond", "uncond")
        agree(Exported(module, cold, steps=6), Compiled(tiny, FIRST_BLOCK, 6), branches, 1e-5)


def test_errors_of_open_sizes() -> None:
    def export(**shapes: dict[int, Dim]) -> None:
        cachepass.export(
            WAN.model(), wan_of(rows=2).example(), policy=FIRST_BLOCK, dynamic_shapes=shapes
        )

    with pytest.raises(CachePassError, match="names 'latent', which is no tensor among"):
        export(latent={0: Dim("rows")})
    with pytest.raises(
        CachePassError, match=r"opens dimension 1 of 'hidden_states'.* holds for 4 alone: leave it"
    ):
        export(hidden_states={1: Dim("channels")})


def test_errors_of_capture() -> None:
    class Breaks(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            scale = hidden_states.max().item()
            return hidden_states * (2 if scale > 0.5 else 1)

    with pytest.raises(CaptureError, match=r"the call of Breaks cannot be captured.*test_program"):
        cachepass.export(Breaks(), {"hidden_states": torch.ones(1, 2)}, policy="compute")
    model = cachepass.compile(WAN.model(), policy="compute", inner="eager")
    with pytest.raises(CachePassError, match="`model` is compiled: export takes the plain module"):
        cachepass.export(model, WAN.example(), policy="compute")
