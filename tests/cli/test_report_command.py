"""`adamerging report` as its users see it."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "report"))

from sample import HARD_NAMES, bare, make_run, save_run

Cli = Callable[..., "object"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run with one section of charts."""
    return save_run(tmp_path / "run", bare(make_run(1)))


def test_it_writes_the_page_and_its_figures(cli: Cli, small: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "new" / "page.html", tmp_path / "figures"
    ended = cli("report", small, "--out", out, "--figures", figures)
    assert ended.code == 0, ended.err
    assert "keeps" in ended.out
    assert f"Wrote {out}" in ended.out
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in figures.iterdir()) == ["kept.png", "kept.svg"]
    assert (figures / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert "agreement</text>" in (figures / "kept.svg").read_text()
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]


def test_without_out_it_stands_in_the_run_and_is_replaced(cli: Cli, small: Path) -> None:
    (small / "report.html").write_text("old")
    ended = cli("report", small / "comparison.json", "--json")
    assert ended.code == 0
    said = json.loads(ended.out)
    assert said["out"] == str(small / "report.html")
    assert said["complete"] is True
    assert said["rows"] == said["planned"]
    assert (small / "report.html").read_text() != "old"


def test_it_loads_no_torch(small: Path) -> None:
    code = (
        "import sys\nfrom adamerging.cli import main\nsys.argv = ['adamerging', 'report', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-W", "error", "-c", code, str(small)], check=False).returncode == 0
    )


def test_help_draws_nothing() -> None:
    code = (
        "import sys\nfrom adamerging.cli import main\nsys.argv = ['adamerging', 'report', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
    )


def test_a_folder_that_is_no_run(cli: Cli, tmp_path: Path) -> None:
    ended = cli("report", tmp_path)
    assert ended.code == 2
    assert "is not the folder of a comparison: it holds no comparison.json" in ended.err
    ended = cli("report", tmp_path / "nowhere")
    assert ended.code == 2
    assert "there is no folder" in ended.err


def test_a_corrupted_record_file_is_named_and_the_rest_is_shown(cli: Cli, small: Path) -> None:
    broken = sorted((small / "rows").iterdir())[-2]
    broken.write_text('{"label": "agreement", "kind"')
    ended = cli("report", small)
    assert ended.code == 0
    assert f"warning: {broken} cannot be read and its row is left out" in ended.err
    assert "Delete the file and run the same comparison again" in ended.err
    html = (small / "report.html").read_text()
    assert str(broken) in html
    assert "Rows are missing" in html
    assert "adamerging++" in html


def test_a_corrupted_comparison_is_refused_with_the_way_out(cli: Cli, small: Path) -> None:
    (small / "comparison.json").write_bytes(b"\xff\x00{")
    ended = cli("report", small)
    assert ended.code == 2
    assert "comparison.json cannot be read" in ended.err
    assert "Run the same comparison again" in ended.err
    assert not (small / "report.html").exists()


def test_an_interrupted_run_shows_what_there_is(cli: Cli, small: Path) -> None:
    head = json.loads((small / "comparison.json").read_text())
    (small / "comparison.json").write_text(json.dumps({**head, "complete": False, "planned": 40}))
    rows = sorted((small / "rows").iterdir())
    for path in rows[12:]:
        path.unlink()
    ended = cli("report", small)
    assert ended.code == 0
    assert "this run is not finished: 12 of 40 rows are there" in ended.err
    assert "12 of 40 rows are there" in (small / "report.html").read_text()


def test_a_task_name_with_html_in_it(cli: Cli, small: Path) -> None:
    for path in [small / "comparison.json", *(small / "rows").iterdir()]:
        path.write_text(path.read_text().replace('"sst2"', json.dumps(HARD_NAMES[0])))
    ended = cli("report", small)
    assert ended.code == 0
    html = (small / "report.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


@pytest.mark.skipif(sys.platform == "darwin", reason="file names there are UTF-8")
def test_names_that_are_no_utf8(cli: Cli, small: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(small.parent) + b"/run-\xff"))
    small.rename(folder)
    head = json.loads((folder / "comparison.json").read_text())
    (folder / "comparison.json").write_text(json.dumps({**head, "title": "odd \udcff name", "base": "b\x07"}))
    (folder / "rows" / os.fsdecode(b"bad-\xfe.json")).write_text("{")
    for flags in ([], ["--json"]):
        ended = cli("report", folder, *flags)
        assert ended.code == 0, ended.err
        assert "run-\\xff" in (json.loads(ended.out)["out"] if flags else ended.out)
        assert "bad-\\xfe.json" in ended.err
    assert "odd \\udcff name" in (folder / "report.html").read_text(encoding="utf-8")


def test_without_matplotlib_it_says_what_to_install(
    cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    ended = cli("report", small)
    assert ended.code == 2
    assert "pip install 'adamerging[plots]'" in ended.err


def test_an_output_that_cannot_be_written(cli: Cli, small: Path, tmp_path: Path) -> None:
    assert cli("report", small, "--out", tmp_path).code == 6
    (tmp_path / "file").write_text("")
    ended = cli("report", small, "--out", tmp_path / "file" / "page.html")
    assert ended.code == 6
    assert "cannot write" in ended.err
