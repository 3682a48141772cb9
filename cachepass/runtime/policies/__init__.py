"""The policies by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
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
from cachepass.runtime.policies.profile import Profile as Profile
from cachepass.runtime.policies.srdiffusion import SRDiffusion as SRDiffusion
from cachepass.runtime.policies.taylorseer import TaylorSeer as TaylorSeer
from cachepass.runtime.policies.teacache import TeaCache as TeaCache
from cachepass.runtime.policy import NamedPolicy, Policy

AnyPolicy = Policy | NamedPolicy | Profile

_ALL: tuple[type[NamedPolicy], ...] = (
    Compute, Schedule, MixCache, AdaCache, FirstBlock, TeaCache, DBCache, TaylorSeer, MagCache,
    EasyCache, DiCache, PAB, FasterCache,
)  # fmt: skip


def policies() -> dict[str, type[NamedPolicy]]:
    """Name -> config class of every policy; the fields of a class hold its defaults."""
    return {kind.name: kind for kind in _ALL}


def resolve(
    policy: str | os.PathLike[str] | AnyPolicy,
    options: Mapping[str, Any] | None = None,
    *,
    scheduler: object = None,
) -> AnyPolicy:
    """A policy object from a name with options, or the object itself; a profile, or its path.

    Options beside a profile take the place of its fields. `scheduler` is what a profile's own is
    compared with.

    Raises:
        PolicyError: lists the valid names or options, or says what is wrong with a profile.
    """
    if isinstance(policy, os.PathLike) or (isinstance(policy, str) and policy.endswith(".json")):
        policy = Profile.load(policy)
    if isinstance(policy, Profile):
        fields = {**policy.fields, **(options or {})}
        named(policy.policy, fields)  # they are checked now
        return dataclasses.replace(policy, fields=fields).beside(scheduler)
    if isinstance(policy, (Policy, NamedPolicy)):
        if options:
            raise PolicyError(
                f"options {sorted(options)} were given beside a policy object: set them there"
            )
        return policy
    if isinstance(policy, type) and issubclass(policy, (Policy, NamedPolicy)):
        raise PolicyError(
            f"`policy` is the class {policy.__name__}: did you mean {policy.__name__}()?"
        )
    return named(policy, options)


def named(policy: str, options: Mapping[str, Any] | None = None) -> NamedPolicy:
    """A policy by its name, with options.

    Raises:
        PolicyError: lists the valid names or options.
    """
    known = policies()
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
    """The combination that a policy stands for, with published numbers of this model.

    Raises:
        PolicyError: a profile was measured on another model, or no numbers fit this one.
    """
    if isinstance(policy, Policy):
        return policy
    given = getattr(model, "config", None)
    # A model that was not loaded from a file has no class name in its config.
    own = given if isinstance(given, dict) else {}
    config = {"_class_name": type(model).__name__, **own}
    if isinstance(policy, NamedPolicy):
        return policy.combine(config)
    notes = policy.notes
    if model is not None:
        policy.check_model(model)
    else:
        notes += (f"profile of {policy.model['class']}: whether this is it cannot be told here",)
    combined = named(policy.policy, policy.fields).combine(config)
    return dataclasses.replace(combined, notes=(*combined.notes, *notes))
