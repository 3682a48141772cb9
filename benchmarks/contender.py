"""What `benchmarks.peers` compares: a method of some library with one knob, behind one face.

The values of a knob stand in order, from slow to fast. Every value gets a pipeline and
compiled code of its own, on one set of weights, so that no setting runs what another one
left behind: guards, recompilations, state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from benchmarks.quality import Request
from benchmarks.testbed import plain
from examples.shapes.pipeline import ShapesPipeline, build_pipeline

FULL_STEPS = 50

# (period, first step that may be reused) at 50 steps. Every method that keeps to a fixed
# pace gets the same ones: from which step on is reused matters as much as how often.
PACES = (
    (2, 30), (2, 20), (2, 15), (2, 10), (3, 15), (3, 10),
    (4, 10), (5, 10), (6, 10), (8, 10), (10, 8), (12, 6),
)  # fmt: skip
RANGES = (2, 3, 4, 5, 6, 8, 10)
# The defaults, of 3 and 2, would end at 2.5x.
MAGCACHE_IN_A_ROW = 6


def geometric(low: float, high: float, count: int = 33) -> tuple[float, ...]:
    """Values in equal ratios, rounded to what a person would write."""
    return tuple(float(f"{low * (high / low) ** (i / (count - 1)):.3g}") for i in range(count))


THRESHOLDS = geometric(0.02, 0.95)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders have in common."""

    size: str
    steps: int
    tuning: Request
    """A video to calibrate with."""
    weights: Mapping[str, Tensor] = field(compare=False, repr=False)

    def pipeline(self) -> Any:
        """A pipeline of a class of its own: some peers patch the class they are given."""
        parts = build_pipeline(self.size).components
        # Where weights lie in memory alone makes two equal models differ by some percent.
        parts["transformer"].load_state_dict(self.weights, assign=True)
        # Two peers know models by how the name of the pipeline's class begins.
        pipe = type("WanShapesPipeline", (ShapesPipeline,), {})(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def at(self, step: int) -> int:
        """A step of 50, as one of these steps; never the first."""
        return max(1, round(step * self.steps / FULL_STEPS))

    def paces(self) -> list[tuple[int, int]]:
        """`PACES` for these steps."""
        return [(period, self.at(start)) for period, start in PACES]


@dataclass(kw_only=True)
class Contender:
    """A pipeline with a method in it."""

    pipe: Any
    held: Callable[[], object] = lambda: None
    """Where the tensors are that it keeps, asked at the end of a step."""
    reused: Callable[[], dict[str, bool]] = dict
    """Whether the call of each branch was skipped in the step that just ended."""
    regions: Callable[[], int] = lambda: 0
    """What it compiled that dynamo does not count."""


Grid = Sequence[Any] | Callable[[Setting], Sequence[Any]]


@dataclass(frozen=True)
class Entry:
    """How to make a contender."""

    side: Literal["baseline", "peer", "ours"]
    build: Callable[[Setting, Any], Contender]
    knob: str = ""
    values: Grid = (None,)
    note: str = ""

    def grid(self, setting: Setting) -> Sequence[Any]:
        """The values of its knob, from slow to fast."""
        return self.values(setting) if callable(self.values) else self.values


def bytes_held(root: object) -> int:
    """Size of all tensors that can be reached from an object, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(root)}
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(root: object) -> Iterator[Tensor]:
    todo, seen = [root], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif not isinstance(item, nn.Module) and not callable(item):
            todo += getattr(item, "__dict__", {}).values()


def uncached(setting: Setting, _: Any) -> Contender:
    """Neither compiled nor cached."""
    return Contender(pipe=setting.pipeline())


def compiled(setting: Setting, _: Any = None) -> Contender:
    """Plain torch.compile: what every speedup is over."""
    return Contender(pipe=compile_whole(setting.pipeline()))


def compile_whole(pipe: Any) -> Any:
    """Plain torch.compile of the pipeline's model, with what hangs in it."""
    pipe.transformer = plain(pipe.transformer)
    return pipe
