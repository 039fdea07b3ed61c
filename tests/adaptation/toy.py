"""Small models, experts and tasks for the tests of adaptation, all in memory."""

import copy
import hashlib

import torch
from torch import nn

from adamerging.tasks.task import Samples, Task


class Net(nn.Module):
    """A body with a convolution, BatchNorm, a tied pair and a block list; a linear head."""

    def __init__(self, classes=3, batchnorm=True, tied=False):
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4) if batchnorm else nn.Identity()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.up = nn.Linear(4, 8, bias=False)
        self.down = nn.Linear(4, 8, bias=False)
        if tied:
            self.down.weight = self.up.weight
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        hidden = torch.tanh(self.norm(self.stem(x))).mean(-1)
        hidden = torch.tanh(self.up(hidden) + 0.5 * self.down(hidden))
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return self.head(hidden)


def make_experts(count=3, *, dtype=torch.float64, seed=0, classes=3, **options):
    """A base and experts = base + noise, each with a head of its own."""
    torch.manual_seed(seed)
    base = Net(classes, **options).to(dtype)
    experts = {}
    for number in range(count):
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        experts[f"task{number}"] = expert.eval()
    return base.eval(), experts


def make_task(name, expert, *, samples=40, seed=0, dtype=torch.float64, labels=True, **fields):
    """A task on random inputs whose labels are the expert's own predictions."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    inputs = torch.randn(samples, 2, 5, generator=generator, dtype=dtype)
    with torch.no_grad():
        answers = expert(inputs).argmax(-1).tolist() if labels else None
    digest = hashlib.sha256(inputs.numpy().tobytes()).hexdigest()
    return Task(
        name,
        skeleton=lambda _, __: copy.deepcopy(expert),
        forward=lambda module, batch: module(batch["x"]),
        collate=lambda rows: {"x": torch.stack(list(rows))},
        adapt=Samples(list(inputs), answers, name, digest),
        **fields,
    )


def make_tasks(experts, **fields):
    return [make_task(name, expert, **fields) for name, expert in experts.items()]
