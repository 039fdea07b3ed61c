"""How many numbers the papers say are learned for CLIP ViT-B/32 and eight tasks, told from shapes alone."""

from __future__ import annotations

import pytest
import torch

from adamerging.adaptation.coefficients import layout
from adamerging.adaptation.settings import SurgerySettings, resolve
from adamerging.adaptation.spectrum import ranks_of, source_of, with_gates
from adamerging.adaptation.surgery import operate
from adamerging.plan import make_plan
from adamerging.routing.estimate import estimate_routes
from adamerging.task_vectors import TaskVectors
from adamerging.weights import Weights
from adamerging.weights.source import Spec

TASKS = 8
WIDTH, HIDDEN, BLOCKS = 768, 3072, 12


def vit_b32() -> dict[str, tuple[int, ...]]:
    """The image tower of OpenCLIP's ViT-B/32: query, key and value are one matrix."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,), "visual.positional_embedding": (50, WIDTH),
        "visual.proj": (WIDTH, 512), "visual.conv1.weight": (WIDTH, 3, 32, 32),
    }  # fmt: skip
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (WIDTH,), f"visual.{norm}.bias": (WIDTH,)}
    for number in range(BLOCKS):
        block = f"visual.transformer.resblocks.{number}"
        maps = {"attn.out_proj": (WIDTH, WIDTH), "mlp.c_fc": (HIDDEN, WIDTH), "mlp.c_proj": (WIDTH, HIDDEN)}
        for name, shape in maps.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes |= {f"{block}.attn.in_proj_{n}": s for n, s in (("weight", (2304, WIDTH)), ("bias", (2304,)))}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
    return shapes


@pytest.fixture(scope="module")
def vectors() -> TaskVectors:
    specs = {name: Spec(shape, torch.float32) for name, shape in vit_b32().items()}

    def weights(label: str) -> Weights:
        return Weights(label, specs, lambda name: torch.empty(specs[name].shape, device="meta"))

    base, experts = weights("base"), {f"task{number}": weights(f"task{number}") for number in range(TASKS)}
    return TaskVectors(make_plan(base, experts), base, experts)


def test_the_tower_is_the_papers(vectors: TaskVectors) -> None:
    assert sum(entry.spec.numel for entry in vectors.entries()) == 87_849_216


def test_adamerging_has_152_coefficients_a_task(vectors: TaskVectors) -> None:
    """Of the 158 rows of the released file 6 belong to the text tower, which no expert changed."""
    assert layout("tensor", vectors.tasks, vectors.entries(), vectors.places).width == 152


def test_adarank_has_294_912_gates(vectors: TaskVectors) -> None:
    settings = resolve({"preset": "adarank"})
    source = source_of(settings, vectors)
    gated = with_gates(settings, vectors, vectors.entries())
    assert len(gated) == 4 * BLOCKS
    assert sum(rank for entry in gated for rank in ranks_of(source, vectors, entry)) == 294_912


def test_wemoe_learns_7_16_million_numbers_of_574_million(vectors: TaskVectors) -> None:
    found = estimate_routes(vectors, resolve({"preset": "wemoe"}))
    assert found.learned == 7_160_928
    matrices = BLOCKS * 2 * WIDTH * HIDDEN
    assert found.values == (1 + TASKS) * matrices
    released = 113_448_705  # of the released checkpoints, with what they hold of the text tower
    biases = BLOCKS * (WIDTH + HIDDEN)
    assert round((released + TASKS * (matrices + biases) + found.learned) / 1e6) == 574


def test_surgery_adds_2_times_512_times_16_numbers_a_task() -> None:
    features = torch.randn(4, 512)
    module, _ = operate("task", features, features, SurgerySettings(steps=0), 0)
    assert sum(parameter.numel() for parameter in module.parameters()) == 2 * 512 * 16
