"""A second tree of modules over the same weights, in which layers of routed experts run as one.

The user's module stays as it is: no class is patched, no forward replaced. Only the modules on
the way to a layer of routed experts are made anew, as shallow copies; everything else, and every
dictionary of parameters, buffers and hooks, is the user's own. So `.to()`, a weight that is written
to or replaced and a module exchanged elsewhere are seen at once. Attributes of copied modules are
carried over when they change, and where a module among them is exchanged, or gets a hook, the tree
is built again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from cachepass.moe.match import find, is_hooked, routed

log = logging.getLogger(__name__)


class Shadow:
    """What is captured in the place of a model: itself, unless it has routed experts.

    Args:
        model: the user's, which is only read.
    """

    module: nn.Module
    """To be captured."""
    batched: list[str]
    """The layers of routed experts that run as one."""
    refused: dict[str, str]
    """Those that look like some, and why they are left alone."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: set[str] = set()
        self._build()

    def refresh(self) -> bool:
        """Bring the shadow up to the model's state; whether that took building it again."""
        exchanged = any(user._modules != seen for user, seen in self._children)
        if exchanged or any(is_hooked(inner) is not was for inner, was in self._hooks):
            self._build()
            return True
        for user, shadow, seen in self._copies:
            for name, value in vars(user).items():
                if name != "_modules" and seen.get(name, seen) is not value:
                    vars(shadow)[name] = seen[name] = value
        return False

    def _build(self) -> None:
        matches, refused = find(self._model)
        modules = dict(self._model.named_modules())
        on_the_way = {prefix for path in matches for prefix in _prefixes(path)}
        patched = [path for path in sorted(on_the_way) if "forward" in vars(modules[path])]
        if patched:
            why = f"the forward of {patched[0] or 'the model'} was replaced on the instance"
            refused = {**refused, **dict.fromkeys(matches, why)}
            matches, on_the_way = {}, set()
        copies = {path: _shallow(modules[path]) for path in on_the_way if path not in matches}
        copies |= {path: routed(modules[path], match) for path, match in matches.items()}
        for path, shadow in copies.items():
            if path:
                parent, _, name = path.rpartition(".")
                copies[parent]._modules[name] = shadow
        self.module = copies.get("", self._model)
        self.batched, self.refused = sorted(matches), dict(refused)
        self._copies = [
            (modules[p], shadow, dict(vars(modules[p]))) for p, shadow in copies.items()
        ]
        # What was taken for routed experts once is watched on: an adapter may come off again.
        self._known |= {*matches, *refused}
        known = [path for path in self._known if path in modules]
        watched = [modules[prefix] for path in known for prefix in _prefixes(path)]
        inside = [child for path in known for child in modules[path].modules()]
        watched += inside
        self._hooks = [(child, is_hooked(child)) for child in dict.fromkeys(inside)]
        self._children: list[tuple[nn.Module, dict[str, Any]]] = [
            (module, dict(module._modules)) for module in dict.fromkeys(watched) if module._modules
        ]
        for line in self.explain():
            log.info("%s", line)

    def explain(self) -> Iterator[str]:
        """What became of the layers that look like routed experts, for a report."""
        if self.batched:
            count, first = len(self.batched), self.batched[0] or "the model"
            yield f"the experts of {count} layers run as one, such as {first}"
        for path, why in self.refused.items():
            yield f"the experts of {path} are left alone: {why}"


def _prefixes(path: str) -> Iterator[str]:
    """The modules on the way to a path, the path itself among them."""
    yield ""
    parts = path.split(".") if path else []
    for i in range(len(parts)):
        yield ".".join(parts[: i + 1])


def _shallow(module: nn.Module) -> nn.Module:
    shadow = module.__new__(type(module))
    vars(shadow).update(vars(module))
    vars(shadow)["_modules"] = dict(module._modules)
    return shadow
