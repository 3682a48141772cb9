"""Models that cannot be compiled: the error names the line of the model and what to do."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

import cachepass
from cachepass.capture import explain_failure
from tests.models import TOY
from tests.toys import broken
from tests.toys.dit import ToyDiT

WHERE = "select with torch.where, or decide before the call"
LEFT_OUT = r"Leave it out while the call is captured \(`if not torch.compiler.is_compiling\(\):`\)"


@pytest.mark.parametrize(
    ("kind", "code", "advice"),
    [
        (broken.TakesItem, "if scale > 0.5:", WHERE),
        (broken.UsesNumpy, "for _ in range(int(labels[0])):", WHERE),
        (broken.Prints, 'print("mean", x.mean())', LEFT_OUT),
        (
            broken.Raises,
            'raise ValueError(f"width {x.shape[-1]} is no multiple of 16")',
            "The model itself raises this: call it without cachepass",
        ),
    ],
)
def test_the_line_that_cannot_be_captured(kind: type[ToyDiT], code: str, advice: str) -> None:
    lines, start = inspect.getsourcelines(kind.forward)
    number = start + next(i for i, line in enumerate(lines) if line.strip() == code)
    place = re.escape(f"toys/broken.py:{number} in forward (`{code}`): ")
    cached: Any = cachepass.compile(kind().eval(), policy="firstblock", inner="eager")
    expected = (
        rf"^the call of {kind.__name__} cannot be captured as one graph. At \S*{place}.*{advice}.*"
        r"torch.compile\(model, fullgraph=True\) has to work$"
    )
    for _ in range(2):  # a failure is none the less one at the second call
        with pytest.raises(cachepass.CaptureError, match=expected):
            cached(**TOY.example())


@pytest.mark.parametrize("kind", [broken.Branches, broken.Loops, broken.SelectsRows])
def test_what_chooses_by_data_is_recorded(kind: type[ToyDiT]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    cached: Any = cachepass.compile(model, policy="compute", inner="eager")
    for seed in range(4):
        with torch.no_grad():
            assert torch.equal(cached(**TOY.example(seed)), model(**TOY.example(seed)))
    assert "the call chooses by data" in str(cachepass.report(cached))


def test_what_is_left_out_while_compiling_is_captured() -> None:
    class Careful(broken.Prints):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                return super().forward(x, t, y)
            return ToyDiT.forward(self, x, t, y)

    model = Careful().eval()
    cached: Any = cachepass.compile(model, policy="compute", inner="eager")
    with torch.no_grad():
        assert torch.equal(cached(**TOY.example()), model(**TOY.example()))


@pytest.mark.parametrize(
    ("kind", "found"),
    [(broken.NoRepeats, "'down': 3, 'up': 3"), (broken.OneBlock, "'layers': 1")],
)
def test_models_without_repeated_blocks(kind: Any, found: str) -> None:
    cached: Any = cachepass.compile(kind().eval(), policy="firstblock", inner="eager")
    inputs = TOY.example()
    if kind is broken.NoRepeats:
        inputs["y"] = torch.randn(1, 3, 8, 8)
    expected = rf"^no stack of repeated blocks: looked for .*{found}.* in the forward, from "
    expected += r"\S+/tests/toys/\w+.py:\d+ on. Without blocks .* use torch.compile"
    with pytest.raises(cachepass.CaptureError, match=expected):
        cached(**inputs)


TOLD = """Skipped a call
  Explanation: It is marked so.
  Hint: Mark it otherwise.
  Hint: Please report an issue to PyTorch.

  Developer debug context: none

from user code:
   File "/home/me/torch/model.py", line 12, in forward
    x = helper(x)
        ^^^^^^^^^
  File "/home/me/torch/model.py", line 5, in helper
    return lib.fold(x)
  File "/site/lib.py", line 30, in fold
    raise_it(x)
  File "{torch}/nn/functional.py", line 1, in fold
    return x
"""


def test_a_line_in_a_library_is_told_with_the_models_own() -> None:
    text = TOLD.format(torch=torch.__path__[0])
    message = str(explain_failure(RuntimeError(text), "Mine"))
    assert message == (
        "the call of Mine cannot be captured as one graph. At /site/lib.py:30 in fold "
        "(`raise_it(x)`), called from /home/me/torch/model.py:5 in helper (`return lib.fold(x)`): "
        "Skipped a call. It is marked so. Mark it otherwise. Or move this code out of the model's "
        "forward. cachepass rewrites whole graphs: torch.compile(model, fullgraph=True) has to work"
    )


def test_a_failure_without_a_place() -> None:
    message = str(explain_failure(RuntimeError("no idea"), "Mine"))
    assert "At an unknown line: no idea. Move this code out of the model's forward. " in message
