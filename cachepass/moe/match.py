"""Find layers of routed experts by their structure, and prove what they compute.

A candidate has a ModuleList of equal experts (`cachepass.moe.expert`) and, beside it, a gate: a
module with a weight of one row for each expert. What its forward does with them is not read but
tried: a copy with random weights runs, and so does `RoutedExperts` under each way of taking
experts and weights from the gate. The first way whose outputs agree is the match. Equal
structures are tried once.
"""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachepass.moe.expert import Program, trace_expert
from cachepass.moe.grouped import combine, route

Choice = tuple[Tensor, Tensor]
"""The experts of each token and their weights, both (tokens, k)."""

_TOLERANCE = 1e-4
_TOP = 8
"""The most experts for each token that are tried where the gate gives scores."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """How a layer routes: its forward is the experts' weighted sum, and what is added."""

    program: Program
    gate: str
    experts: str
    added: Sequence[str]
    """Children that work on every token and are added, such as shared experts."""
    choose: Callable[[Any], Choice]
    """From what the gate returns."""


class RoutedExperts(nn.Module):
    """A layer of routed experts whose forward runs all experts at once."""

    match: Match

    def forward(self, x: Tensor) -> Tensor:
        """What the user's own forward computes, checked by `prove`."""
        match = self.match
        experts: Any = getattr(self, match.experts)
        index, weight = match.choose(getattr(self, match.gate)(x))
        rows, offsets, place = route(index, len(experts))
        tokens = x.reshape(-1, x.shape[-1])
        results = match.program(tokens, rows, offsets, list(experts))
        y = combine(results, place, weight, x)
        for name in match.added:
            y = y + getattr(self, name)(x)
        return y


def routed(module: nn.Module, match: Match) -> RoutedExperts:
    """The module with another forward: it shares everything that the module has."""
    shadow = RoutedExperts.__new__(RoutedExperts)
    vars(shadow).update(vars(module), match=match)
    return shadow


def candidates(module: nn.Module) -> Iterator[tuple[str, str, Program]]:
    """Names of gate and experts in a module that may be a layer of routed experts."""
    for name, experts in module.named_children():
        if not isinstance(experts, nn.ModuleList) or len(experts) < 2:
            continue
        gates = [
            other
            for other, child in module.named_children()
            if child is not experts and _scores(child, len(experts))
        ]
        if not gates or len({signature(expert) for expert in experts}) > 1:
            continue
        try:
            program = trace_expert(experts[0])
        except ValueError:
            continue
        for gate in gates:
            yield gate, name, program


