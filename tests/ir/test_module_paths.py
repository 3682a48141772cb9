from __future__ import annotations

import pytest
from torch import fx

from cachepass.ir.graph import module_paths


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']", ""),
        ("L['self']._modules['blocks']._modules['0']", "blocks.0"),
        ("L['self'].__dict__['_modules']['L'].layers", "L.layers"),
        ("L['this']._modules['blocks']._modules['0']._modules['self_attn']", "blocks.0.self_attn"),
        ("L['self']._modules['_orig_mod']._modules['blocks']", "blocks"),
    ],
)
def test_modules_are_named_from_the_model_on(source: str, path: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": (source, "Kind")}
    assert module_paths(node) == [(path, "Kind")]
