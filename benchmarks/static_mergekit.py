"""The peer: mergekit, in an environment of its own with its version pinned."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PINS = ("mergekit==0.1.5", "torch==2.13.0")

METHODS = {
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_ties": {"weight": 0.3, "density": 0.5},
    "breadcrumbs": {"weight": 0.3, "density": 0.14, "gamma": 0.01},
    "model_stock": {},
}
"""The same settings as ours: see `static.OURS`."""


def install(environment: Path) -> None:
    """Make the environment where it is missing (a few minutes, once)."""
    if (environment / "bin" / "mergekit-yaml").exists():
        return
    print(f"installing {' '.join(PINS)} into {environment} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "-qq", *PINS], check=True)


def versions(environment: Path) -> str:
    """Its versions, as they are."""
    names = ("mergekit", "torch")
    code = (
        f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in {names}), sep=', ')"
    )
    return subprocess.check_output([environment / "bin" / "python", "-c", code], text=True).strip()


def command(environment: Path, folder: Path, method: str, base: Path, experts: Sequence[Path]) -> list[str]:
    """The command that merges into ``folder/out``; writes its YAML file into ``folder``."""
    options = METHODS[method]
    lines = [f"merge_method: {method}", f"base_model: {base}", "dtype: bfloat16", "models:"]
    for expert in experts:
        lines.append(f"  - model: {expert}")
        if options:
            lines.append("    parameters:")
            lines += [f"      {key}: {value}" for key, value in options.items()]
    path = folder / f"{method}.yaml"
    path.write_text("\n".join(lines) + "\n")
    program = str(environment / "bin" / "mergekit-yaml")
    return [program, str(path), str(folder / "out"), "--no-copy-tokenizer", "--quiet"]
