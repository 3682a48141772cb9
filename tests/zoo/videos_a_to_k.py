"""Video models, A to K."""

from __future__ import annotations

from tests.zoo.entry import Entry

ZOO: dict[str, Entry] = {}
