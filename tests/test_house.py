"""The house around the package: pins, README, repository hygiene, a light import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in requirements}


def every_dependency() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in sum(extras, list(PROJECT["dependencies"]))]


def test_torch_is_pinned_to_the_tested_release_without_a_local_build() -> None:
    assert str(read_pins()["torch"].specifier) == "==2.13.0"


def test_every_constraint_is_an_exact_pin() -> None:
    loose = [str(r) for r in read_pins().values() if [s.operator for s in r.specifier] != ["=="]]
    assert loose == []


def test_every_dependency_is_pinned_inside_its_own_range() -> None:
    pins = read_pins()
    wrong = []
    for wanted in every_dependency():
        pin = pins.get(canonicalize_name(wanted.name))
        if pin is None or not wanted.specifier.contains(next(iter(pin.specifier)).version):
            wrong.append(f"{wanted} pinned as {pin}")
    assert wrong == []


def test_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme


def test_ci_runs_each_gate_once() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make lint", "make types", "make test"]


def test_no_tracked_file_is_over_one_mebibyte() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout (an unpacked source archive)")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert [f.name for f in files if f.is_file() and f.stat().st_size > 2**20] == []


def unsafe_loads(source: str) -> list[int]:
    """Lines that call `torch.load` without `weights_only=True`, or unpickle by themselves."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name):
            continue
        name = f"{node.func.value.id}.{node.func.attr}"
        safe = any(
            k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
            for k in node.keywords
        )
        if (name == "torch.load" and not safe) or name in {"pickle.load", "pickle.loads"}:
            lines.append(node.lineno)
    return lines


def test_the_check_for_unsafe_loads_sees_them() -> None:
    assert unsafe_loads("torch.load(f)\ntorch.load(f, weights_only=False)\npickle.load(f)") == [1, 2, 3]
    assert unsafe_loads("torch.load(f,\n  mmap=True,\n  weights_only=True)") == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_no_source_file_loads_a_pickle_unsafely(path: Path) -> None:
    assert unsafe_loads(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("heavy", ["torch", "transformers", "numpy", "pydantic", "huggingface_hub"])
def test_importing_the_package_is_light(heavy: str) -> None:
    code = f"import sys, adamerging; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_package_is_marked_as_typed() -> None:
    assert (ROOT / "src" / "adamerging" / "py.typed").is_file()


def test_version_stands_in_one_place() -> None:
    import adamerging

    assert PROJECT["dynamic"] == ["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{adamerging.__version__}]" in changelog
    assert adamerging.__version__ not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
