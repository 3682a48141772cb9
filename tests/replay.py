"""Replays the decisions of a cached request on the model that nobody rewrote.

The other side of a comparison for any model, by forward hooks alone: a model computes in full, and
what a site reuses is put in the place of what was computed. When to reuse is not decided here: that
comes from the report of the cached request. What stands in is what a site says with the predictor
`Reuse`, the value of the last full call of the same branch:

- a run of blocks: each block in it hands on, for each of its output streams, the stream that
  enters the run plus what it had gained by that block. An output that goes on from nothing that
  enters the run, or in another shape, is handed on as it was.
- the whole call: its output.
- the unconditional call: this step's conditional output plus the difference of the two.

Streams are told by identity: where a block hands on the very tensor that the next block of its
stack takes as an argument, output and argument are one stream, and where the first block of
another stack takes a tensor that was there before the run, the stream enters there. Where code
between the blocks makes new tensors, an output goes on from the first argument of its shape.

::

    outputs, calls = record(cached, [(step, "cond", inputs), ...], steps=8)
    replay = Replay(model, report["stacks"], cached.denoiser.policy.sites)
    for got, want in zip(outputs, replay.run(calls), strict=True): ...
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import cachepass
from cachepass.ir.boundary import Blocks, Cfg, Site, WholeCall

Given = tuple[int, str, Mapping[str, Any]]
"""Step, branch and keyword arguments of a call."""

Origin = tuple[int, str]
"""A block, by its number, and one of its arguments."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a cached request, and which sites it reused."""

    step: int
    branch: str
    inputs: Mapping[str, Any]
    reused: frozenset[str]


def record(cached: Any, given: Iterable[Given], *, steps: int) -> tuple[list[Any], list[Call]]:
    """What each call of a new request returns, and the decisions that its report tells.

    Rows of a call have to decide alike.
    """
    session, given = cachepass.session(cached, num_inference_steps=steps), list(given)
    outputs = []
    for step, branch, inputs in given:
        with session.at(step=step, branch=branch):
            outputs.append(cached(**inputs))
    (request,) = cachepass.report(session).to_dict()["requests"]
    reused = {}
    for row in request["steps"]:
        assert all(names == row["reused"][0] for names in row["reused"]), "rows decide differently"
        reused[row["step"], row["branch"]] = frozenset(row["reused"][0])
    return outputs, [Call(step, branch, i, reused[step, branch]) for step, branch, i in given]


@dataclasses.dataclass
class _Visit:
    """A block in a call. Values are copies: code between the blocks may write to the tensors."""

    stack: str
    taken: dict[str, Tensor]
    """Its arguments by their path in ``(args, kwargs)``."""

    entering: dict[str, Tensor]
    given: list[Any] = dataclasses.field(default_factory=list)
    """Its outputs, flat."""

    leaving: list[Any] = dataclasses.field(default_factory=list)


