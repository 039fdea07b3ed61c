"""Zero-shot image classification: an image tower of CLIP under a head made of the names of the classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptation.cache import cached, content_of, key
from ..errors import UsageError
from ..weights.memory import open_state_dict
from ..weights.source import Spec, Weights
from .clip import image_tower, text_head, text_part
from .data import Fields, read_task_data
from .huggingface import read_json
from .image_classification import Pixels
from .labels import settle
from .prompts import Settled, fill_templates, settle_prompts
from .task import Inputs, Task
from .text_classification import read_head, scores_under

FAMILY = "checkpoint_family"
"""Key of an expert's ``config.json`` that says which family of checkpoints it is of."""
_HUB_FAMILY = "Hugging Face"


def zero_shot_image_task(
    name: str,
    adapt: Any = None,
    evaluate: Any = None,
    *,
    label_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    prompts: str | Path | None = None,
    head: Tensor | str | Path | None = None,
    image_field: str | None = None,
    label_field: str | None = None,
    processor: Any = None,
) -> Task:
    """A task whose expert is an image tower of CLIP, fine-tuned under a frozen head made by the text tower.

    Logits are the projected image embedding, scaled to length one, times the head's rows; the head carries
    CLIP's ``exp(logit_scale)``. The head is made once by the base's text tower (Radford et al. 2021, arXiv
    2103.00020) and kept in the cache. Only the image tower is merged.

    Args:
        name: the same as its expert's.
        adapt: unlabeled images; see `image_task` and `read_columns` for what they may be.
        evaluate: labelled images.
        label_names: names of the classes by number, as the prompts shall call them.
        templates: texts with ``{}`` for the class's name; ``a photo of a {}.`` by default.
        prompts: a YAML file with ``classes`` and ``templates``, in the place of these two.
        head: ``(classes, width)``, or a safetensors file with that one tensor, in the place of prompts.
        image_field: column (or npz array) of the images; guessed from common names.
        label_field: column of the label; guessed.
        processor: an image processor, or a folder with one; the base's by default.

    Raises:
        UsageError: the data, the prompts or the head cannot be what they are given as; or there are neither
            names nor a head.
        MissingExtraError: a package of the ``data`` extra is needed.
    """
    settled = settle_prompts(name, prompts, label_names, templates)
    if head is not None and (prompts is not None or templates is not None):
        raise UsageError(f"task '{name}': a head is given, so templates and prompts are of no use")
    stated = None
    if head is not None:
        head, stated = read_head(head)
    names = settled.classes or stated
    if head is None and names is None:
        raise UsageError(
            f"task '{name}': its head is made of the names of its classes, and nothing names them; give "
            "label_names, a file of prompts, or a head"
        )
    fields = Fields(image_field, label_field)
    unlabeled, labelled = read_task_data(name, adapt, evaluate, "image", fields, names)
    pixels = Pixels(name, processor)
    state = _Head(name, head, settled)
    named = {"image_field": image_field, "label_field": label_field}
    settings: dict[str, Any] = {
        "kind": "image_zero_shot", **{key: value for key, value in named.items() if value is not None},
    }  # fmt: skip
    if head is None:
        settings |= {"templates": list(settled.templates)}

    def skeleton(expert: Weights, base: Weights) -> nn.Module:
        module: Any = image_tower(expert, base)
        weight = state.bind(base)
        if weight.shape[1] != module.config.projection_dim:
            raise UsageError(
                f"task '{name}': the head is {weight.shape[1]} wide, the image embedding "
                f"{module.config.projection_dim}"
            )
        settings["head"] = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        pixels.bind(base, base, module.config)
        settle(name, unlabeled, labelled, len(weight), names)
        return module  # type: ignore[no-any-return]

    return Task(
        name=name,
        skeleton=skeleton,
        forward=state.logits,
        collate=pixels.collate,
        adapt=unlabeled,
        evaluate=labelled,
        label_names=names,
        settings=settings,
        features=embedding,
        fixed_head=lambda _, base: state.bind(base),
    )


def embedding(module: nn.Module, inputs: Inputs) -> Tensor:
    """Projected image embeddings of length one, ``(B, F)``, float32 (float64 of a float64 model)."""
    found = module(**inputs).image_embeds
    found = found if found.dtype == torch.float64 else found.float()
    with torch.autocast(found.device.type, enabled=False):
        return nn.functional.normalize(found, dim=-1)


def refuse_mixed_families(experts: Mapping[str, Weights]) -> None:
    """Experts of different families were trained by other recipes; numbers of the two do not compare.

    Raises:
        UsageError: there are two families or more among some experts; all are named.
    """
    families: dict[str, list[str]] = {}
    for name, expert in experts.items():
        families.setdefault(str((expert.config or {}).get(FAMILY, _HUB_FAMILY)), []).append(name)
    if len(families) > 1:
        shown = "; ".join(f"{family}: {', '.join(names)}" for family, names in families.items())
        raise UsageError(
            f"the experts are of {len(families)} families of checkpoints, whose numbers do not compare "
            f"({shown}); merge those of one family"
        )


class _Head:
    """The head of a task, made when the base is known."""

    def __init__(self, task: str, given: Tensor | None, prompts: Settled) -> None:
        self.task, self.prompts = task, prompts
        self._weight = given
        self._base: Weights | None = None
        self._made = given is None

    def bind(self, base: Weights) -> Tensor:
        """The head ``(classes, width)``, float32, on the CPU."""
        if self._made and (self._weight is None or self._base is not base):
            assert self.prompts.classes is not None
            self._weight = _cached_head(base, fill_templates(self.prompts.classes, self.prompts.templates))
            self._base = base
        assert self._weight is not None
        return self._weight

    def logits(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """``(images, classes)``, in float32."""
        assert self._weight is not None, "the skeleton comes first"
        return scores_under(self._weight, embedding(module, inputs))


def _cached_head(base: Weights, prompts: list[list[str]]) -> Tensor:
    """The head that these prompts give, from the cache where it is."""
    projection = base.specs.get("text_projection.weight")
    if projection is None:
        return text_head(base, prompts)  # which says what is missing
    content = content_of(open_state_dict(text_part(base)), {})
    config = dict(base.config or {})
    name = key("zero-shot head", content, config, _tokenizer(base), prompts)
    specs = {"weight": Spec((len(prompts), projection.shape[0]), torch.float32)}
    found = cached(name, specs, lambda writer: writer.write(text_head(base, prompts)))
    return found["weight"].clone()


def _tokenizer(base: Weights) -> list[Any]:
    """What the base's tokenizer is made of."""
    if base.folder is None:
        return []
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    merges = base.folder / "merges.txt"
    text = merges.read_text(encoding="utf-8") if merges.is_file() else None
    return [read_json(base.folder / name) for name in names] + [text]
