"""What learning is said to take before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from adamerging.adaptation.estimate import estimate_adaptation
from adamerging.adaptation.settings import resolve
from adamerging.recipe import Settings
from adamerging.run import prepare
from adaptation.toy import make_experts, make_tasks


@pytest.mark.parametrize(
    ("batchnorm", "buffers", "adapt", "joint"),
    [
        (True, "average", {}, True),
        (True, "average", {"batchnorm_joint": False}, False),
        (True, "average", {"batchnorm": "keep"}, False),
        (True, "average", {"steps": 0}, False),
        (True, "task", {}, False),
        (False, "average", {}, False),
    ],
)
def test_activations_of_all_tasks_are_announced_where_they_answer_together(
    batchnorm: bool, buffers: Any, adapt: dict[str, Any], joint: bool
) -> None:
    base, experts = make_experts(2, batchnorm=batchnorm)
    prepared = prepare(base, experts, Settings(heads=["head.*"], buffers=buffers))
    found = estimate_adaptation(prepared, make_tasks(experts), resolve({"preset": "paper", **adapt}))
    assert found.joint is joint
