"""Published numbers, found by a model's config. The data lie in published.json."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from cachepass.runtime.policy import Config


@functools.cache
def _entries() -> list[dict[str, Any]]:
    text = resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = json.loads(text)
    return entries


def published(method: str, config: Config) -> dict[str, Any] | None:
    """The numbers of a method for the model of this config; None where there are none.

    An entry fits if the config has all that stands under its `model`.
    """
    for entry in _entries():
        fits = all(config.get(key) == value for key, value in entry["model"].items())
        if entry["method"] == method and fits:
            return entry
    return None
