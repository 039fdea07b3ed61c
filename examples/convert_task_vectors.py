"""Turn an image encoder of the task_vectors checkpoints into an expert that adamerging opens.

    python examples/convert_task_vectors.py checkpoints/ViT-B-32/MNIST/finetuned.pt experts/mnist --trust

Those checkpoints (github.com/mlfoundations/task_vectors, used by the AdaMerging paper too) are whole modules
in pickle files. Opening such a file runs the code in it, so adamerging never does. This script does, which is
why you run it yourself, and only for files whose origin you trust. Run it in an environment of its own,
without network and without secrets, where the code of that repository is on the path: the file names its
classes.

    git clone https://github.com/mlfoundations/task_vectors
    pip install open_clip_torch==2.0.2 torch safetensors
    PYTHONPATH=task_vectors python examples/convert_task_vectors.py ... --trust

What it writes is an ordinary folder: `model.safetensors` with the names of transformers' CLIP image tower and
its projection, and a `config.json`. The configuration says of which family the checkpoint is: its numbers do
not compare with those of the experts on the Hugging Face hub, and adamerging refuses to put both into one
table. Its base is `openai/clip-vit-base-patch32` (or -patch16, or `openai/clip-vit-large-patch14`).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FAMILY = "task_vectors"
WHOLE = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of OpenCLIP's image encoder by the names of transformers' `CLIPVisionModelWithProjection`.

    Args:
        tensors: a state dict; names behind ``visual.`` are taken, others (the text encoder) left aside.

    Raises:
        ValueError: there is no image encoder, or a tensor of it has no place.
    """
    found = {name.rpartition("visual.")[2]: t for name, t in tensors.items() if "visual." in name}
    if not found:
        raise ValueError("no tensor's name holds 'visual.': this is no image encoder of OpenCLIP")
    result: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if name in WHOLE:
            result[f"vision_model.{WHOLE[name]}"] = tensor
        elif name == "proj":
            result["visual_projection.weight"] = tensor.T
        else:
            result |= _of_block(name, tensor)
    return {name: tensor.detach().float().contiguous().clone() for name, tensor in result.items()}


def _of_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name)
    fused = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
    if fused:  # queries, keys and values in one
        lead = f"vision_model.encoder.layers.{fused[1]}.self_attn"
        return {
            f"{lead}.{which}_proj.{fused[2]}": part
            for which, part in zip("qkv", tensor.chunk(3), strict=True)
        }
    if block and block[2] in PARTS:
        return {f"vision_model.encoder.layers.{block[1]}.{PARTS[block[2]]}.{block[3]}": tensor}
    raise ValueError(f"visual.{name} has no place in transformers' CLIP")


def configuration(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The ``config.json`` that belongs to converted tensors; sizes are read from them."""
    patches = tensors["vision_model.embeddings.patch_embedding.weight"]
    positions = tensors["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    width, patch = patches.shape[0], patches.shape[-1]
    layers = {name.split(".")[3] for name in tensors if ".layers." in name}
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // 64),
        "image_size": round(positions**0.5) * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
        "projection_dim": tensors["visual_projection.weight"].shape[0],
        "checkpoint_family": FAMILY,
    }


def write(tensors: Mapping[str, Tensor], out: Path) -> None:
    """Convert a state dict and write the folder, which must not exist."""
    converted = convert(tensors)
    out.mkdir(parents=True)
    save_file(converted, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(configuration(converted), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Convert an image encoder of the task_vectors checkpoints.")
    parser.add_argument("checkpoint", type=Path, help="a finetuned.pt")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--trust", action="store_true", help="you trust the file: opening it runs its code")
    given = parser.parse_args()
    if not given.trust:
        parser.error("opening this file runs whatever code it holds; say --trust if you trust its origin")
    if given.out.exists():
        parser.error(f"{given.out} exists")
    module = torch.load(given.checkpoint, map_location="cpu", weights_only=False)
    write(module.state_dict(), given.out)
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