def _scores(module: nn.Module, experts: int) -> bool:
    return any(p.ndim == 2 and p.shape[0] == experts for p in module.parameters())


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that compute the same function of their weights."""
    return tuple(
        (
            name,
            type(child),
            tuple(sorted((k, _constant(v)) for k, v in vars(child).items() if k not in _OF_ALL)),
            tuple((k, p.shape, p.dtype) for k, p in child._parameters.items() if p is not None),
            tuple((k, _of_buffer(buffer)) for k, buffer in child._buffers.items()),
        )
        for name, child in module.named_modules()
    )


_OF_ALL = frozenset(vars(nn.Module())) - {"training"}
"""What torch keeps in every module, whatever it computes."""


def _of_buffer(buffer: Tensor | None) -> Any:
    """What tells buffers apart, but for numbers that are drawn for a trial."""
    if buffer is None or buffer.is_floating_point() or buffer.is_meta:
        return buffer if buffer is None else (buffer.shape, buffer.dtype)
    return buffer.shape, buffer.dtype, tuple(buffer.flatten().tolist())


def _constant(value: Any) -> str:
    """Equal for attributes that mean the same; what nobody can tell is itself alone."""
    plain = (int, float, str, bool, type(None), torch.dtype, torch.device, enum.Enum)
    if isinstance(value, plain):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(_constant, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({', '.join(sorted(map(_constant, value)))})"
    if isinstance(value, Mapping):
        pairs = (f"{_constant(k)}: {_constant(v)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, functools.partial):
        return f"partial({_constant(value.func)}, {_constant(value.args)}, {value.keywords})"
    if isinstance(value, types.FunctionType) and not value.__closure__:  # each expert's lambda
        return f"code at {id(value.__code__)}, {value.__defaults__}, {value.__kwdefaults__}"
    return f"{type(value).__name__} at {id(value)}"


# ----------------------------------------------------------------- what a gate may return


def _chosen(positions: tuple[int, int], output: Any) -> Choice:
    index, weight = (output[i].reshape(-1, output[i].shape[-1]) for i in positions)
    return index, weight


def _from_scores(rule: Callable[[Tensor, int], Choice], k: int, output: Tensor) -> Choice:
    weight, index = rule(output.reshape(-1, output.shape[-1]), k)
    return index, weight


def _normalised(choice: Choice) -> Choice:
    weight, index = choice
    return weight / weight.sum(-1, keepdim=True), index


_RULES: Sequence[Callable[[Tensor, int], Choice]] = (
    lambda scores, k: torch.topk(scores.softmax(-1), k),
    lambda scores, k: _normalised(torch.topk(scores.softmax(-1), k)),
    lambda scores, k: torch.topk(scores.sigmoid(), k),
    lambda scores, k: _normalised(torch.topk(scores.sigmoid(), k)),
)
"""(weight, index) from scores. The largest k of a softmax, made to add up to one, are the
softmax of the largest k."""


def _ways(output: Any, experts: int) -> Iterator[Callable[[Any], Choice]]:
    """All ways to take a choice from what a gate returned, the likelier first."""
    if isinstance(output, Tensor):
        if output.shape[-1] == experts and output.is_floating_point():
            for k, rule in itertools.product(range(1, min(_TOP, experts) + 1), _RULES):
                yield functools.partial(_from_scores, rule, k)
    elif isinstance(output, (tuple, list)):
        tensors = [(i, value) for i, value in enumerate(output) if isinstance(value, Tensor)]
        for (i, index), (j, weight) in itertools.permutations(tensors, 2):
            integers = index.dtype in (torch.int64, torch.int32)
            if integers and weight.is_floating_point() and index.shape == weight.shape:
                yield functools.partial(_chosen, (i, j))


# ------------------------------------------------------------------------------- proving


def prove(module: nn.Module, gate: str, experts: str, program: Program) -> Match:
    """How a candidate routes.

    Raises:
        ValueError: why nothing that was tried agrees with its forward.
    """
    added = [n for n, c in module.named_children() if n not in (gate, experts) and _has_weights(c)]
    generator = torch.Generator().manual_seed(0)
    probes = [torch.randn(2, 12, program.width, generator=generator)]
    probes.append(torch.randn(1, 1, program.width, generator=generator))
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        try:
            own = _random_copy(module)
            expected = [own(probe) for probe in probes]
            output = getattr(own, gate)(probes[0])
        except Exception as error:  # the user's code, called as it may not be meant to be
            raise ValueError(f"a trial call failed: {error}") from error
        for choose in _ways(output, len(getattr(own, experts))):
            match = Match(program=program, gate=gate, experts=experts, added=added, choose=choose)
            if _agrees(routed(own, match), probes, expected):
                return match
    raise ValueError("its output is no weighted sum of the gate's choice of experts that is known")


def _agrees(shadow: nn.Module, probes: Sequence[Tensor], expected: Sequence[Any]) -> bool:
    for probe, wanted in zip(probes, expected, strict=True):
        try:
            got = shadow(probe)
        except Exception:  # a way of reading the gate that does not fit
            return False
        if not isinstance(wanted, Tensor) or got.shape != wanted.shape:
            return False
        if not (got - wanted).norm() <= _TOLERANCE * wanted.norm():
            return False
    return True


def _random_copy(module: nn.Module) -> nn.Module:
    """The module in float on the CPU, with weights that hide nothing: no zeros, no ties."""
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        drawn = torch.randn(parameter.shape, generator=generator) * scale
        memo[id(parameter)] = nn.Parameter(drawn, requires_grad=False)
    for buffer in module.buffers():
        if buffer.is_floating_point():  # positive, as it may be a variance
            memo[id(buffer)] = torch.rand(buffer.shape, generator=generator)
        elif buffer.is_meta:
            memo[id(buffer)] = torch.zeros_like(buffer, device="cpu")
    return copy.deepcopy(module, memo).to(device="cpu", dtype=torch.float32)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def find(model: nn.Module) -> tuple[Mapping[str, Match], Mapping[str, str]]:
    """Layers of routed experts by path, and why candidates are none."""
    proofs: dict[Any, Match | str] = {}
    matches: dict[str, Match] = {}
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        for gate, experts, program in candidates(module):
            hooked = [name for name, child in module.named_modules() if is_hooked(child)]
            if hooked:  # of this layer alone, whatever was proved of others
                refused[path] = f"hooks on {hooked[0] or 'it'} would not run"
                continue
            key = (signature(module), gate, experts)
            if key not in proofs:
                proofs[key] = _prove_or_say(module, gate, experts, program)
            proof = proofs[key]
            if isinstance(proof, Match):
                matches[path] = proof
                refused.pop(path, None)
                break
            refused[path] = proof
    return matches, refused


def _prove_or_say(module: nn.Module, gate: str, experts: str, program: Program) -> Match | str:
    try:
        return prove(module, gate, experts, program)
    except ValueError as error:
        return str(error)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward, or something else."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
