"""What is said of a value of the wrong type in a recipe: once, where it is, in words of YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: {dare: {density: 0.3}}", "write a list: method: [{dare: {density: 0.3}}]"),
        ("method: {name: ties, density: 0.3}", "'density': 0.3}): must be a text or a list"),
        ("method: [{dare: 0.3}]", "method.0.dare (=0.3): must be a mapping"),
        ("method: [3]", "method.0 (=3): must be a text or a mapping"),
        (
            "compare: {methods: [ties, {short: {adpt: paper}}]}",
            "unknown key 'compare.methods.1.short.adpt', did you mean 'adapt'?",
        ),
        ("compare: {methods: ties}", "write a list: methods: [ties]"),
        (
            "compare: {methods: [{short: {adapt: 3}}]}",
            "methods.0.short.adapt (=3): must be a text or a mapping",
        ),
        ("compare: {models: {a: {b: 3}}}", "compare.models.a.b (=3): must be a text"),
    ],
)
def test_one_mistake_is_one_line(cli: Cli, tmp_path: Path, text: str, said: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: base\nexperts: {{a: a, b: b}}\n{text}\n")
    ended = cli("merge", recipe, "--dry-run")
    assert ended.code == 2, ended.err
    lines = [line for line in ended.err.splitlines() if line.strip()]
    assert len(lines) == 2
    assert lines[1].endswith(said)
