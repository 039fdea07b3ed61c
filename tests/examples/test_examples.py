"""The examples run as a newcomer runs them, and what they print is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["own_classifiers.py", "lora.py"])
def test_experts_are_trained_merged_and_asked(name: str, tmp_path: Path) -> None:
    if name == "lora.py":
        pytest.importorskip("peft")
    out = run(name, tmp_path)
    percents = [int(percent) for percent in re.findall(r"(\d+) %(?: right)? on test", out)]
    assert len(percents) == 2 and min(percents) > 60
    answers = re.findall(r"^(taste|topic): '.*' is (\w+) \(\d+ %\)$", out, re.MULTILINE)
    assert [task for task, _ in answers] == ["taste", "topic"]
    assert answers[0][1] in ("good", "bad") and answers[1][1] in ("food", "film", "sport")


def test_plain_networks_merge_under_their_own_heads(tmp_path: Path) -> None:
    lines = run("plain_cnn.py", tmp_path).splitlines()
    scores = {line[:25].strip(): [float(n) for n in line[25:].split()] for line in lines[1:]}
    experts, merged = scores["each its own expert"], scores["one merged network"]
    assert all(score > 80 for score in experts)
    assert sum(merged) > 0.8 * sum(experts)
    assert sum(merged) > sum(scores["base"])
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 4 and all(cell["outputs"] == [] for cell in cells)
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "merged, topic: 'we saw the actor' is" in done.stdout
