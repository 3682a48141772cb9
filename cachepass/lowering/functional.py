"""A rewritten graph without a frame: state goes in and comes out, conditionals are `torch.cond`.

What `runtime.frame` does on the host for a call, said in nodes: one graph, for Inductor, for
`torch.export`, for ONNX. It takes the call's inputs, three numbers that say where the call
stands, and the state; it returns the results, what was reused, and the state that changed.
All state is zeros before a request. It is kept by branch of guidance, but for what branches
share (`Entry.shared`); a step that holds something is kept plus one, so that zero says *cold*.

Guards become masks: what an arm writes is written in the rows that the guard lets through.
An unconditional call that comes before its conditional one is never skipped here: that takes
a call ahead of its turn, and so a host.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from cachepass.ir import ops
from cachepass.ir.boundary import Layout, Slot, call_inputs, layout_of
from cachepass.ir.graph import acts, drop_unused, memory_of, walk
from cachepass.ir.ops import When
from cachepass.lowering import rule as tensors
from cachepass.lowering.scope import Scope
from cachepass.runtime.policy import Policy

SEEN = "seen"
"""State: the steps (plus one) at which each kind of branch, and any, was called last."""

Env = dict[fx.Node, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the state."""

    name: str
    shared: bool
    """One for all branches of a request, instead of one for each."""

    example: Tensor
    """A fake one: shape, dtype and device."""

    def cold(self, shape: Sequence[int] | None = None) -> Tensor:
        """What it is before the first call; `shape` where the example's is symbolic."""
        like = self.example
        return torch.zeros(shape or like.shape, dtype=like.dtype, device=like.device)


