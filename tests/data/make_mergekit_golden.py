"""Merge tiny models with the real mergekit and keep part of what it gives, for tests/test_mergekit.py.

    python -m venv mk && mk/bin/pip install mergekit==0.1.5
    mk/bin/python tests/data/make_mergekit_golden.py tests/data/mergekit_golden.json

The models are made from a counter-based generator, so nothing but results is stored. The test imports the
models and the configurations from here; mergekit itself is imported in `main` alone.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELS = ("base", "a", "b", "c")
KEPT = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.norm.weight",
)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "vocab_size": 12,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

CONFIGURATIONS = {
    "linear": """
        merge_method: linear
        models:
          - {model: a, parameters: {weight: 0.7}}
          - {model: b, parameters: {weight: [0.1, 0.9]}}
          - model: c
            parameters:
              weight: [{filter: mlp, value: 0.2}, {filter: norm, value: [0.4, 0.6]}, {value: 1}]
    """,
    "linear_sum": """
        merge_method: linear
        models:
          - {model: a, parameters: {weight: 0.6}}
          - {model: b, parameters: {weight: 0.7}}
        parameters: {normalize: false}
    """,
    "linear_with_base": """
        merge_method: linear
        base_model: base
        models: [{model: a}, {model: b, parameters: {weight: 2}}]
        parameters: {weight: 1.5}
    """,
    "slerp": """
        merge_method: slerp
        base_model: base
        models: [{model: a}, {model: base}]
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.4}
    """,
    "slerp_far": """
        merge_method: slerp
        base_model: far
        models: [{model: far}, {model: a}]
        parameters: {t: 0.3}
    """,
    "task_arithmetic": """
        merge_method: task_arithmetic
        base_model: base
        models:
          - {model: base}
          - {model: a, parameters: {weight: 0.7}}
          - {model: b, parameters: {weight: -0.4}}
          - {model: c}
        parameters: {weight: [0.5, 0.1], lambda: 0.8}
    """,
    "task_arithmetic_normalised": """
        merge_method: task_arithmetic
        base_model: base
        models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.4}}]
        parameters: {normalize: true}
    """,
    "ties": """
        merge_method: ties
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.7, density: 0.5}}
          - {model: b, parameters: {weight: 0.5, density: [0.2, 0.8]}}
          - {model: c, parameters: {weight: 0.3, density: [{filter: mlp, value: 0.4}, {value: 0.9}]}}
        parameters: {int8_mask: true}
    """,
    "ties_sum_rescaled": """
        merge_method: ties
        base_model: base
        models: [{model: a}, {model: b}, {model: c}]
        parameters: {weight: 0.5, density: 0.3, normalize: false, rescale: true, lambda: [0.5, 1.5]}
    """,
    "dare_linear_whole": """
        merge_method: dare_linear
        base_model: base
        models: [{model: a}, {model: b}]
        parameters: {weight: 0.5, density: 1.0, normalize: true}
    """,
    "dare_ties_whole": """
        merge_method: dare_ties
        base_model: base
        models: [{model: a}, {model: b}, {model: c}]
        parameters: {weight: 0.5}
    """,
    "breadcrumbs": """
        merge_method: breadcrumbs
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.7, density: 0.6, gamma: 0.1}}
          - {model: b, parameters: {weight: 0.5, density: 0.4}}
        parameters: {gamma: 0.05}
    """,
    "breadcrumbs_rescaled": """
        merge_method: breadcrumbs
        base_model: base
        models: [{model: a}, {model: b}]
        parameters: {weight: 0.5, density: 0.5, rescale: true}
    """,
    "breadcrumbs_ties": """
        merge_method: breadcrumbs_ties
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.7}}
          - {model: b, parameters: {weight: -0.5}}
          - {model: c, parameters: {weight: 0.4}}
        parameters: {density: 0.7, gamma: 0.1}
    """,
    "della_whole": """
        merge_method: della
        base_model: base
        models: [{model: a}, {model: b}, {model: c}]
        parameters: {weight: 0.5, lambda: 1.1}
    """,
    "model_stock": """
        merge_method: model_stock
        base_model: base
        models: [{model: a}, {model: b}, {model: c}]
    """,
    "model_stock_filter_wise": """
        merge_method: model_stock
        base_model: base
        models: [{model: a}, {model: b}]
        parameters: {filter_wise: true}
    """,
}

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
"""Not kept, for they differ from run to run; the test compares their statistics with the definition."""


def configuration(name: str) -> dict:
    """A mergekit configuration; the models in it are folders of the working directory."""
    return yaml.safe_load(CONFIGURATIONS[name])


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the tiny Llama."""
    hidden, inner, vocabulary = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab_size"]
    narrow = hidden // LLAMA["num_attention_heads"] * LLAMA["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(LLAMA["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def uniform(key: str, count: int) -> torch.Tensor:
    """Numbers in [-1, 1) that depend on the key alone."""
    words = np.random.Philox(key=int.from_bytes(key.encode()[-16:], "little")).random_raw(count)
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float64) / 2**23 - 1)


def state(model: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One model: ``base``, an expert of it, or ``far``, whose directions are others."""
    tensors = {}
    for number, (name, shape) in enumerate(shapes().items()):
        count = int(np.prod(shape))
        values = 0.2 * uniform(f"base{number}", count) + ("norm" in name)
        if model == "far":
            values = 0.3 * uniform(f"far{number}", count) + 0.5 * values
        elif model != "base":
            values = values + 0.05 * uniform(f"{model}{number}", count) ** 3
            values = values + 0.01 * uniform(f"common{number}", count)
        tensors[name] = values.reshape(shape).to(dtype)
    return tensors


def write_model(folder: Path, model: str, dtype: str) -> None:
    """A Hugging Face folder without a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | {"torch_dtype": dtype}))
    save_file(state(model, DTYPES[dtype]), folder / "model.safetensors", {"format": "pt"})


def main(out: Path) -> None:
    """Run every configuration and keep the tensors named in `KEPT`."""
    from importlib.metadata import version

    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    out = out.resolve()
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    every = os.environ.get("ALL_TENSORS_TO")
    golden = {"mergekit": version("mergekit"), "torch": torch.__version__, "results": {}}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            for model in (*MODELS, "far"):
                write_model(Path(model), model, dtype)
            for name in CONFIGURATIONS:
                config = MergeConfiguration.model_validate(configuration(name))
                run_merge(config, f"out-{name}", options)
                merged = {}
                for file in sorted(Path(f"out-{name}").glob("*.safetensors")):
                    merged |= load_file(file)
                strange = {n: t.dtype for n, t in merged.items() if t.dtype != DTYPES[dtype]}
                assert not strange, (name, strange)
                golden["results"].setdefault(name, {})[dtype] = {
                    tensor: base64.b64encode(merged[tensor].view(torch.uint8).numpy().tobytes()).decode()
                    for tensor in KEPT
                }
                if every:
                    save_file(merged, Path(every) / f"{name}-{dtype}.safetensors")
            os.chdir("/")
            LoaderCache().flush_all()  # it goes by name, and the next models have the same names
    out.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
