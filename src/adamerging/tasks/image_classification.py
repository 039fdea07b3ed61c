"""Image classification with transformers: what the expert's processor makes of an image goes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ..errors import UsageError
from ..weights.source import Weights
from .data import Fields, read_task_data
from .huggingface import classifier, load_from, processor_folder
from .labels import class_names, settle
from .pictures import open_image
from .task import Inputs, Task


def image_task(
    name: str,
    adapt: Any = None,
    evaluate: Any = None,
    *,
    image_field: str | None = None,
    label_field: str | None = None,
    label_names: Sequence[str] | None = None,
    processor: Any = None,
) -> Task:
    """A task whose expert is an image classifier of transformers, or a LoRA adapter with its head.

    Args:
        name: the same as its expert's.
        adapt: unlabeled images: uint8 arrays (H, W), (H, W, C) or (C, H, W), PIL images or files; see
            `read_columns` for what data may be.
        evaluate: labelled images.
        image_field: column (or npz array) of the images; guessed from common names.
        label_field: column of the label; guessed.
        label_names: class names by number, where data has names and the model does not.
        processor: an image processor, or a folder with one; the expert's by default, else the base's, else
            images are resized to the configuration's ``image_size`` and scaled to [-1, 1].

    Raises:
        UsageError: the data cannot be what it is given as.
        MissingExtraError: a package of the ``data`` extra is needed.
    """
    fields = Fields(image_field, label_field)
    unlabeled, labelled = read_task_data(name, adapt, evaluate, "image", fields, label_names)
    pixels = Pixels(name, processor)

    def skeleton(expert: Weights, base: Weights) -> nn.Module:
        module = classifier(transformers.AutoModelForImageClassification, expert, base, name)
        pixels.bind(expert, base, module.config)
        names = label_names or class_names(module.config.to_dict())  # type: ignore[union-attr, operator]
        settle(name, unlabeled, labelled, int(module.config.num_labels), names)  # type: ignore[union-attr, arg-type]
        return module

    named = {"image_field": image_field, "label_field": label_field}
    return Task(
        name=name,
        skeleton=skeleton,
        forward=lambda module, inputs: module(**inputs).logits,
        collate=pixels.collate,
        adapt=unlabeled,
        evaluate=labelled,
        label_names=label_names,
        settings={"kind": "image", **{key: value for key, value in named.items() if value is not None}},
    )


class Pixels:
    """Images → ``pixel_values``, by the processor that belongs to the model."""

    def __init__(self, task: str, processor: Any) -> None:
        self.task = task
        given = (
            load_from(transformers.AutoImageProcessor, Path(processor)) if _is_path(processor) else processor
        )
        self._given = given
        self._process: Callable[[list[Any]], Tensor] | None = None if given is None else _by(given)
        self._mode = "RGB"

    def bind(self, expert: Weights, base: Weights, config: Any) -> None:
        """Take the processor that belongs to a model, unless one was given."""
        self._mode = {1: "L", 4: "RGBA"}.get(getattr(config, "num_channels", 3), "RGB")
        if self._given is not None:
            return
        folder = processor_folder(expert, base)
        if folder is not None:
            self._process = _by(load_from(transformers.AutoImageProcessor, folder))
        else:
            self._process = _plain(config)

    def collate(self, inputs: Sequence[Any]) -> Inputs:
        """Pixels of some images. Raises `UsageError` where no processor is known yet, or one is no image."""
        if self._process is None:
            raise UsageError(
                f"task '{self.task}' has no image processor yet: it comes with the expert. Build the model "
                "first (task.skeleton), or pass processor="
            )
        try:
            images = [open_image(value, self._mode) for value in inputs]
        except UsageError as error:
            raise UsageError(f"task '{self.task}': {error}") from None
        return {"pixel_values": self._process(images)}


def _by(processor: Any) -> Callable[[list[Any]], Tensor]:
    return lambda images: processor(images, return_tensors="pt")["pixel_values"].float()


def _plain(config: Any) -> Callable[[list[Any]], Tensor]:
    """Resize and scale by the configuration alone."""
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def process(images: list[Any]) -> Tensor:
        planes = []
        for image in images:
            array = np.array(image if image.size == (width, height) else image.resize((width, height), 2))
            array = array[:, :, None] if array.ndim == 2 else array
            planes.append(torch.from_numpy(array).permute(2, 0, 1))
        return torch.stack(planes).float() / 127.5 - 1.0

    return process


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path)
