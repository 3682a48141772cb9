"""Image models, J to Z."""

from __future__ import annotations

from tests.zoo.entry import Entry

ZOO: dict[str, Entry] = {}
