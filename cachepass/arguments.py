"""What a call is given, value by value: what a recording takes, and where it leaves something.

Pytree opens tuples, lists and dictionaries. Some models are handed an object besides (the keys and
values of a prompt that does not change, stored at the first step and read at the others), which
they read from and write to: its attributes are values of the call as well.
"""

from __future__ import annotations

import enum
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Put = Callable[[Any], None]


class Value:
    """A value of a call.

    Args:
        name: the argument, with what is inside of it: ``kv_cache.layers[0].keys``.
        value: a tensor or something else.
        put: sets it anew where it lies; None where nobody can, or nobody would see it.
    """

    __slots__ = ("name", "put", "value")

    def __init__(self, name: str, value: Any, put: Put | None = None) -> None:
        self.name, self.value, self.put = name, value, put


def values_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Value]:
    """All values of a call, in one order for calls of one structure."""
    parameters = tuple(inspect.signature(model.forward).parameters)
    seen: set[int] = set()
    found: list[Value] = []
    for path, leaf in pytree.tree_leaves_with_path((tuple(args), dict(kwargs))):
        found += _open(_name(path, parameters), leaf, None, seen)
    return found


def tensors_of(values: Sequence[Value]) -> list[Tensor]:
    """The tensors among the values."""
    return [v.value for v in values if isinstance(v.value, Tensor)]


def key_of(model: nn.Module, values: Sequence[Value]) -> object:
    """Equal for calls that one recording may serve: kinds, shapes, and the modules."""
    facts = tuple((v.name, _fact(v.value)) for v in values)
    return facts, tuple(id(m) for m in model.modules())


def _fact(value: Any) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return repr(value)


def _name(path: Any, parameters: Sequence[str]) -> str:
    """The argument of a path into ``(args, kwargs)``, with what is inside of it."""
    (_, first, *inside) = path
    name = parameters[first.idx] if isinstance(first, pytree.SequenceKey) else first.key
    return f"{name}{pytree.keystr(tuple(inside))}"


def _open(name: str, value: Any, put: Put | None, seen: set[int]) -> Iterator[Value]:
    entries = _entries(value)
    if entries is None:
        yield Value(name, value, put)
        return
    yield Value(name, type(value))
    if id(value) not in seen:
        seen.add(id(value))
        for key, inner, inner_put in entries:
            yield from _open(name + key, inner, inner_put, seen)


def _entries(value: Any) -> list[tuple[str, Any, Put | None]] | None:
    """What is inside of an object, or of a collection that it holds; None for all else."""
    setitem = functools.partial(functools.partial, operator.setitem, value)
    if isinstance(value, list):
        return [(f"[{i}]", inner, setitem(i)) for i, inner in enumerate(value)]
    if isinstance(value, dict):
        return [(f"[{k!r}]", inner, setitem(k)) for k, inner in value.items()]
    if isinstance(value, tuple):
        return [(f"[{i}]", inner, None) for i, inner in enumerate(value)]
    known = isinstance(value, Tensor | nn.Module | type | enum.Enum | torch.Generator)
    if known or callable(value) or not hasattr(value, "__dict__"):
        return None
    setattribute = functools.partial(functools.partial, setattr, value)
    return [(f".{k}", inner, setattribute(k)) for k, inner in vars(value).items()]
