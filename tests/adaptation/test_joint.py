"""All tasks' batches through one body: the same answers, and gradients through the statistics they share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.joint import Joint, join
from adaptation.toy import Net, make_experts, make_tasks

SIZES = (4, 6, 5)


class Deep(Net):
    """With two heads in a row, the last of other width for every task."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.middle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        own = self.head
        self._modules["head"] = nn.Sequential(self.middle, nn.Tanh(), own)
        try:
            return super().forward(x)
        finally:
            self._modules["head"] = own


def models(kind: type[nn.Module] = Net) -> list[nn.Module]:
    """One body, BatchNorm statistics and all, under heads of three, five and three classes."""
    torch.manual_seed(0)
    found = [kind(classes).double().eval() for classes in (3, 5, 3)]
    for other in found[1:]:
        for name in ("stem", "norm", "blocks", "up", "down"):
            setattr(other, name, getattr(found[0], name))
    return found


def run(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = module(batch["x"])
    return logits


def batches(length: int = 5) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(size, 2, length).double() + number} for number, size in enumerate(SIZES)]


def joined(found: list[nn.Module], heads: set[str]) -> Joint | None:
    return join(found, [run] * 3, [heads] * 3, batches())


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        (Net, {"head.weight", "head.bias"}),
        (Deep, {"middle.weight", "middle.bias", "head.weight", "head.bias"}),
    ],
)
def test_answers_are_those_of_every_task_alone(kind: type[nn.Module], heads: set[str]) -> None:
    found = models(kind)
    joint = joined(found, heads)
    assert joint is not None
    answers = joint.logits(batches())
    assert answers is not None
    for mine, module, batch in zip(answers, found, batches(), strict=True):
        torch.testing.assert_close(mine, run(module, batch))
    assert not any("forward" in vars(part) for module in found for part in module.modules())


def test_gradients_go_through_the_statistics_of_all_batches() -> None:
    found = models()
    stem, norm = found[0].stem, found[0].norm
    everything = torch.cat([batch["x"] for batch in batches()])
    with torch.no_grad():
        hidden = stem(everything)
        norm.running_mean.copy_(hidden.mean((0, 2)))
        norm.running_var.copy_(hidden.var((0, 2), correction=0))
    joint = joined(found, {"head.weight", "head.bias"})
    assert joint is not None
    answers = joint.logits(batches())
    assert answers is not None
    loss = sum(answer.softmax(-1).square().mean() for answer in answers)
    weights = [stem.weight, norm.weight, found[1].head.weight]
    mine = torch.autograd.grad(loss, weights)
    # By hand: the statistics are a function of the weights.
    hidden = stem(everything)
    mean, var = hidden.mean((0, 2), keepdim=True), hidden.var((0, 2), correction=0, keepdim=True)
    scaled = (hidden - mean) / (var + norm.eps).sqrt() * norm.weight.view(1, -1, 1) + norm.bias.view(1, -1, 1)
    loss = torch.zeros((), dtype=torch.double)
    for module, rows in zip(found, scaled.split(SIZES), strict=True):
        rest = copy.copy(module)
        rest._modules = {**module._modules, "stem": nn.Identity(), "norm": nn.Identity()}
        loss = loss + rest(rows).softmax(-1).square().mean()
    for gradient, expected in zip(mine, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(gradient, expected)


class Biased(Net):
    """Adds what is the task's own, and no part of a module that runs."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.own = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.own


def test_models_that_would_answer_otherwise_stay_apart() -> None:
    assert joined(models(Biased), {"head.weight", "head.bias", "own"}) is None
    assert joined(models(Biased), {"own"}) is None
    plain = [Net(3, batchnorm=False).double().eval() for _ in SIZES]
    assert joined(plain, {"head.weight", "head.bias"}) is None
    joint = joined(models(), {"head.weight", "head.bias"})
    assert joint is not None
    lengths = [{"x": torch.randn(2, 2, length).double()} for length in (5, 5, 7)]
    assert joint.logits(lengths) is None


def test_entropy_falls_where_statistics_are_estimated_anew() -> None:
    """Taken as constants they let the loss fall only until the next estimate."""
    base, experts = make_experts(3, seed=3)
    entropies = {}
    for joint in (True, False):
        result = adapt(
            base, experts, make_tasks(experts), preset="paper", steps=40, lr=0.05, batchnorm_every=1,
            batchnorm_joint=joint, merge={"heads": ["head.*"]},
        )  # fmt: skip
        checks = [record["check"] for record in result.history if "check" in record]
        entropies[joint] = [sum(check[task]["entropy"] for task in experts) / 3 for check in checks]
    assert entropies[True][0] == entropies[False][0]
    assert entropies[True][-1] < entropies[False][-1] < entropies[False][0]
