"""Video models, L to Z."""

from __future__ import annotations

from tests.models import WAN
from tests.zoo.entry import Entry

ZOO: dict[str, Entry] = {
    "WanTransformer3DModel": Entry(build=WAN.build, inputs=WAN.inputs, main=("blocks",)),
}
