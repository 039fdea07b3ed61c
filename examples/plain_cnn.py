"""Merge plain PyTorch networks, each with a head of its own: no transformers, no files needed.

    python examples/plain_cnn.py

Two experts learn from one base to tell shapes and to tell colours. Their bodies are merged and each task
keeps its head. The network has BatchNorm: its statistics belong to no expert after a merge, and are estimated
anew on the unlabeled images.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

import adamerging as am

COLOURS = torch.tensor([[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.3, 0.3, 1.0]])


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 3, 16, 16), the number of their shape (square, cross, frame) and of their colour."""
    g = torch.Generator().manual_seed(seed)
    shapes, colours = (torch.randint(3, (count,), generator=g) for _ in range(2))
    images = 0.3 * torch.rand(count, 3, 16, 16, generator=g)
    for index in range(count):
        y, x = torch.randint(0, 7, (2,), generator=g).tolist()
        mask = torch.zeros(9, 9)
        if shapes[index] == 0:
            mask[:] = 1
        elif shapes[index] == 1:
            mask[3:6], mask[:, 3:6] = 1, 1
        else:
            mask[:] = 1
            mask[2:7, 2:7] = 0
        images[index, :, y : y + 9, x : x + 9] += mask * COLOURS[colours[index]].view(3, 1, 1)
    return images, shapes, colours


def make_body() -> nn.Sequential:
    """Images to 32 features."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate([(3, 16), (16, 32), (32, 32)]):
        layers[f"conv{number}"] = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        layers[f"norm{number}"] = nn.BatchNorm2d(after)
        layers[f"relu{number}"] = nn.ReLU()
    layers["pool"], layers["flat"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(layers)


def train(body: nn.Module, heads: list[nn.Module], images: Tensor, targets: list[Tensor], steps: int) -> None:
    parameters = [*body.parameters(), *(p for head in heads for p in head.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    body.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        features = body(images[chosen])
        losses = [
            nn.functional.cross_entropy(head(features), target[chosen])
            for head, target in zip(heads, targets, strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    body.eval()


def main() -> None:
    torch.manual_seed(0)
    images, shapes, colours = make_images(1200, seed=1)
    unlabeled = make_images(200, seed=2)[0]
    test, test_shapes, test_colours = make_images(400, seed=3)
    targets = {"shape": (shapes, test_shapes), "colour": (colours, test_colours)}

    # 1. A base that has seen a little of both, as a pre-trained network has seen a little of everything.
    base = make_body()
    train(base, [nn.Linear(32, 3), nn.Linear(32, 3)], images[:300], [shapes[:300], colours[:300]], steps=30)

    # 2. One expert a task: a body fine-tuned from the base, under a head of its own.
    experts, heads = {}, {}
    for name, (target, _) in targets.items():
        experts[name], heads[name] = make_body(), nn.Linear(32, 3)
        experts[name].load_state_dict(base.state_dict())
        train(experts[name], [heads[name]], images, [target], steps=120)

    # 3. Merge the bodies. `model` says how the network is made, `head` what follows it for a task.
    tasks = [
        am.module_task(
            name, list(unlabeled), labelled(test, targets[name][1]), model=make_body, head=heads[name]
        )
        for name in experts
    ]
    result = am.adapt(base, experts, tasks, preset="recommended", steps=20)

    print("percent right on test    " + "   ".join(f"{name:>6}" for name in experts))
    for label, models in {
        "base": dict.fromkeys(experts, base),
        "each its own expert": experts,
        "one merged network": {each.task.name: each.module for each in result.learners},
    }.items():
        scores = [score(models[name], heads[name], test, targets[name][1]) for name in experts]
        print(f"{label:<25}" + "   ".join(f"{value:6.1f}" for value in scores))


def labelled(images: Tensor, labels: Tensor) -> list[tuple[Tensor, int]]:
    """Samples with their labels."""
    return list(zip(images, labels.tolist(), strict=True))


@torch.inference_mode()
def score(body: nn.Module, head: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (head(body(images)).argmax(-1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
