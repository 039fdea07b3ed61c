"""Gated layers: base + 1[score ≥ τ]·δ, by parametrisation of an unchanged model (TAPS, arXiv 2203.16708)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .layers import Layer, find_layers, gateable, norms_and_biases
from .settings import TapsSettings


class _Gated(torch.autograd.Function):
    """The weight of a gated layer, with the straight-through gradient of its score."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, own: Tensor, score: Tensor, threshold: float) -> Tensor:
        ctx.open = bool(score >= threshold)
        ctx.save_for_backward(base, own)
        return own.view_as(own) if ctx.open else base.view_as(base)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        (base, own), grad = ctx.saved_tensors, gradients[0]
        _, wants_own, wants_score, _ = ctx.needs_input_grad
        # A closed layer's weight gets no gradient at all, so no momentum moves it either; its score does.
        inner = torch.dot(grad.reshape(-1), (own - base).reshape(-1)) if wants_score else None
        return None, grad if wants_own and ctx.open else None, inner, None


class Gate(nn.Module):
    """The parametrisation of one tensor.

    What learns is the weight itself and not δ: steps, decay and rounding are then those of fine-tuning.

    Attributes:
        own: the task's base + δ, in the tensor's shape; starts as the base.
        score: scalar, which several gates may share.
        threshold: the change counts where the score reaches it.
    """

    def __init__(self, like: Tensor, score: nn.Parameter, threshold: float) -> None:
        super().__init__()
        self.own = nn.Parameter(like.detach().clone())
        self.score = score
        self.threshold = threshold

    @property
    def open(self) -> bool:
        """Whether the change counts now."""
        return bool(self.score.detach() >= self.threshold)

    def forward(self, base: Tensor) -> Tensor:
        """Base → base + 1[score ≥ τ]·δ. Gradients: of `own` that of the weight, of the score ⟨that, δ⟩."""
        gated: Tensor = _Gated.apply(base, self.own, self.score, self.threshold)  # type: ignore[no-untyped-call]
        return gated


