"""BatchNorm while coefficients are learned: common statistics, and gradients through those of the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from adamerging import UsageError
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.batchnorm import common_statistics
from adamerging.tasks.module import module_task
from adamerging.tasks.task import Task
from adaptation.toy import Net, make_experts, make_tasks


def layer_of(kind: type[nn.Module], *, affine: bool) -> nn.Module:
    layer = kind(5, affine=affine).double().eval()
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
        if affine:
            layer.weight.normal_()
            layer.bias.normal_()
    return layer


def renormalised(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Batch renormalisation as its paper writes it, the two corrections without gradient."""
    dims, shape = [0, *range(2, inputs.ndim)], [1, -1, *[1] * (inputs.ndim - 2)]
    mean, deviation = inputs.mean(dims), (inputs.var(dims, correction=0) + layer.eps).sqrt()
    common = (layer.running_var + layer.eps).sqrt()
    r, d = (deviation / common).detach(), ((mean - layer.running_mean) / common).detach()
    normal = (inputs - mean.view(shape)) / deviation.view(shape) * r.view(shape) + d.view(shape)
    return normal if layer.weight is None else normal * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 5)), (nn.BatchNorm2d, (4, 5, 3, 2))])
def test_the_gradient_is_that_of_batch_renormalisation(
    kind: type[nn.Module], shape: tuple[int, ...], affine: bool
) -> None:
    torch.manual_seed(0)
    layer = layer_of(kind, affine=affine)
    inputs, outer = torch.randn(shape, dtype=torch.double, requires_grad=True), torch.randn(shape).double()
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    wanted = [inputs, *layer.parameters()]
    with common_statistics(layer):
        output = layer(inputs)
    assert torch.equal(output, layer(inputs)) and not layer.training and "forward" not in vars(layer)
    found = torch.autograd.grad(output, wanted, outer)
    expected = torch.autograd.grad(renormalised(layer, inputs), wanted, outer)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


def test_what_the_next_estimate_takes_back_has_no_gradient() -> None:
    torch.manual_seed(0)
    linear, layer = nn.Linear(4, 5, bias=False).double(), layer_of(nn.BatchNorm1d, affine=True)
    inputs = torch.randn(32, 4, dtype=torch.double)
    with torch.no_grad():
        out = linear(inputs)
        layer.running_mean.copy_(out.mean(0))
        layer.running_var.copy_(out.var(0, correction=0))

    def along_the_weights() -> float:
        """How the loss changes as the weights of the linear map grow."""
        loss = layer(linear(inputs)).softmax(-1).square().sum()
        (gradient,) = torch.autograd.grad(loss, [linear.weight])
        return float((gradient * linear.weight.detach()).sum())

    assert abs(along_the_weights()) > 0.1  # constants: it pays to make them larger
    with common_statistics(layer):
        assert abs(along_the_weights()) < 1e-4  # they would be normalised again; the rest is epsilon's


def test_parts_that_are_frozen_and_half_precision() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).eval().requires_grad_(False)
    inputs = torch.randn(4, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    with common_statistics(layer):
        layer(inputs).float().square().sum().backward()
    assert inputs.grad is not None and inputs.grad.dtype == torch.bfloat16
    assert layer.weight.grad is None and layer.bias.grad is None


def test_a_class_with_a_forward_of_its_own_is_left_alone() -> None:
    class Activated(nn.BatchNorm1d):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).relu()

    layer = Activated(3).eval()
    inputs = torch.randn(4, 3)
    with common_statistics(layer):
        assert "forward" not in vars(layer) and torch.equal(layer(inputs), layer(inputs).relu())


@pytest.mark.parametrize(("buffers", "expected"), [("average", None), ("base", 0.5), ("method", 1.0)])
def test_statistics_that_were_asked_for_are_not_estimated_anew(buffers: str, expected: float | None) -> None:
    base, experts = make_experts(2)
    for value, model in zip((0.5, 1.0, 2.0), (base, *experts.values()), strict=True):
        model.norm.running_mean.fill_(value)
    result = adapt(
        base, experts, make_tasks(experts), preset="paper", initial=0.25, steps=3,
        merge={"heads": ["head.*"], "buffers": buffers},
    )  # fmt: skip
    found = result.body.tensors["norm.running_mean"]
    if expected is None:  # of inputs around zero
        assert found.abs().max() < 0.5
    else:  # the base's, and base + 0.25 (1 - base) + 0.25 (2 - base) with coefficients that nothing moves
        assert torch.allclose(found, torch.full_like(found, expected))


class Headed(Net):
    """A net whose head has a BatchNorm layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def headed_experts() -> tuple[Headed, dict[str, Headed]]:
    torch.manual_seed(0)
    base, experts = Headed().double().eval(), {}
    for number, name in enumerate(("a", "b"), 1):
        experts[name] = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in experts[name].parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            experts[name].head[1].running_mean.add_(5 * number)
            experts[name].head[0].bias.add_(5 * number)  # the same function
    return base, experts


@pytest.mark.parametrize(
    ("settings", "merge"),
    [
        ({}, {}),
        ({"batchnorm_joint": False}, {}),
        ({}, {"buffers": "task"}),
        ({"preset": "symerge"}, {}),
    ],
    ids=["joint", "apart", "own", "learned heads"],
)
def test_statistics_of_a_head_stay_its_experts(settings: dict[str, object], merge: dict[str, object]) -> None:
    base, experts = headed_experts()
    found = adapt(
        base,
        experts,
        make_tasks(experts),
        steps=2,
        batch_size=8,
        merge={"heads": ["head.*"], **merge},
        **settings,
    )  # type: ignore[arg-type]
    for learner in found.learners:
        mine, theirs = learner.module.head[1], experts[learner.task.name].head[1]
        assert torch.equal(mine.running_mean, theirs.running_mean)
        assert torch.equal(mine.running_var, theirs.running_var)
        assert mine.num_batches_tracked == theirs.num_batches_tracked
    common = found.body.tensors["norm.running_mean"]
    assert not torch.allclose(common, sum(e.norm.running_mean for e in experts.values()) / 2)


@pytest.mark.parametrize("merge", [{}, {"buffers": "task"}], ids=["common", "own"])
def test_batches_of_one_sample_have_statistics_with_another(merge: dict[str, object]) -> None:
    base, experts = make_flat_experts()
    tasks = flat_tasks(experts, 9)
    found = adapt(base, experts, tasks, steps=2, batch_size=1, merge={"heads": ["head.*"], **merge})
    assert all(tensor.isfinite().all() for tensor in found.body.tensors.values())


def test_one_sample_alone_has_no_statistics() -> None:
    base, experts = make_flat_experts()
    with pytest.raises(UsageError, match=r"no statistics of one sample, .* for a\."):
        adapt(
            base, experts, flat_tasks(experts, 2), steps=2, held_out=0.5,
            merge={"heads": ["head.*"], "buffers": "task"},
        )  # fmt: skip


class Flat(nn.Module):
    """BatchNorm over samples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.stem(x))))


def make_flat_experts() -> tuple[Flat, dict[str, Flat]]:
    torch.manual_seed(0)
    base, experts = Flat().eval(), {}
    for name in ("a", "b"):
        experts[name] = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in experts[name].parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return base, experts


def flat_tasks(experts: dict[str, Flat], samples: int) -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    return [
        module_task(name, adapt=torch.randn(samples, 4, generator=generator), model=expert)
        for name, expert in experts.items()
    ]
