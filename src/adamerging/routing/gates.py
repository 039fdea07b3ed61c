"""Gates: how much of each expert a sample takes, told by a small router from what goes into an MLP."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .rows import by_sample, samples_in


@dataclass
class Flow:
    """What a forward pass carries past the layers between.

    Attributes:
        active: whether samples are routed; otherwise every layer is the plain one.
        mask: ``(B, T)``, which tokens are no padding, of the pass that runs; None where none was given.
        batch: how many samples the pass that runs is on; None where the model itself was not called.
    """

    active: bool = True
    mask: Tensor | None = None
    batch: int | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a model is called on, before it runs."""
        self.mask, self.batch = mask_in(module, args, kwargs), samples_in(args, kwargs)

    def end(self, *_: Any) -> None:
        """Forget it: parts may be called by themselves."""
        self.mask = self.batch = None

    def tokens(self, features: Tensor, where: str) -> Tensor:
        """Features in the pass that runs as ``(B, T, D)``. Arguments and errors as of `rows.by_sample`."""
        return by_sample(features, self.batch or len(features), where)


@dataclass
class Gate:
    """The gates of one site in the pass that runs.

    Attributes:
        flow: of the model.
        values: ``(B, K)``; None before the first pass.
    """

    flow: Flow
    values: Tensor | None = field(default=None, repr=False)


class Router(nn.Module):
    """A two-layer MLP from token features to gates, which are averaged over the tokens.

    Args:
        width: of the features.
        hidden: width of the hidden layer.
        experts: number of gates.
    """

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, experts)

    @torch.no_grad()
    def start(self, std: float, gate: float, generator: torch.Generator) -> None:
        """Give first values: weights of this standard deviation, and gates about this value."""
        for layer in (self.first, self.second):
            noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight.copy_(noise * std)
        self.first.bias.zero_()
        self.second.bias.fill_(gate)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gates ``(B, K)``.

        Args:
            features: ``(B, T, D)``, or ``(B, D)`` where each sample is one token.
            mask: ``(B, T)``, which tokens count; all when None, or when it is no mask of these tokens.
        """
        tokens = features if features.ndim > 2 else features[:, None]
        # The second layer is linear: the mean of its outputs is its output for the mean, and that is cheaper.
        hidden = self.first(tokens).relu()
        gates: Tensor = self.second(mean_over_tokens(hidden, mask))
        return gates


def mean_over_tokens(features: Tensor, mask: Tensor | None) -> Tensor:
    """``(B, T, D) → (B, D)``, padding left out where the mask is one of these tokens."""
    if mask is None or mask.shape != features.shape[:2]:
        return features.mean(1)
    weights = mask.to(features.dtype).unsqueeze(-1)
    return (features * weights).sum(1) / weights.sum(1).clamp_min(1)


def mask_in(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The attention mask ``(B, T)`` among the arguments of a forward pass."""
    given = kwargs
    if args:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    mask = given.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
