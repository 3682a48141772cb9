"""What a pass is, and the one loop that runs passes.

A pass is a frozen dataclass with a `name` and ``__call__(gm) -> PassResult``. It edits; the
loop here lints, verifies, tells observers and names the pass when it fails.
The rewrites depend on the policy's declarations alone, which are fields of the passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import fx

from cachepass.errors import CachePassError, PassError
from cachepass.ir.graph import walk
from cachepass.ir.verify import verify


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """The graph after a pass, and whether the pass changed it."""

    graph_module: fx.GraphModule
    modified: bool


class Pass(Protocol):
    """One rewrite of a graph. Running it on its own output changes nothing."""

    @property
    def name(self) -> str:
        """Kebab-case, verb first; what dumps and errors call the pass."""
        ...

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Edit `gm` in place."""
        ...


Observer = Callable[[int, str, fx.GraphModule], None]
"""Called after each pass with its number, its name and the graph."""


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], *, observers: Iterable[Observer] = ()
) -> PassResult:
    """Run passes in order; lint and verify after each, and make Python code of the last result.

    Raises:
        PassError: a pass failed or broke the graph; names it and those before it. Errors
            that cachepass raises on purpose (a policy that asks for what the model has
            not, a graph that breaks a rule) come through as they are.
    """
    modified = False
    watching = tuple(observers)
    for number, current in enumerate(passes):
        try:
            result = current(gm)
            if not isinstance(result, PassResult):
                raise TypeError(f"expected a PassResult, got {type(result).__name__}")
            gm = result.graph_module
            if result.modified:
                for graph_module in walk(gm):
                    graph_module.graph.lint()
            verify(gm)
        except CachePassError as error:
            error.add_note(f"while running pass {current.name!r}")
            raise
        except Exception as error:
            before = ", ".join(p.name for p in passes[:number]) or "none"
            raise PassError(
                f"pass {current.name!r} failed (passes run before it: {before}): {error}"
            ) from error
        modified |= result.modified
        for observe in watching:
            observe(number, current.name, gm)
    if modified:  # once: of a deep model it takes longer than all passes together
        for graph_module in walk(gm):
            graph_module.recompile()
    return PassResult(gm, modified)