class Gates:
    """The gates of one model, in training or trained; what `gate_layers` returns.

    It is the `Aim` of a training: few open layers.

    Attributes:
        module: the gated model.
        layers: the gated layers, in the model's order.
        settings: the penalty and so on.
        rates: learning rate of each score, by the parameter's name.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[Layer], settings: TapsSettings, steps: int
    ) -> None:
        self.module = module
        self.layers = tuple(layers)
        self.settings = settings
        self._gates: dict[str, Gate] = {}
        self._statistics: dict[str, TiedStatistics] = {}
        for layer in layers:
            weight = module.get_parameter(layer.weight)
            score = nn.Parameter(torch.tensor(settings.initial, device=weight.device))
            score.requires_grad_(settings.penalty > 0)  # at no price a gate has no reason to close
            for name in (layer.weight, *(layer.small if settings.small == "gate" else ())):
                self._gates[name] = _gate(module, name, score, settings.threshold)
            if settings.small == "gate":
                for path in layer.statistics:
                    norm = module.get_submodule(path)
                    self._statistics[path] = TiedStatistics(norm, self._gates[layer.weight])
        names = {id(p): name for name, p in module.named_parameters()}
        self._scores: list[Tensor] = [self._gates[layer.weight].score for layer in layers]
        rate = settings.score_lr or 1 / max(1, steps)
        self.rates: Mapping[str, float] = {names[id(score)]: rate for score in self._scores}
        sizes = torch.tensor([float(self._gates[layer.weight].own.numel()) for layer in layers])
        equal = torch.full_like(sizes, 1 / len(sizes))
        self._sizes = sizes
        self._weights = equal if settings.count == "layers" else sizes / sizes.sum()

    def loss(self, progress: float) -> Tensor:
        """λ times the mean of the scores' magnitudes, a scalar; zero before `TapsSettings.penalty_from`."""
        scores = torch.stack(self._scores)
        penalty = self.settings.penalty if progress >= self.settings.penalty_from else 0.0
        return penalty * (scores.abs() @ self._weights.to(scores.device))

    def cost(self) -> float:
        """What the open layers would cost in the loss if each score stood at the threshold."""
        share = float(self._weights[torch.tensor(self._are_open())].sum())
        return self.settings.penalty * self.settings.threshold * share

    def figures(self) -> dict[str, float]:
        """``open``: layers that are open; ``open_share``: the share of the gated parameters in them."""
        flags = torch.tensor(self._are_open())
        return {"open": int(flags.sum()), "open_share": float(self._sizes[flags].sum() / self._sizes.sum())}

    def scores(self) -> dict[str, float]:
        """Score by the layer's weight, in the model's order."""
        return {
            layer.weight: float(score.detach())
            for layer, score in zip(self.layers, self._scores, strict=True)
        }

    def deltas(self) -> dict[str, Tensor]:
        """The changes of the open layers, on the CPU in float32, by the weight's name."""
        names = [layer.weight for layer in self.layers if self._gates[layer.weight].open]
        return {name: self._change(name).float().cpu().contiguous() for name in names}

    def gated(self) -> dict[str, bool]:
        """Whether the gate is open, by the name of every tensor that has one, statistics too."""
        found = {name: gate.open for name, gate in self._gates.items()}
        for path, tied in self._statistics.items():
            found |= {f"{path}.{leaf}": tied.gate.open for leaf in tied.base}
        return found

    def unwrap(self) -> nn.Module:
        """Make the module an ordinary one again, with the weights it now has; the gates are gone.

        Returns:
            The module, which is changed in place.
        """
        for tied in self._statistics.values():
            tied.remove()
        for name in self._gates:
            owner, _, leaf = name.rpartition(".")
            parametrize.remove_parametrizations(self.module.get_submodule(owner), leaf)
        return self.module

    def _change(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        parametrised: Any = self.module.get_submodule(owner).parametrizations
        base: Tensor = parametrised[leaf].original
        return self._gates[name].own.detach() - base.detach()

    def _are_open(self) -> list[bool]:
        return [self._gates[layer.weight].open for layer in self.layers]


class TiedStatistics:
    """Running statistics of a BatchNorm layer that are the base's while its gate is closed.

    Attributes:
        gate: the gate.
        base: the base's statistics, by the buffer's name.
    """

    def __init__(self, norm: nn.Module, gate: Gate) -> None:
        self.gate = gate
        self.base = {leaf: buffer.detach().clone() for leaf, buffer in norm.named_buffers(recurse=False)}
        self._norm = norm
        self._hook = norm.register_forward_pre_hook(self._before)

    def settle(self) -> None:
        """Put the base's statistics back where the gate is closed."""
        if not self.gate.open:
            for leaf, value in self.base.items():
                self._norm.get_buffer(leaf).copy_(value)

    def remove(self) -> None:
        """Leave the layer as it is now."""
        self.settle()
        self._hook.remove()

    def _before(self, norm: nn.Module, inputs: Any) -> None:
        if not self.gate.open:
            self.settle()
            norm.eval()


def gate_layers(
    module: nn.Module,
    settings: TapsSettings | None = None,
    *,
    head: Collection[str] = (),
    steps: int = 1000,
) -> Gates:
    """Give every linear, convolution and embedding map of a model a gate.

    The module is changed in place, as parametrisations do: it computes what it did, its weights are frozen,
    and each gated layer has a weight of its own (the base's at first) and a score that learn. Biases and
    norms go on learning as they did, or follow a gate (`TapsSettings.small`). `Gates.unwrap` makes it an
    ordinary module again.

    At the first step δ = 0, so the score has no gradient but the penalty's. At penalty 0 the scores stand
    still: every layer stays open, which is fine-tuning, step by step.

    Args:
        module: any module; parameters that do not require gradients stay as they are.
        settings: threshold, first score, which layers.
        head: names of parameters that are new in this task; they are never gated.
        steps: of the training, for the rate of the scores.

    Raises:
        UsageError: see `find_layers`.
    """
    settings = settings or TapsSettings.model_validate({})
    layers = find_layers(module, head=head, include=settings.include, exclude=settings.exclude)
    kept = set(gateable(module, head)) - {layer.weight for layer in layers}
    if settings.small == "gate":
        kept |= dict(norms_and_biases(module, head)).keys() - {n for layer in layers for n in layer.small}
    for name in kept:
        module.get_parameter(name).requires_grad_(False)
    return Gates(module, layers, settings, steps)


def _gate(module: nn.Module, name: str, score: nn.Parameter, threshold: float) -> Gate:
    owner, _, leaf = name.rpartition(".")
    weight = module.get_parameter(name).requires_grad_(False)
    gate = Gate(weight, score, threshold)
    parametrize.register_parametrization(module.get_submodule(owner), leaf, gate)
    return gate
