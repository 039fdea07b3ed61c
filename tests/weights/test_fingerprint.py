from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from adamerging.errors import WeightsError
from adamerging.weights import Fingerprint, sha256_file


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 10_000])
def test_sha256_whatever_the_chunk(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(data := os.urandom(size))
    expected = hashlib.sha256(data).hexdigest()
    assert sha256_file(tmp_path / "x", chunk=1000) == expected
    fingerprint = Fingerprint(str(tmp_path / "x"))
    assert fingerprint.hexdigest() == expected == fingerprint.hexdigest()
    assert fingerprint.done()


def test_failure_shows_where_the_digest_is_asked_for(tmp_path: Path) -> None:
    fingerprint = Fingerprint(tmp_path / "missing")
    with pytest.raises(WeightsError, match="missing cannot be read"):
        fingerprint.hexdigest()
