"""Small models in memory, and the shortest way from them to merged tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adamerging.merging import check_method, merged_pieces
from adamerging.methods import Method, Statistics
from adamerging.plan import make_plan
from adamerging.stream import Pipeline, Workers
from adamerging.task_vectors import TaskVectors
from adamerging.weights.memory import open_state_dict
from adamerging.weights.source import Factors, Spec, Weights

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (12, 5),
    "blocks.0.attn.weight": (6, 7),
    "blocks.0.attn.bias": (6,),
    "blocks.1.conv.weight": (4, 3, 3, 3),
    "blocks.1.gain": (),
    "blocks.2.mlp.weight": (33, 4),
    "blocks.2.none": (0, 4),
    "norm.weight": (9,),
}
"""Scalar, vector, matrix, convolution, empty; inside three blocks and outside."""

State = dict[str, Tensor]


def make_base(seed: int = 0, dtype: torch.dtype = torch.float32, shapes: Mapping = SHAPES) -> State:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def make_expert(base: State, seed: int, size: float = 0.1) -> State:
    g = torch.Generator().manual_seed(1000 + seed)
    return {
        n: (t.double() + size * torch.randn(t.shape, generator=g, dtype=torch.float64)).to(t.dtype)
        for n, t in base.items()
    }


def make_experts(base: State, count: int = 3, size: float = 0.1) -> dict[str, State]:
    return {name: make_expert(base, i, size) for i, name in enumerate("abcdefgh"[:count])}


def as_weights(state: State | Weights, label: str = "state dict") -> Weights:
    return state if isinstance(state, Weights) else open_state_dict(state, label)


def low_rank_weights(changes: Mapping[str, Factors], label: str = "adapter") -> Weights:
    """An adapter that holds nothing but the given low-rank changes of matrices."""

    def never(name: str) -> Tensor:
        raise AssertionError(f"{name} is low-rank and was read as a full tensor")

    specs = {n: Spec((f.left.shape[0], f.right.shape[1]), f.left.dtype) for n, f in changes.items()}
    return Weights(label, specs, never, low_rank={n: lambda f=f: f for n, f in changes.items()})


def task_vectors(base, experts, *, weights=1.0, chunk_values=1 << 19, allow_nonfinite=False, **plan):
    opened = {name: as_weights(expert, name) for name, expert in experts.items()}
    base = as_weights(base, "base")
    return TaskVectors(make_plan(base, opened, **plan), base, opened, weights, chunk_values, allow_nonfinite)


def merge(
    base,
    experts,
    method: Method,
    *,
    scale=None,
    dtype: torch.dtype | None = None,
    workers: int = 1,
    **options,
) -> State:
    """Merged tensors by name, in the base's shapes; `options` as for `task_vectors`."""
    vectors = task_vectors(base, experts, **options)
    if method.statistics is not None:
        vectors = vectors.informed(made_up(method.statistics, vectors))
    parts: dict[str, list[Tensor]] = {name: [] for name in vectors.plan.entries}
    check_method(method, vectors, scale)
    with Workers(workers) as pool:
        pipeline = Pipeline(vectors, method.stages, pool)
        factor = method.scale if scale is None else scale
        for piece in merged_pieces(pipeline, list(parts), scale=factor, dtype=dtype):
            parts[piece.entry.name].append(piece.values)
    merged = {}
    for name, pieces in parts.items():
        spec = vectors.plan.entries[name].spec
        empty = torch.empty(0, dtype=dtype or spec.dtype)
        merged[name] = torch.cat(pieces or [empty]).reshape(spec.shape)
    return merged


def made_up(wanted: Statistics, vectors: TaskVectors) -> dict[str, State]:
    """Statistics of inputs that nobody has seen, the same for a task whatever its place: none of `embed`."""
    found: dict[str, State] = {}
    for task in vectors.tasks:
        generator = torch.Generator().manual_seed(sum(map(ord, task)))
        found[task] = {}
        for entry in vectors.entries():
            shape, dtype = entry.spec.shape, vectors.dtype(entry)
            if wanted.kind == "fisher":
                drawn = torch.rand(shape, generator=generator, dtype=torch.float64).square()
                found[task][entry.name] = drawn.to(dtype)
            elif len(shape) > 1 and entry.spec.numel and "embed" not in entry.name:
                width = entry.spec.numel // shape[0]
                inputs = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
                found[task][entry.name] = (inputs.T @ inputs / len(inputs)).to(dtype)[None]
    return found


def vectors_of(base: State, experts: Mapping[str, State]) -> dict[str, Tensor]:
    """By tensor name the task vectors ``(K, n)`` in float64: what the references work on."""
    return {
        name: torch.stack([e[name].double().reshape(-1) - t.double().reshape(-1) for e in experts.values()])
        for name, t in base.items()
    }


def flat(base: State, experts: Mapping[str, State]) -> Tensor:
    """The whole task vectors ``(K, d)``, tensors in the base's order."""
    return torch.cat(list(vectors_of(base, experts).values()), dim=1)


def split(base: State, vector: Tensor) -> State:
    """A flat vector back in tensors, added to the base, in float64."""
    result, start = {}, 0
    for name, tensor in base.items():
        stop = start + tensor.numel()
        result[name] = tensor.double() + vector[start:stop].reshape(tensor.shape)
        start = stop
    assert start == len(vector)
    return result


def assert_close(actual: State, expected: State, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name].double(), tensor.double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_equal(actual: State, expected: State) -> None:
    """Bit for bit."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name], tensor), name
