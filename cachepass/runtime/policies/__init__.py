"""The policies by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from cachepass.errors import PolicyError
from cachepass.runtime.policies.adacache import AdaCache as AdaCache
from cachepass.runtime.policies.firstblock import FirstBlock as FirstBlock
from cachepass.runtime.policies.fixed import Compute as Compute, Schedule as Schedule
from cachepass.runtime.policies.mixcache import MixCache as MixCache
from cachepass.runtime.policies.teacache import TeaCache as TeaCache
from cachepass.runtime.policy import Policy

_ALL: tuple[type[Policy], ...] = (
    Compute,
    Schedule,
    MixCache,
    AdaCache,
    FirstBlock,
    TeaCache,
)


def policies() -> dict[str, type[Policy]]:
    """Name -> config class of every policy; the fields of a class hold its defaults."""
    return {kind.name: kind for kind in _ALL}


def resolve(policy: str | Policy, options: dict[str, Any] | None = None) -> Policy:
    """A policy object from a name with options, or the object itself.

    Raises:
        PolicyError: lists the valid names or options.
    """
    if isinstance(policy, Policy):
        if options:
            raise PolicyError(
                f"options {sorted(options)} were given beside a policy object: set them there"
            )
        return policy
    known = policies()
    if isinstance(policy, type) and issubclass(policy, Policy):
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
