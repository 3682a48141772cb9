"""The pages say what is true: their Python runs and their listings are fresh.

In README.md and docs/*.md every ```python block runs, in order, in one namespace per
page. It finds `model` and `pipe` there, both tiny and with random weights, and the
tensors `latents`, `text` and `empty`; `inner` is "eager" where a block does not say.

- ```python no-run: REASON is left out.
- ```text shows=NAME must be what the variable NAME of the blocks above prints as.
  EXPECTTEST_ACCEPT=1 writes these listings anew.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cachepass

pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w+)[ \t]*([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
ACCEPT = os.environ.get("EXPECTTEST_ACCEPT") == "1"


def tiny_wan(channels: int, text: int) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model: torch.nn.Module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=text,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model.eval()


def tiny_pipe() -> Any:
    from examples.shapes.pipeline import build_pipeline

    pipe = build_pipeline("small")
    pipe.transformer = tiny_wan(channels=16, text=64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a block finds: see the top of this file."""
    torch.compiler.reset()
    monkeypatch.setattr(cachepass, "compile", functools.partial(cachepass.compile, inner="eager"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CACHEPASS_DUMP", raising=False)
    model = tiny_wan(channels=4, text=16)
    yield {
        "__name__": "docs",
        "model": model,
        "pipe": tiny_pipe(),
        "latents": torch.randn(1, 4, 2, 8, 8),
        "text": torch.randn(1, 4, 16),
        "empty": torch.zeros(1, 4, 16),
        "example_inputs": {
            "hidden_states": torch.randn(1, 4, 2, 8, 8),
            "timestep": torch.tensor([900.0]),
            "encoder_hidden_states": torch.randn(1, 4, 16),
        },
    }
    torch.compiler.reset()


@pytest.mark.parametrize("name", PAGES)
def test_page_runs(name: str, namespace: dict[str, Any]) -> None:
    page = ROOT / name
    source = page.read_text(encoding="utf-8")
    fresh = source
    for block in reversed(list(_run(name, source, namespace))):
        start, end, text = block
        fresh = fresh[:start] + text + fresh[end:]
    if ACCEPT and fresh != source:
        page.write_text(fresh, encoding="utf-8")
    else:
        assert source == fresh, f"{name} is stale: EXPECTTEST_ACCEPT=1 writes it anew"


def _run(name: str, source: str, namespace: dict[str, Any]) -> Iterator[tuple[int, int, str]]:
    """Runs a page; yields start, end and fresh text of each listing."""
    for block in FENCE.finditer(source):
        language, info, body = block.groups()
        if language == "python" and not info.startswith("no-run"):
            # Empty lines in front, so that a traceback shows the line of the page.
            line = source.count("\n", 0, block.start(3))
            code = compile("\n" * line + body, str(ROOT / name), "exec", dont_inherit=True)
            exec(code, namespace)
        elif info.startswith("shows="):
            shown = str(namespace[info.removeprefix("shows=")]).rstrip() + "\n"
            yield block.start(3), block.end(3), shown


@pytest.mark.parametrize("name", PAGES)
def test_what_does_not_run_says_why(name: str) -> None:
    source = (ROOT / name).read_text(encoding="utf-8")
    for block in FENCE.finditer(source):
        if block[1] == "python":
            assert re.fullmatch(r"(no-run: .+)?", block[2]), block[0]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name}: {target}"


def test_every_policy_has_a_row() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)
    # One goes by its class alone, since it takes a model.
    assert sorted(rows) == sorted([*cachepass.policies(), "SRDiffusion"])


def test_every_private_api_of_torch_is_listed() -> None:
    used = set()
    for folder in ("cachepass", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            if "cachepass/passes" not in path.as_posix():
                found = re.findall(r"\btorch\._\w+", path.read_text(encoding="utf-8"))
                used |= {(name, path.relative_to(ROOT).as_posix()) for name in found}
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `torch.")]
    for api, file in sorted(used):
        assert any(api in row and file in row for row in rows), f"{api} in {file} has no row"
