"""FusionBench's layer-wise AdaMerging step on the same models and batches; runs in its own environment.

The loop of its `LayerWiseMergedModel`: merge once, forward and backward of every task's batch through the
merged weights (the graph kept between tasks), one Adam step on the coefficients.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights

from adaptation import Peak, arguments, make_models, model_config


def main() -> None:
    args = arguments()
    base, experts = make_models(args.model, args.experts, Path(args.dir))
    make, _ = model_config(args.model)
    pretrained = make.from_pretrained(base).eval()
    models = [make.from_pretrained(path).eval() for path in experts]
    heads = [[p.detach().clone() for p in model.classifier.parameters()] for model in models]
    for parameter in pretrained.classifier.parameters():
        parameter.requires_grad_(False)
    count = sum(p.requires_grad for p in pretrained.parameters())
    start = get_layer_wise_weights(num_models=len(models), num_layers=count, init_values=0.3)
    merged = LayerWiseMergedModel(start, pretrained, models, strict=False)
    generator = torch.Generator().manual_seed(0)
    if args.model == "minilm":
        batches = [
            {"input_ids": torch.randint(1000, 20000, (args.batch, 32), generator=generator)} for _ in experts
        ]
    else:
        batches = [
            {"pixel_values": torch.randn(args.batch, 3, 224, 224, generator=generator)} for _ in experts
        ]
    adam = torch.optim.Adam([merged.merge_weight], lr=1e-3)

    def step() -> None:
        merged.merge_weights()
        for batch, head in zip(batches, heads, strict=True):
            for own, value in zip(pretrained.classifier.parameters(), head, strict=True):
                own.data = value
            logs = merged(**batch).logits.log_softmax(-1)
            (-(logs.exp() * logs).sum(-1).mean()).backward(retain_graph=True)
        adam.step()
        adam.zero_grad()

    step()
    peak, times = Peak(), []
    for _ in range(args.runs):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    print(json.dumps({"seconds": [statistics.median(times)], "memory": peak.stop()}))


if __name__ == "__main__":
    main()
