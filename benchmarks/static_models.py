"""A base of about 250 M parameters and experts of it, in bf16, made once and kept."""

from __future__ import annotations

import json
from pathlib import Path

EXPERTS = 16


def make_models(folder: Path) -> tuple[Path, list[Path]]:
    """The folders of the base and of sixteen experts (base + small noise), made where they are missing."""
    base, experts = folder / "base", [folder / f"expert{i:02d}" for i in range(EXPERTS)]
    missing = [path for path in (base, *experts) if not (path / "config.json").exists()]
    if missing:
        print(f"making {len(missing)} models in {folder} ...", flush=True)
        _make(base, [path for path in missing if path != base])
    return base, experts


def _make(base: Path, experts: list[Path]) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (base / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=14,
            num_attention_heads=16,
            dtype="bfloat16",
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    config_text = (base / "config.json").read_text()
    for path in experts:
        path.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(int(path.name.removeprefix("expert")) + 1)
        moved = {
            name: (tensor + 0.002 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            for name, tensor in weights.items()
        }
        save_file(moved, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(config_text)  # last: its presence says that the rest is there


def parameters(folder: Path) -> int:
    """How many parameters a model has, told by its header."""
    with open(folder / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            total += (entry["data_offsets"][1] - entry["data_offsets"][0]) // 2
    return total