class Replay:
    """Runs calls of a request as they were decided.

    Args:
        model: as it was before `cachepass.compile`.
        stacks: paths of the lists that hold the blocks, as a report names them; a block is called
            once in a call.
        sites: of the policy; all with the predictor `Reuse`, and none a sublayer.
    """

    def __init__(self, model: nn.Module, stacks: Collection[str], sites: Iterable[Site]) -> None:
        self.model, self.sites = model, tuple(sites)
        for site in self.sites:
            assert isinstance(site, (Blocks, WholeCall, Cfg)), f"{site.name} is not replayed"
            assert isinstance(site.stand_in, cachepass.Reuse), f"{site.name} predicts otherwise"
        self.blocks: dict[nn.Module, str] = {}
        for path, block in model.named_modules():
            entry = re.fullmatch(r"(.*?)\.?(\d+)", path)
            if entry and (entry[1] or "self") in stacks:
                self.blocks[block] = entry[1]
        self.kept: dict[tuple[str, str], Any] = {}
        """What a site keeps for a branch; of a run of blocks, by block and output."""

        self.streams: dict[str, dict[int, str]] = collections.defaultdict(dict)
        """For each stack: from which argument an output of its blocks goes on, by identity."""

        self.visits: list[_Visit] = []
        self.made: dict[int, int] = {}
        """How many blocks were entered when a tensor of the call was made, by identity."""

        self.count = 0

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """What each call returns."""
        outputs: dict[int, Any] = {}
        cfg = {site.name for site in self.sites if isinstance(site, Cfg)}
        for _, group in itertools.groupby(enumerate(calls), key=lambda numbered: numbered[1].step):
            step, now = list(group), dict[str, Any]()
            skips_uncond = any(cfg & call.reused for _, call in step)
            # A reused unconditional call needs the conditional one, whichever comes first.
            for i, call in sorted(step, key=lambda numbered: numbered[1].branch != "cond"):
                full = not call.reused and not skips_uncond  # only these refresh what is kept
                now[call.branch] = outputs[i] = self._call(call, full, now.get("cond"))
        return [outputs[i] for i in range(len(calls))]

    @torch.no_grad()
    def _call(self, call: Call, full: bool, cond: Any) -> Any:
        reused = [site for site in self.sites if site.name in call.reused]
        for site in reused:
            kept = self.kept.get((site.name, "" if isinstance(site, Cfg) else call.branch))
            if isinstance(site, WholeCall):
                return kept
            if isinstance(site, Cfg):
                return _map(torch.add, cond, kept)
        runs = [site for site in reused if isinstance(site, Blocks)]
        with self._watched(runs, call.branch):
            out = self.model(**call.inputs)
        if not full:
            return out
        self._learn()
        for site in self.sites:
            if isinstance(site, Blocks):
                self.kept[site.name, call.branch] = self._gains(site)
            elif isinstance(site, WholeCall):
                self.kept[site.name, call.branch] = pytree.tree_map_only(Tensor, torch.clone, out)
            elif call.branch == "uncond" and cond is not None:
                self.kept[site.name, ""] = _map(torch.sub, out, cond)
        return out

    @contextlib.contextmanager
    def _watched(self, runs: Sequence[Blocks], branch: str) -> Iterator[None]:
        """Each block leaves a visit; those of the runs hand on what stands in for them."""
        self.visits, self.made = [], {}
        called: set[nn.Module] = set()
        ranges = [(site, *site.range(self.count)) for site in runs]
        ranges.sort(key=lambda r: r[1] - r[2])  # the widest first: it skips the others

        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            assert block not in called, "a block is called twice"
            called.add(block)
            leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
            taken = {pytree.keystr(p): v for p, v in leaves if isinstance(v, Tensor)}
            copies = {path: value.clone() for path, value in taken.items()}
            self.visits.append(_Visit(self.blocks[block], taken, copies))

        def leave(block: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            visit, index = self.visits[-1], len(self.visits) - 1
            visit.given, tree = pytree.tree_flatten(out)
            visit.leaving = pytree.tree_map_only(Tensor, torch.clone, visit.given)
            for site, start, stop in ranges:
                if start <= index < stop:
                    kept = self.kept[site.name, branch][index]
                    return pytree.tree_unflatten(self._stand_in(kept, visit), tree)
            return None

        hooks = [
            hook for block in self.blocks
            for hook in (
                block.register_forward_pre_hook(enter, with_kwargs=True),
                block.register_forward_hook(leave, with_kwargs=True),
            )
        ]  # fmt: skip
        try:
            # Flex attention would compile itself, with the mode inside.
            with torch.compiler.set_stance("force_eager"), _Making(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _stand_in(self, kept: Sequence[Any], visit: _Visit) -> list[Any]:
        return [
            value if gain is None
            else gain if origin is None
            else self.visits[origin[0]].entering[origin[1]] + gain
            for value, (origin, gain) in zip(visit.leaving, kept, strict=True)
        ]  # fmt: skip

    def _learn(self) -> None:
        """Streams by identity, and the number of blocks."""
        self.count = len(self.visits)
        for visit, following in itertools.pairwise(self.visits):
            if visit.stack == following.stack:
                for i, value in enumerate(visit.given):
                    if (path := _find(value, following.taken)) is not None:
                        self.streams[visit.stack].setdefault(i, path)

    def _gains(self, site: Blocks) -> dict[int, list[tuple[Origin | None, Any]]]:
        """For each block of a run and each output: where its stream enters, what it gained."""
        start, stop = site.range(self.count)
        found: dict[int, list[tuple[Origin | None, Any]]] = {}
        for index in range(start, stop):
            found[index], used = [], set()
            for i, value in enumerate(self.visits[index].leaving):
                origin = None
                if isinstance(value, Tensor) and site.keep == "residual":
                    origin = self._origin(start, index, i)
                if origin is None or origin in used:
                    found[index].append((None, value if isinstance(value, Tensor) else None))
                else:
                    used.add(origin)
                    base = self.visits[origin[0]].entering[origin[1]]
                    found[index].append((origin, value - base))
        return found

    def _origin(self, start: int, index: int, i: int) -> Origin | None:
        """The block and argument where output `i` of a block enters the run, unchanged in shape."""
        visit, value = self.visits[index], self.visits[index].leaving[i]
        known = self.streams[visit.stack]
        path = known.get(i) if known else _alike(value, visit.entering)
        origin = None if path is None else self._entry(start, index, path, value)
        fits = origin and _fits(value, self.visits[origin[0]].entering[origin[1]])
        return origin if fits else None

    def _entry(self, start: int, index: int, path: str, value: Tensor) -> Origin | None:
        """Where an argument of a block enters the run, by what made it."""
        argument = self.visits[index].taken[path]
        for before in reversed(range(start, index)):
            for j, given in enumerate(self.visits[before].given):
                if given is argument:
                    return self._origin(start, before, j)
        if self.made.get(id(argument), 0) <= start:
            return index, path
        # Code between the blocks made it: as the first block of the stack has it, or by its shape.
        stack = self.visits[index].stack
        first = next(v for v in range(start, index + 1) if self.visits[v].stack == stack)
        if first < index:
            return self._entry(start, first, path, value)
        entering = self.visits[start].entering
        streams = self.streams[self.visits[start].stack].values()
        alike = _alike(value, {p: entering[p] for p in streams} if streams else entering)
        return None if alike is None else (start, alike)


class _Making(TorchFunctionMode):
    """Notes before which block of a call a tensor was made."""

    def __init__(self, replay: Replay) -> None:
        super().__init__()
        self.replay = replay
        self.alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self.alive.append(value)
                self.replay.made.setdefault(id(value), len(self.replay.visits))
        return result


def _find(value: Any, arguments: Mapping[str, Tensor]) -> str | None:
    """The path of the argument that is this very object."""
    return next((path for path, argument in arguments.items() if argument is value), None)


def _alike(value: Tensor, arguments: Mapping[str, Tensor]) -> str | None:
    """The path of the first argument of this shape and dtype."""
    return next((path for path, argument in arguments.items() if _fits(value, argument)), None)


def _fits(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and value.dtype == other.dtype


def _map(function: Any, *trees: Any) -> Any:
    """A function of tensors, on trees of them."""
    return pytree.tree_map(lambda *v: function(*v) if isinstance(v[0], Tensor) else v[0], *trees)
