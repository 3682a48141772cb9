"""Image models, A to I."""

from __future__ import annotations

from tests.zoo.entry import Entry

ZOO: dict[str, Entry] = {}
