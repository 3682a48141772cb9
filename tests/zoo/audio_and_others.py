"""Audio models, and what is neither image, video nor audio."""

from __future__ import annotations

from tests.zoo.entry import Entry

ZOO: dict[str, Entry] = {}
