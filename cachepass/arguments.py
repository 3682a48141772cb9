"""What a call is given, value by value: what a recording takes, and where it leaves something.

Pytree opens tuples, lists and dictionaries. Some models are handed an object besides (the keys and
values of a prompt that does not change, stored at the first step and read at the others), which
they read from and write to: its attributes are values of the call as well.
"""

from __future__ import annotations

import collections
import enum
import functools
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachepass.errors import CaptureError

Put = Callable[[Any], None]


class Value:
    """A value of a call.

    Args:
        name: the argument, with what is inside of it: ``kv_cache.layers[0].keys``.
        value: a tensor or something else.
        put: sets it anew where it lies; None where nobody can, or nobody would see it.
    """

    __slots__ = ("_put", "name", "value")

    def __init__(self, name: str, value: Any, put: Put | None = None) -> None:
        self.name, self.value, self._put = name, value, put

    def put(self, value: Any) -> None:
        """Set it anew, in the object that holds it.

        Raises:
            CaptureError: it is in none.
        """
        if self._put is None:
            raise CaptureError(f"the forward changes {self.name}, which is given to it")
        self._put(value)


def values_of(
    parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Value]:
    """All values of a call, in one order for calls of one structure; the first is the structure.

    Args:
        parameters: names of the forward's parameters, for arguments passed by position.
        args: of the call.
        kwargs: of the call.
    """
    leaves, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    found, seen = [Value("", str(spec))], dict[int, str]()
    for path, leaf in leaves:
        found += _open(_name(path, parameters), leaf, None, seen)
    return found


def tensors_of(values: Sequence[Value]) -> list[Tensor]:
    """The tensors among the values."""
    return [v.value for v in values if isinstance(v.value, Tensor)]


def key_of(model: nn.Module, values: Sequence[Value]) -> object:
    """Equal for calls that one recording may serve: kinds, shapes, and the modules.

    Raises:
        CaptureError: a value is of a kind that nobody can look into.
    """
    first: dict[int, str] = {}
    facts = tuple((v.name, _fact(v, first)) for v in values)
    return facts, tuple(id(m) for m in model.modules())


def is_plain(value: object) -> bool:
    """Whether a value is told by its `repr`."""
    return isinstance(value, _PLAIN)


_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type, enum.Enum, slice, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
    types.FunctionType, types.MethodType, types.BuiltinFunctionType,
)  # fmt: skip


def _fact(given: Value, first: dict[int, str]) -> object:
    value = given.value
    if isinstance(value, Tensor):
        same = first.setdefault(id(value), given.name)  # as which argument it was given before
        return tuple(value.shape), value.stride(), value.dtype, value.device, same
    if not is_plain(value):
        raise CaptureError(
            f"{given.name} is a {type(value).__name__}: a call that chooses by data is recorded, "
            "and a recording cannot tell one from another. Give the model tensors, numbers, or "
            "objects that hold such"
        )
    return repr(value)


def _name(path: Any, parameters: Sequence[str]) -> str:
    """The argument of a path into ``(args, kwargs)``, with what is inside of it."""
    (_, first, *inside) = path
    if not isinstance(first, pytree.SequenceKey):
        name = first.key
    else:
        name = parameters[first.idx] if first.idx < len(parameters) else f"args[{first.idx}]"
    return f"{name}{pytree.keystr(tuple(inside))}"


def _open(name: str, value: Any, put: Put | None, seen: dict[int, str]) -> Iterator[Value]:
    entries = _entries(value)
    if entries is None:
        yield Value(name, value, put)
    elif id(value) in seen:
        yield Value(name, f"the same as {seen[id(value)]}")
    else:
        seen[id(value)] = name
        yield Value(name, type(value))
        for key, inner, inner_put in entries:
            yield from _open(name + key, inner, inner_put, seen)


def _entries(value: Any) -> list[tuple[str, Any, Put | None]] | None:
    """What is inside of an object, or of a collection that it holds; None for all else."""
    if isinstance(value, Tensor | nn.Module | torch.Generator) or is_plain(value):
        return None
    setitem = functools.partial(functools.partial, operator.setitem, value)
    if isinstance(value, list | collections.deque):
        return [(f"[{i}]", inner, setitem(i)) for i, inner in enumerate(value)]
    if isinstance(value, dict):
        return [(f"[{k!r}]", inner, setitem(k)) for k, inner in value.items()]
    if isinstance(value, tuple):
        return [(f"[{i}]", inner, None) for i, inner in enumerate(value)]
    slots = [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
    names = [*getattr(value, "__dict__", ()), *(n for n in slots if hasattr(value, n))]
    if not names:
        return None
    setattribute = functools.partial(functools.partial, setattr, value)
    return [(f".{name}", getattr(value, name), setattribute(name)) for name in names]
