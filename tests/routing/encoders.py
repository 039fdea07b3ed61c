"""A classifier of torch's own transformer encoder, batch first or time first, in float64, with experts."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import adamerging as am
from adamerging.tasks.task import Task
from models import nudge


class Encoder(nn.Module):
    """Tokens ``(B, T, 4)``, of which zeros are padding → logits."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(4, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, input: Tensor) -> Tensor:
        tokens, hidden = self.embed(input), (input == 0).all(-1)
        if self.batch_first:
            tokens = self.encoder(tokens, src_key_padding_mask=hidden if hidden.any() else None)
        else:
            tokens = self.encoder(tokens.transpose(0, 1)).transpose(0, 1)
        return self.head((tokens * ~hidden[..., None]).sum(1) / (~hidden).sum(1, keepdim=True))


def family(batch_first: bool = True) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A base and two experts."""
    torch.manual_seed(0)
    base = Encoder(batch_first).double().eval()
    experts = {}
    for seed, name in enumerate(("one", "two"), 1):
        experts[name] = copy.deepcopy(base)
        nudge(experts[name], seed, by=0.2)
    return base, experts


def batch(count: int, length: int, padded: bool) -> Tensor:
    """Random samples, of which every second one ends in padding."""
    chance = torch.Generator().manual_seed(5)
    found = torch.randn(count, length, 4, generator=chance, dtype=torch.float64)
    if padded:
        found[1::2, length // 2 :] = 0
    return found


def tasks(experts: dict[str, nn.Module], length: int = 6, padded: bool = False) -> list[Task]:
    """A task on the same samples for each expert."""
    samples = batch(20, length, padded)
    return [am.module_task(name, adapt=samples, model=expert) for name, expert in experts.items()]
