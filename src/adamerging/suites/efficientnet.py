"""EfficientNet-Lite0 with its ImageNet weights' layout, at 64 pixels: the model of the suite vision8.

A convolutional network with BatchNorm (arXiv 1905.11946; the Lite variant has no squeeze-and-excitation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MissingExtraError
from ..tasks.data import as_array
from ..tasks.task import Inputs

PIXELS = 64
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


def network(classes: int) -> nn.Module:
    """The network with a new head ``_fc`` for some classes; its values are random.

    Raises:
        MissingExtraError: the package with the network's code is not installed.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise MissingExtraError("efficientnet-lite-pytorch", "demo", "the suite vision8") from None
    options = {"num_classes": classes, "dropout_rate": 0.0, "drop_connect_rate": 0.0}
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", **options)
    return model


def collate(images: Sequence[Any]) -> Inputs:
    """Images ``(H, W)`` or ``(H, W, 3)``, uint8 or 0 to 255, → ``input`` (N, 3, 64, 64), normalised."""
    planes = [as_array(image) for image in images]
    stacked = np.stack([np.stack([plane] * 3, -1) if plane.ndim == 2 else plane for plane in planes])
    values = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255
    values = nn.functional.interpolate(values, (PIXELS, PIXELS), mode="bilinear", align_corners=False)
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    return {"input": ((values - mean) / deviation).contiguous(memory_format=torch.channels_last)}


def forward(module: nn.Module, inputs: Inputs) -> Tensor:
    """Logits ``(N, classes)``."""
    logits: Tensor = module(inputs["input"].to(memory_format=torch.channels_last))
    return logits
