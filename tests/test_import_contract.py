from __future__ import annotations

from pathlib import Path

import pytest

use_cases = pytest.importorskip("importlinter.application.use_cases")

ROOT = Path(__file__).parents[1]


def test_layers_and_other_import_rules(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    from importlinter.configuration import configure

    configure()
    kept = use_cases.lint_imports(config_filename="pyproject.toml", cache_dir=None)
    assert kept, capsys.readouterr().out
