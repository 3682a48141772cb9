"""The policies by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from cachepass.errors import PolicyError
from cachepass.runtime.policies.adacache import AdaCache as AdaCache
from cachepass.runtime.policies.dbcache import DBCache as DBCache
from cachepass.runtime.policies.dicache import DiCache as DiCache
from cachepass.runtime.policies.easycache import EasyCache as EasyCache
from cachepass.runtime.policies.fastercache import FasterCache as FasterCache
from cachepass.runtime.policies.firstblock import FirstBlock as FirstBlock
from cachepass.runtime.policies.fixed import Compute as Compute, Schedule as Schedule
from cachepass.runtime.policies.magcache import MagCache as MagCache
from cachepass.runtime.policies.mixcache import MixCache as MixCache
from cachepass.runtime.policies.pab import PAB as PAB
from cachepass.runtime.policies.taylorseer import TaylorSeer as TaylorSeer
from cachepass.runtime.policies.teacache import TeaCache as TeaCache
from cachepass.runtime.policy import NamedPolicy, Policy

AnyPolicy = Policy | NamedPolicy

_ALL: tuple[type[NamedPolicy], ...] = (
    Compute, Schedule, MixCache, AdaCache, FirstBlock, TeaCache, DBCache, TaylorSeer, MagCache,
    EasyCache, DiCache, PAB, FasterCache,
)  # fmt: skip


def policies() -> dict[str, type[NamedPolicy]]:
    """Name -> config class of every policy; the fields of a class hold its defaults."""
    return {kind.name: kind for kind in _ALL}


def resolve(policy: str | AnyPolicy, options: dict[str, Any] | None = None) -> AnyPolicy:
    """A policy object from a name with options, or the object itself.

    Raises:
        PolicyError: lists the valid names or options.
    """
    if isinstance(policy, (Policy, NamedPolicy)):
        if options:
            raise PolicyError(
                f"options {sorted(options)} were given beside a policy object: set them there"
            )
        return policy
    known = policies()
    if isinstance(policy, type) and issubclass(policy, (Policy, NamedPolicy)):
        raise PolicyError(
            f"`policy` is the class {policy.__name__}: did you mean {policy.__name__}()?"
        )
    if not isinstance(policy, str) or policy not in known:
        raise PolicyError(f"unknown policy {policy!r}: choose one of {', '.join(sorted(known))}")
    kind = known[policy]
    fields = [f.name for f in dataclasses.fields(kind)]
    for option in options or {}:
        if option not in fields:
            raise PolicyError(
                f"policy {policy!r} has no option {option!r}; its options are "
                f"{', '.join(fields) or 'none'}"
            )
    return kind(**(options or {}))


def for_model(policy: AnyPolicy, model: object) -> Policy:
    """The combination that a policy stands for, with published numbers of this model."""
    if isinstance(policy, Policy):
        return policy
    config = getattr(model, "config", None)
    return policy.combine(config if isinstance(config, dict) else {})
