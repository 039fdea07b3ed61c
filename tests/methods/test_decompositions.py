"""Decompositions on disk: found by content, never done twice, bounded, and no reason to fail."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from adamerging.adaptation.cache import cache_files, clear_cache
from adamerging.errors import UsageError
from adamerging.methods import decompositions, iso_c, make_method, spectral
from adamerging.methods.decompositions import kept
from adamerging.methods.spectral import leading
from contract.support import make_base, make_experts, merge

SHAPES = {"blocks.0.wide": (258, 260), "blocks.0.tall": (270, 258), "blocks.0.small": (32, 40)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def counted(monkeypatch):
    """Names of the decompositions of large matrices that were really done."""
    done = []

    def count(module, name):
        real = getattr(module, name)

        def function(matrix, *args, **options):
            if min(matrix.shape) >= 256:
                done.append(name)
            return real(matrix, *args, **options)

        monkeypatch.setattr(module, name, function)

    count(spectral, "_eigen")
    count(spectral, "_inverse_root")
    count(iso_c, "_flattened")
    return done


def matrix(seed, shape=(256, 260)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(256, 260), (260, 256)])
def test_what_is_kept_is_what_was_found_to_the_bit(shape, counted, monkeypatch):
    first = leading(matrix(0, shape).float(), 9)
    again = leading(matrix(0, shape).float(), 9)
    assert counted == ["_eigen"]
    monkeypatch.setenv(decompositions.LIMIT, "0")
    afresh = leading(matrix(0, shape).float(), 9)
    assert counted == ["_eigen"] * 2
    for found in (again, afresh):
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_another_matrix_or_rank_is_another_decomposition(counted):
    for seed, rank in [(0, 3), (1, 3), (0, 4), (0, 3)]:
        assert leading(matrix(seed), rank)[0].shape == (256, rank)
    assert len(counted) == 3
    assert torch.equal(leading(matrix(0), 4)[1][:3], leading(matrix(0), 3)[1])


@pytest.mark.parametrize(
    ("name", "options", "done"),
    [
        ("tsv_m", [{}, {}], 2 * (3 + 2)),
        ("cart", [{"strength": 1.0}, {"strength": 2.0}], 2 * 3),
        ("iso_c", [{}, {}], 2),
        ("iso_cts", [{}, {}], 2 * (4 + 2)),
    ],
)
def test_a_sweep_decomposes_once(name, options, done, counted):
    base = make_base(shapes=SHAPES)
    experts = make_experts(base)
    merged = [merge(base, experts, make_method(name, chosen)) for chosen in options]
    assert len(counted) == done
    clear_cache()
    afresh = merge(base, experts, make_method(name, options[1]))
    assert len(counted) == 2 * done
    assert all(torch.equal(merged[1][tensor], afresh[tensor]) for tensor in base)


def test_zeros_and_small_matrices_are_not_kept(counted):
    leading(torch.zeros(300, 300), 5)
    leading(matrix(0, (255, 300)), 5)
    assert counted == []
    assert cache_files() == []


def test_the_least_recently_used_make_room(counted, monkeypatch):
    size = 256 * 10 * 8 + 10 * 8
    monkeypatch.setenv(decompositions.LIMIT, str(4.2 * size / 1e9))
    for age, seed in enumerate([0, 1, 2, 3]):
        leading(matrix(seed), 10)
        newest = max(cache_files(), key=lambda item: item[0].stat().st_mtime_ns)[0]
        os.utime(newest, (1000 + age, 1000 + age))
    assert len(cache_files()) == 4
    leading(matrix(0), 10)  # was the oldest, and is used again
    leading(matrix(4), 10)
    assert sum(size for _, size in cache_files()) <= 4.2 * size
    counted.clear()
    leading(matrix(0), 10)
    leading(matrix(4), 10)
    assert counted == []
    leading(matrix(1), 10)
    assert counted == ["_eigen"]


def test_what_never_fits_is_computed_and_not_kept(counted, monkeypatch):
    monkeypatch.setenv(decompositions.LIMIT, "0.00001")
    leading(matrix(0), 10)
    leading(matrix(0), 10)
    assert len(counted) == 2
    assert cache_files() == []


def test_a_damaged_file_is_computed_anew(counted):
    first = leading(matrix(0), 5)
    [(path, _)] = cache_files()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(leading(matrix(0), 5)[0], first[0])
    assert len(counted) == 2


def test_a_folder_that_cannot_be_written_to_is_no_reason_to_fail(tmp_path, counted, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "file"))
    assert leading(matrix(0), 5)[1].shape == (5,)
    assert counted


@pytest.mark.parametrize("bad", ["much", "4GB", "inf", "nan"])
def test_a_limit_that_is_no_number(bad, monkeypatch):
    monkeypatch.setenv(decompositions.LIMIT, bad)
    with pytest.raises(UsageError, match=f"{decompositions.LIMIT}.*must be a number of GB"):
        kept("x", matrix(0), {"y": (1,)}, lambda m: (m[:1, 0],))


def test_the_command_line_says_what_is_kept_and_refuses_a_bad_limit(tmp_path):
    base = make_base(shapes=SHAPES)
    save_file(base, tmp_path / "base.safetensors")
    for name, expert in make_experts(base).items():
        save_file(expert, tmp_path / f"{name}.safetensors")

    def run(out, **variables):
        return subprocess.run(
            [sys.executable, "-c", "from adamerging.cli import main; main()", "merge", "base.safetensors",
             "a=a.safetensors", "b=b.safetensors", "--method", "tsv_m", "--out", out],
            capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **variables},
        )  # fmt: skip

    refused = run("out", **{decompositions.LIMIT: "4GB"})
    assert refused.returncode == 2
    assert "must be a number of GB" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
    assert "adamerging cache --clear" in run("out").stderr
    assert "adamerging cache --clear" not in run("again").stderr  # nothing was added
