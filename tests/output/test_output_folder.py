"""The output folder appears whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from adamerging import OutputError
from adamerging.output import OutputFolder
from adamerging.output.folder import RECORD


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, text: str = "{}", **keywords: bool) -> None:
    with OutputFolder(target, **keywords) as folder:
        folder.write_text(RECORD, text)
        folder.write_text("sub/file.txt", text)
        folder.commit()


def test_it_appears_at_the_end_and_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with OutputFolder(target) as folder:
        folder.write_text("a.txt", "a")
        assert not target.exists()
        folder.commit()
    assert names(target) == ["a.txt"]
    assert names(target.parent) == ["out"]


def test_without_a_commit_nothing_stays(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        folder.write_text("a.txt", "a")
    assert names(tmp_path) == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), OutputFolder(tmp_path / "out") as folder:
        folder.write_text("a.txt", "a")
        _ = 1 / 0
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "no room to write"), (errno.EDQUOT, "no room"), (errno.EIO, "cannot write")],
)
def test_an_error_of_the_disk_is_told_as_such(tmp_path: Path, number: int, said: str) -> None:
    with pytest.raises(OutputError, match=said), OutputFolder(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    (partial / "heads" / "a").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    (partial / ".lock").touch()
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [RECORD, "sub"]


def test_a_second_run_with_the_same_target_is_refused(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        folder.write_text("a.txt", "a")
        with pytest.raises(OutputError, match="another run is writing"), OutputFolder(tmp_path / "out"):
            pass
        assert (folder.path / "a.txt").exists()
        folder.commit()
    assert names(tmp_path / "out") == ["a.txt"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists"), OutputFolder(tmp_path / "out") as folder:
        folder.write_text("a.txt", "a")
        (tmp_path / "out").mkdir()
        folder.commit()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


def test_overwrite_replaces_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    (tmp_path / "out" / "stale").touch()
    with pytest.raises(OutputError, match="--overwrite"):
        write(tmp_path / "out", "second")
    write(tmp_path / "out", "second", overwrite=True)
    assert names(tmp_path / "out") == [RECORD, "sub"]
    assert (tmp_path / "out" / RECORD).read_text() == "second"
    assert names(tmp_path) == ["out"]


def test_overwrite_spares_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not written by this program"):
        write(tmp_path / "out", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists"):
        write(tmp_path / "link")


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == [RECORD, "sub"]


def test_killed_between_the_two_renames_the_old_one_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    os.rename(tmp_path / "out", tmp_path / ".out.replaced")
    with pytest.raises(ZeroDivisionError), OutputFolder(tmp_path / "out", overwrite=True):
        _ = 1 / 0
    assert (tmp_path / "out" / RECORD).read_text() == "first"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("target", ["base", "base/merged", "."])
def test_an_input_is_never_the_target(tmp_path: Path, target: str) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(OutputError, match="in the input"):
        OutputFolder(tmp_path / target, overwrite=True, inputs=[tmp_path / "base"])


def test_an_input_is_known_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(OutputError, match="in the input"):
        OutputFolder(tmp_path / "link" / "x", inputs=[tmp_path / "base"])


def test_too_little_room_is_known_beforehand(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="are needed"), OutputFolder(tmp_path / "out") as folder:
        folder.require(1 << 60)
    assert names(tmp_path) == []
