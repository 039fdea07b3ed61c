"""Tiny encoders in memory, in float64, with experts and tasks, and their forward pass written out anew."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from adamerging.tasks.task import Samples, Task
from models import bert_config, nudge

NAMES = ("one", "two", "three")


def bert_family() -> tuple[nn.Module, dict[str, nn.Module]]:
    """A headless BERT and three classifiers fine-tuned from it."""
    from transformers import BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    base = BertModel(bert_config()).double().eval()
    experts = {}
    for seed, name in enumerate(NAMES, 1):
        expert = BertForSequenceClassification(bert_config(num_labels=2 + seed)).double().eval()
        expert.bert.load_state_dict(base.state_dict())
        nudge(expert, seed, by=0.1)
        experts[name] = expert
    return base, experts


def vit_family() -> tuple[nn.Module, dict[str, nn.Module]]:
    """A headless ViT and two classifiers fine-tuned from it."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8,
        patch_size=4, num_labels=3,
    )  # fmt: skip
    base = ViTModel(config, add_pooling_layer=False).double().eval()
    experts = {}
    for seed, name in enumerate(NAMES[:2], 1):
        expert = ViTForImageClassification(config).double().eval()
        expert.vit.load_state_dict(base.state_dict())
        nudge(expert, seed, by=0.1)
        experts[name] = expert
    return base, experts


def _task(name: str, expert: nn.Module, inputs: Sequence[Tensor], collate) -> Task:
    digest = hashlib.sha256(b"".join(item.numpy().tobytes() for item in inputs)).hexdigest()
    return Task(
        name,
        skeleton=lambda _, __: copy.deepcopy(expert),
        forward=lambda module, batch: module(**batch).logits,
        collate=collate,
        adapt=Samples(list(inputs), None, name, digest),
    )


def pad(rows: Sequence[Tensor]) -> Mapping[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def text_tasks(experts: Mapping[str, nn.Module], count: int = 24) -> list[Task]:
    """A task on random texts of 3 to 9 tokens for each expert."""
    chance = torch.Generator().manual_seed(5)

    def texts() -> list[Tensor]:
        lengths = torch.randint(3, 10, (count,), generator=chance).tolist()
        return [torch.randint(5, 60, (length,), generator=chance) for length in lengths]

    return [_task(name, expert, texts(), pad) for name, expert in experts.items()]


def image_tasks(experts: Mapping[str, nn.Module], count: int = 12) -> list[Task]:
    """A task on random images for each expert."""
    chance = torch.Generator().manual_seed(5)

    def images() -> list[Tensor]:
        return list(torch.randn(count, 3, 8, 8, generator=chance, dtype=torch.float64))

    return [
        _task(name, expert, images(), lambda rows: {"pixel_values": torch.stack(list(rows))})
        for name, expert in experts.items()
    ]


# --- the reference: one sample at a time, so that there is no padding and no batch


def router_gates(router: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """``(K,)`` of the tokens ``(T, D)`` of one sample: the mean over tokens of each token's gates."""
    total = 0
    for token in features:
        hidden = (router["first.weight"] @ token + router["first.bias"]).clamp_min(0)
        total = total + router["second.weight"] @ hidden + router["second.bias"]
    return total / len(features)


def mixed(
    name: str, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], gates: Tensor
) -> Tensor:
    """θ0 + Σ_t g_t (θ_t − θ0)."""
    return base[name] + sum(g * (e[name] - base[name]) for g, e in zip(gates, experts, strict=True))


def body_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a body by its own names."""
    inner = getattr(module, "bert", getattr(module, "vit", module))
    return {name: tensor.detach() for name, tensor in inner.state_dict().items()}


def merged_bert(base: nn.Module, experts: Mapping[str, nn.Module], scale: float) -> nn.Module:
    """The body of task arithmetic."""
    merged, own = copy.deepcopy(base), body_of(base)
    others = [body_of(expert) for expert in experts.values()]
    gates = torch.full((len(others),), scale, dtype=torch.float64)
    merged.load_state_dict(
        {n: mixed(n, own, others, gates) if t.is_floating_point() else t for n, t in own.items()}
    )
    return merged


def reference_bert(
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    task: str,
    routers: Sequence[Mapping[str, Tensor]],
    ids: Tensor,
    scale: float = 0.3,
) -> Tensor:
    """Logits of one text under WEMoE: the MLP of each layer is θ0 + Σ_t r_t(h) τ_t, the rest static."""
    static, own = merged_bert(base, experts, scale), body_of(base)
    others = [body_of(expert) for expert in experts.values()]
    hidden = static.embeddings(input_ids=ids[None])
    for number, layer in enumerate(static.encoder.layer):
        attended = layer.attention(hidden)[0][0]
        gates = router_gates(routers[number], attended)
        at = f"encoder.layer.{number}"

        def weight(name: str, at: str = at, gates: Tensor = gates) -> Tensor:
            return mixed(f"{at}.{name}", own, others, gates)

        inner = gelu(attended @ weight("intermediate.dense.weight").T + weight("intermediate.dense.bias"))
        outer = inner @ weight("output.dense.weight").T + weight("output.dense.bias")
        norm = layer.output.LayerNorm
        hidden = layer_norm(outer + attended, norm.normalized_shape, norm.weight, norm.bias, norm.eps)[None]
    return experts[task].classifier(static.pooler(hidden))[0]


def reference_vit(
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    task: str,
    routers: Sequence[Mapping[str, Tensor]],
    image: Tensor,
    scale: float = 0.3,
) -> Tensor:
    """The same of one image."""
    static, own = merged_bert(base, experts, scale), body_of(base)
    others = [body_of(expert) for expert in experts.values()]
    hidden = static.embeddings(image[None])
    layers = static.layers if hasattr(static, "layers") else static.encoder.layer
    names = [name for name in own if name.endswith(".weight") and "mlp" in name]
    for number, layer in enumerate(layers):
        hidden = hidden + layer.attention(layer.layernorm_before(hidden))[0]
        seen = layer.layernorm_after(hidden)[0]
        gates = router_gates(routers[number], seen)
        up, down = (n.removesuffix(".weight") for n in names if f".{number}." in f".{n}")
        inner = gelu(
            seen @ mixed(f"{up}.weight", own, others, gates).T + mixed(f"{up}.bias", own, others, gates)
        )
        outer = inner @ mixed(f"{down}.weight", own, others, gates).T + mixed(
            f"{down}.bias", own, others, gates
        )
        hidden = hidden + outer[None]
    return experts[task].classifier(static.layernorm(hidden)[:, 0])[0]
