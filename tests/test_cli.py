"""The command line."""

from __future__ import annotations

import pytest

from cachepass.cli import main


def test_the_table_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| class | stacks: blocks |")
    assert any(line.startswith("| WanTransformer3DModel |") for line in lines)


def test_some_rows_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "wantransformer3d"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_words_that_no_row_holds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["models", "nobody"])
    assert "rows holds nobody" in capsys.readouterr().err