@dataclasses.dataclass(frozen=True)
class Functional:
    """``gm(*inputs, step, num_steps, branch, *state) -> (*results, *reused, *new state)``.

    The three numbers are () int64 tensors: `num_steps` is -1 where it is not known, `branch`
    the place in `rule.BRANCHES`.
    """

    gm: fx.GraphModule
    state: tuple[Entry, ...]
    results: int
    sites: tuple[str, ...]
    """Of `reused`: (rows,) bool each."""

    changed: tuple[str, ...]
    """Names of the state that is returned, in order."""

    def parts(self, made: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """What a call returned, as results, `reused` and new state."""
        last = self.results + len(self.sites)
        return made[: self.results], made[self.results : last], made[last:]


def functionalize(
    gm: fx.GraphModule,
    policy: Policy,
    slots: Mapping[str, Tensor],
    latent: Tensor,
    *,
    shared: Collection[str] = (),
    numbers: Mapping[str, int] = MappingProxyType({}),
) -> Functional:
    """Write a graph anew, without its frame.

    Args:
        gm: a rewritten graph.
        policy: what it was rewritten for; each of its rules has to have a form in tensor code.
        slots: slot -> a fake of what it holds (`lowering.shapes`).
        latent: a fake of it.
        shared: names of regions that are one subgraph for all their calls (`lowering.share`); any
            other is written out wherever it is called.
        numbers: inputs (by name) that are numbers and stay what they are. As symbols they would be
            in the sizes of what a conditional returns, which torch 2.13 does not always solve.

    Raises:
        PolicyError: the policy needs the host.
    """
    return _Writer(gm, policy, slots, latent, shared, numbers).write()


class _Writer:
    def __init__(
        self, gm: fx.GraphModule, policy: Policy, slots: Mapping[str, Tensor], latent: Tensor,
        shared: Collection[str], numbers: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.gm, self.policy, self.slots, self.latent = gm, policy, slots, latent
        self.shared, self.numbers = shared, numbers
        self.layout: Layout = layout_of(gm)
        self.rows = latent.shape[0]
        self.entries: dict[str, Entry] = {}
        self.initial: dict[str, fx.Node] = {}
        self.references: dict[str, Slot] = {
            str(node.args[1]): self.layout.slots[str(node.args[2])]
            for part in walk(gm)
            for node in part.graph.find_nodes(op="call_function", target=ops.observe)
        }
        """Signal -> the slot that it is compared with."""

        self.rule = tensors.Rule(policy, self.layout)
        self.root = Scope()
        self.memory: dict[fx.Node, int | None] = {}
        """Of inputs, see `memory_of`."""
        self.taken: dict[str, fx.Node] = {}
        self.full: fx.Node | None = None
        self.do: dict[Any, Callable[..., Any]] = {
            ops.cache_read: self._read,
            ops.cache_write: self._write,
            ops.cache_shift: self._shift,
            ops.weights: self._weights,
            ops.observe: self._observe,
            ops.decide: self._decide,
            ops.conditional: self._select,
            ops.guard: self._guard,
        }

    def write(self) -> Functional:
        root, env = self.root, {}
        for node in call_inputs(self.gm):
            value = root.placeholder(node.name)
            env[node] = self.numbers.get(node.name, value)
            self.memory[value] = memory_of(node)
        assert self.layout.latent is not None
        self.input = env[self.layout.latent]
        if self.layout.listed:
            self.input = root.call(torch.unsqueeze, self.input, 0)
        time = self.layout.timestep
        self.time = env[time] if time is not None and self.policy.needs_timestep else None
        self.step, self.num_steps, self.branch = map(
            root.placeholder, ("step", "num_steps", "branch")
        )
        results = self.run(self.gm, root, env)
        if self.policy.sites:
            seen = self._state(root, SEEN)
            root.state[SEEN] = root.call(tensors.called, seen, self.step, self.branch)
        changed = [name for name, node in root.state.items() if node is not self.initial.get(name)]
        sites = [site.name for site in self.policy.sites if site.name in self.taken]
        # A package takes what it is given for dense memory: a value that rows share would be read
        # beyond its end.
        new_state = [root.call(tensors.contiguous, root.state[n]) for n in changed]
        returned = [*results, *(self.taken[s] for s in sites), *new_state]
        root.graph.output(tuple(root.here(value) for value in returned))
        whole = root.module()
        for part in walk(whole):
            drop_unused(part.graph, lambda n: n.target is tensors.set_number or acts(n))
            part.recompile()
        return Functional(
            whole, tuple(self.entries.values()), len(results), tuple(sites), tuple(changed)
        )

    def run(self, part: fx.GraphModule, scope: Scope, env: Env) -> Sequence[Any]:
        """Write a graph, or an arm, into a scope; returns what it returns."""
        for node in part.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                results = node.args[0]
                return [env[n] for n in results] if isinstance(results, tuple | list) else []
            if node.op == "get_attr":
                value = getattr(part, str(node.target))
                if any(user.target in self.do for user in node.users):
                    env[node] = value  # an arm
                else:
                    scope.root[str(node.target)] = value
                    env[node] = scope.graph.get_attr(str(node.target))
            elif node.op == "call_module":
                region = getattr(part, str(node.target))
                env[node] = self._call(scope, str(node.target), region, [env[n] for n in node.args])
            elif node.target is operator.getitem and isinstance(env[node.args[0]], list):
                env[node] = env[node.args[0]][node.args[1]]
            elif node.target is operator.setitem and not isinstance(node.args[2], fx.Node):
                env[node] = scope.call(tensors.set_number, *fx.map_arg(node.args, env.__getitem__))
            elif node.target in (torch.tensor, torch.as_tensor) and not node.all_input_nodes:
                # Constants: an arm has no room for any.
                env[node] = self.root.graph.node_copy(node)
            elif node.target in self.do:
                env[node] = self.do[node.target](scope, *_args(node, env))
            else:
                env[node] = scope.graph.node_copy(node, lambda n: scope.here(env[n]))
        raise AssertionError("a graph has an output")

    def _call(
        self, scope: Scope, name: str, region: fx.GraphModule, given: Sequence[Any]
    ) -> fx.Node | list[Any]:
        """A region: one subgraph of several calls, or written out."""
        if name in self.shared:
            scope.root[name] = region
            # A subgraph is traced once, for the layouts of its first call: all are contiguous.
            laid_out = [
                scope.call(tensors.contiguous, v) if isinstance(v, fx.Node) else v for v in given
            ]
            return scope.call(invoke_subgraph, scope.graph.get_attr(name), name, *laid_out)
        inputs = region.graph.find_nodes(op="placeholder")
        return list(self.run(region, scope, dict(zip(inputs, given, strict=True))))

    # ------------------------------------------------------------------------ state

    def _state(self, scope: Scope, name: str) -> fx.Node:
        """A tensor of the state as it is at this place; an input of the whole if it is new."""
        if name not in scope.state:
            if name not in self.initial:
                self.entries[name] = self._entry(name)
                self.initial[name] = self.root.placeholder("state_" + identifier(name))
            return self.initial[name]
        return scope.state[name]

    def _entry(self, name: str) -> Entry:
        kind, _, rest = name.partition(":")
        shape: tuple[Any, ...] = (self.rows,)
        dtype = torch.int64
        if kind == "slot":
            return Entry(name, self.layout.slots[rest].across_branches, self.slots[rest])
        shared = self.policy.trigger.shared_by_branches
        if kind == "tag":
            shared = self.layout.slots[rest].across_branches
        elif kind == "signal":
            shared = shared or self.references[rest].across_branches
            shape, dtype = (self.rows, 6), torch.float64
        elif kind == "rule":
            dtype = self.rule.state[rest]
        elif name == SEEN:
            shared, shape = True, (tensors.ANY + 1,)
        return Entry(name, shared, self.latent.new_empty(shape, dtype=dtype))

    def _mask(self, scope: Scope, new: fx.Node, old: fx.Node) -> fx.Node:
        """The new value in the rows that are written."""
        if scope.writing is None:
            return new
        return scope.call(tensors.where_rows, scope.writing, new, old)

    # --------------------------------------------------------------- the operations

    def _read(self, scope: Scope, slot: str, like: fx.Node | None = None) -> fx.Node:
        value, declared = self._state(scope, f"slot:{slot}"), self.layout.slots[slot]
        if like is None or (declared.age and declared.site):
            return value
        return scope.call(tensors.told, value, self._state(scope, f"tag:{slot}"))

    def _write(self, scope: Scope, slot: str, value: fx.Node) -> None:
        tag = scope.call(tensors.tag_of, self.step, self.input)
        for name, new in ((f"slot:{slot}", value), (f"tag:{slot}", tag)):
            scope.state[name] = self._mask(scope, new, self._state(scope, name))

    def _shift(self, scope: Scope, newer: str, older: str) -> None:
        for kind in ("slot", "tag"):
            new = self._state(scope, f"{kind}:{newer}")
            name = f"{kind}:{older}"
            scope.state[name] = self._mask(scope, new, self._state(scope, name))

    def _weights(self, scope: Scope, slot: str, count: int, like: fx.Node) -> fx.Node:
        newest = self.layout.slots[slot]
        predictor = next(s for s in self.policy.sites if s.name == newest.site).stand_in
        tags = [self._state(scope, f"tag:{name}") for name in newest.ages(predictor.history)]
        wanted = getattr(predictor, "signal", None) if predictor.needs_signal else None
        measured = {} if wanted is None else {wanted: self._signal(scope, wanted)}
        return scope.call(tensors.Weights(predictor), self.step, tuple(tags), measured)

    def _signal(self, scope: Scope, signal: str) -> fx.Node:
        return self._state(scope, f"signal:{signal}")

    def _observe(self, scope: Scope, signal: str, slot: str, sums: fx.Node) -> None:
        name = f"signal:{signal}"
        old = self._state(scope, name)
        new = scope.call(tensors.observe, sums, self.step, self._state(scope, f"tag:{slot}"), old)
        scope.state[name] = self._mask(scope, new, old)

    def _decide(self, scope: Scope) -> None:
        rule = self.rule
        tags = {
            site: tuple(self._state(scope, f"tag:{slot}") for slot in slots)
            for site, slots in rule.lasting.items()
        }
        names = [signal.name for signal in self.policy.signals()]
        signals = {name: self._signal(scope, name) for name in names}
        state = {name: self._state(scope, f"rule:{name}") for name in rule.state}
        seen = self._state(scope, SEEN)
        made = scope.call(
            rule, self.step, self.num_steps, self.branch, seen, tags, signals, state, self.input,
            self.time,
        )  # fmt: skip
        count = len(rule.sites)
        self.full, *values = scope.items(made, 0, 1 + count + len(rule.state))
        self.taken = dict(zip(rule.sites, values[:count], strict=True))
        for name, value in zip(rule.state, values[count:], strict=True):
            scope.state[f"rule:{name}"] = value

    def _guard(
        self, scope: Scope, when: When, arm: fx.GraphModule, operands: Sequence[fx.Node]
    ) -> None:
        mask: fx.Node | None = None
        if when not in (When.FIRST_CALL, When.COND, When.UNCOND_FIRST):
            mask = scope.active if self.policy.trigger.independent else self.full
        if when is not When.FULL:
            seen = self._state(scope, SEEN)
            mask = scope.call(tensors.lets, when, self.step, self.branch, seen, self.input, mask)
        outer, scope.writing = scope.writing, mask
        self.run(arm, scope, _given(arm, operands))
        scope.writing = outer

    def _select(
        self, scope: Scope, site: str, compute: fx.GraphModule, reuse: fx.GraphModule,
        operands: Sequence[fx.Node], _: object,
    ) -> fx.Node:  # fmt: skip
        taken = self.taken[site]
        computing, reusing = Scope(scope), Scope(scope)
        computing.active = computing.call(tensors.but, taken, scope.active)
        results = self.run(compute, computing, _given(compute, operands))
        kept = self.run(reuse, reusing, _given(reuse, operands))
        if not (isinstance(self.rows, int) and self.rows == 1):  # rows may differ
            rows = self.run(reuse, computing, _given(reuse, operands))
            pairs = zip(rows, results, strict=True)
            results = [computing.call(tensors.where_rows, taken, old, new) for old, new in pairs]
        written = [n for n, v in computing.state.items() if v is not scope.state.get(n)]
        new = [computing.state[name] for name in written]
        old = [self._state(scope, name) for name in written]
        self._close(computing, [*results, *new])
        self._close(reusing, [*kept, *old])
        operands = list(dict.fromkeys((*computing.lifted, *reusing.lifted)))
        arms = [
            scope.graph.get_attr(scope.attach(arm, operands, f"{kind}_{site}"))
            for kind, arm in (("reuse", reusing), ("compute", computing))
        ]
        every = scope.call(tensors.every, taken, scope.active)
        # `torch.cond` takes no operands that share memory, as the parts of a chunk do.
        values = [scope.here(operand) for operand in operands]
        uses = collections.Counter(map(self.memory.get, values))
        del uses[None]  # no input of the whole, but what an outer conditional was given alone
        inputs = tuple(
            v if v.op == "placeholder" and uses[self.memory.get(v)] < 2
            else scope.call(tensors.own, v)
            for v in values
        )  # fmt: skip
        chosen = scope.graph.call_function(
            torch.ops.higher_order.cond, (every, arms[0], arms[1], inputs)
        )
        count = len(results)
        items = scope.items(chosen, count, count + len(written))
        scope.state |= dict(zip(written, items, strict=True))
        return chosen

    def _close(self, arm: Scope, results: Sequence[Any]) -> None:
        """An arm's outputs have one layout, and may not be what went in."""
        arm.graph.output(tuple(arm.call(tensors.own, value) for value in results))


def _args(node: fx.Node, env: Env) -> Any:
    """What an operation of `ir.ops` is given, but for the frame."""
    return fx.map_arg(node.args[1:], env.__getitem__)


def _given(arm: fx.GraphModule, operands: Sequence[fx.Node]) -> Env:
    """What stands for the inputs of an arm."""
    return dict(zip(call_inputs(arm), operands, strict=True))


def identifier(name: str) -> str:
    """A name of the state, as an identifier."""
    return "".join(c if c.isalnum() else "_" for c in name)
