"""The folder of a comparison, where it cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from adamerging import OutputError
from adamerging.evaluation import store
from adamerging.evaluation.store import RunFolder


def test_a_folder_without_write_permission_is_said_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.os, "open", refuse)
    match = r"cannot write .*run: Permission denied; make .*run writable.*--out"
    with pytest.raises(OutputError, match=match), folder.locked():
        pass


def test_a_file_in_the_place_of_the_state_is_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "state").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*state: .*--out"):
        folder.state("row")
