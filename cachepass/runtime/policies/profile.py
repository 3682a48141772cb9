"""A calibrated policy as a file: its fields, and what they were measured on.

Fitted numbers belong to one model, so a profile says which, and is refused for another. A
scheduler, a number of steps or a library that differs only makes them a guess: the report notes it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any

from cachepass.errors import PolicyError

FORMAT = 1
"""Of the file; another number is another layout."""

_LIBRARIES = ("cachepass", "torch", "diffusers")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Profile:
    """What `cachepass.calibrate` found: ``cachepass.compile(pipe, policy=profile)`` uses it."""

    policy: str
    """Name of the policy."""

    fields: Mapping[str, Any]
    """Its fields: those that were fitted, and the options of the calibration."""

    model: Mapping[str, Any]
    """`class`, the name of the model's, and `config`, the plain values of its config."""

    scheduler: Mapping[str, Any]
    """As `model`."""

    num_inference_steps: int
    """Steps of each request that was measured."""

    prompts: int
    """How many were measured."""

    versions: Mapping[str, str | None]
    """Library -> version; None where it was not installed."""

    measured: Mapping[str, float]
    """What else was found, for people: `share`, the part of the steps (or blocks) computed;
    `error`, the root mean square error of a fit; by granularity, the change that noise made."""

    date: str
    """Day of the calibration, as YYYY-MM-DD."""

    notes: tuple[str, ...] = ()
    """What a report should say; not kept in files."""

    def __post_init__(self) -> None:
        for name in ("fields", "model", "scheduler", "versions", "measured"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise PolicyError(f"Profile(`{name}`={value!r}): must be a mapping")
            object.__setattr__(self, name, MappingProxyType(dict(value)))
        for name in ("model", "scheduler"):
            value = getattr(self, name)
            if set(value) != {"class", "config"} or not isinstance(value["config"], Mapping):
                raise PolicyError(
                    f"Profile(`{name}`={dict(value)!r}): must hold `class`, a name, and `config`, "
                    "a mapping"
                )
        for name in ("policy", "date"):
            if not isinstance(getattr(self, name), str):
                raise PolicyError(f"Profile(`{name}`={getattr(self, name)!r}): must be a string")
        for name in ("num_inference_steps", "prompts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PolicyError(f"Profile(`{name}`={value!r}): must be a count of at least 1")

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
        return f"Profile of {self.policy}({fields})"

    # ------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, to a path that ends in ``.json``.

        Raises:
            PolicyError: another ending, or a field that is no plain value.
        """
        target = pathlib.Path(path)
        if target.suffix != ".json":
            raise PolicyError(
                f"`path`={str(path)!r}: must end in .json, by which `policy=` knows a profile"
            )
        for name, value in self.fields.items():
            if not _is_plain(value):
                raise PolicyError(
                    f"the profile's field `{name}`={value!r} cannot be written to a file: "
                    "calibrate with a plain value (the name of a site, say), or without it, and "
                    "give it to `compile` as one of `options`"
                )
        data = {"format": FORMAT} | {
            field.name: _json(getattr(self, field.name)) for field in _kept()
        }
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        target.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what `save` wrote.

        Raises:
            PolicyError: no such file, no profile, or one of another format; names the file.
        """
        again = "cachepass.calibrate makes a profile and its `save` writes one"
        try:
            data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PolicyError(f"profile {path}: {error.strerror or error}; {again}") from error
        except ValueError as error:  # not JSON, or not text
            raise PolicyError(f"profile {path} is not JSON ({error}); {again}") from error
        if not isinstance(data, dict) or "format" not in data:
            raise PolicyError(f"profile {path} is none: it has no `format`; {again}")
        if data.pop("format") != FORMAT:
            written = data.get("versions")
            by = written.get("cachepass") if isinstance(written, dict) else None
            raise PolicyError(
                f"profile {path} has another `format` than {FORMAT}, which this version reads: "
                f"calibrate anew, or use the cachepass that wrote it ({by or 'unknown'})"
            )
        names = [field.name for field in _kept()]
        missing = [name for name in names if name not in data]
        unknown = [name for name in data if name not in names]
        if missing or unknown:
            raise PolicyError(
                f"profile {path}: misses {missing or 'nothing'}, has unknown keys "
                f"{unknown or 'none'}; {again}"
            )
        try:
            if isinstance(data["fields"], dict):
                data["fields"] = {name: _frozen(v) for name, v in data["fields"].items()}
            return cls(**data)
        except PolicyError as error:
            raise PolicyError(f"profile {path}: {error}; {again}") from error

    # --------------------------------------------------------------------------- use

    def beside(self, scheduler: object) -> Profile:
        """The same, with notes of what differs from where it was measured, but for the model."""
        several = "prompts" if self.prompts > 1 else "prompt"
        asked = f"{self.prompts} {several} at {self.num_inference_steps} steps"
        notes = [f"profile of {asked}: with another number of steps it is a guess"]
        if scheduler is not None:
            differs = differences(self.scheduler, described(scheduler))
            if differs:
                notes.append(f"profile measured with another scheduler: {differs}")
        for library, version in versions().items():
            then = self.versions.get(library)
            if then != version:
                notes.append(f"profile measured with {library} {then}, this is {version}")
        return dataclasses.replace(self, notes=tuple(notes))

    def check_model(self, model: object) -> None:
        """Raise a PolicyError that names what differs if it was measured on another model."""
        differs = differences(self.model, described(model))
        if differs:
            raise PolicyError(
                f"the profile of policy {self.policy!r} was measured on another model: {differs}. "
                "Calibrate this one with cachepass.calibrate, or compile it with a policy by name"
            )


def described(owner: object) -> dict[str, Any]:
    """A model or scheduler in plain values: `class` and `config`.

    Of the config: what is public, no path and no name of a file, and the same in JSON.
    """
    config = getattr(owner, "config", None)
    items = config.items() if isinstance(config, Mapping) else ()
    return {
        "class": type(owner).__name__,
        "config": {
            str(name): _json(value)
            for name, value in items
            if not str(name).startswith("_") and "path" not in str(name) and _is_plain(value)
        },
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two descriptions, in words; empty where nothing does."""
    if then["class"] != now["class"]:
        return f"{then['class']} then, {now['class']} now"
    absent = "absent"
    names = [*then["config"], *(name for name in now["config"] if name not in then["config"])]
    pairs = [
        (name, then["config"].get(name, absent), now["config"].get(name, absent)) for name in names
    ]
    return ", ".join(f"`{name}` {a!r} then, {b!r} now" for name, a, b in pairs if a != b)


def versions() -> dict[str, str | None]:
    """The versions of the libraries that numbers may depend on."""
    found: dict[str, str | None] = {}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found


def _kept() -> list[dataclasses.Field[Any]]:
    """The fields that are written to files."""
    return [field for field in dataclasses.fields(Profile) if field.name != "notes"]


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return "/" not in value and "\\" not in value  # else a path
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (bool, int))


def _json(value: Any) -> Any:
    """With lists in place of tuples: what comes back from a file compares equal."""
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    if isinstance(value, Mapping):
        return {name: _json(v) for name, v in value.items()}
    return value


def _frozen(value: Any) -> Any:
    """The reverse, for the fields of a policy."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
