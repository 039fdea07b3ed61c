from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adamerging.errors import WeightsError
from adamerging.weights import Fingerprints, sha256_file
from adamerging.weights.fingerprint import likely_file

PAGE = mmap.PAGESIZE


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, PAGE, 2 * PAGE + 1, 5 * PAGE])
def test_sha256_whatever_the_chunk(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(data := os.urandom(size))
    expected = hashlib.sha256(data).hexdigest()
    assert {sha256_file(tmp_path / "x", chunk) for chunk in (1000, PAGE, 2 * PAGE, 1 << 26)} == {expected}


def test_files_are_hashed_once_however_often_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return sha256_file(path)

    monkeypatch.setattr("adamerging.weights.fingerprint.sha256_file", counted)
    with Fingerprints(paths[:2], threads=1) as prints:
        prints.begin(paths)
        found = prints.of([*paths, paths[0]])
    assert found == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert hashed == paths


def test_failure_shows_where_the_digest_is_asked_for(tmp_path: Path) -> None:
    with Fingerprints([tmp_path / "missing"]) as prints, pytest.raises(WeightsError, match="missing cannot"):
        prints.of([tmp_path / "missing"])


def test_the_likely_file_of_a_source(tmp_path: Path) -> None:
    for name in ("model/model.safetensors", "adapter/model.safetensors", "adapter/adapter_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    file = tmp_path / "model" / "model.safetensors"
    assert likely_file(str(file)) == likely_file(str(tmp_path / "model")) == file
    for none in ("adapter", "missing", "missing.safetensors", "adapter/adapter_config.json"):
        assert likely_file(str(tmp_path / none)) is None


def test_hashing_can_begin_without_torch() -> None:
    code = "import sys, adamerging.weights.fingerprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
