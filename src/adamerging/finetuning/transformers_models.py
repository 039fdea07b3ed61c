"""Models of transformers with a new head over a base: how they are made and saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UsageError, WeightsError
from ..tasks.huggingface import configuration, processor_folder, quiet, read_json, tokenizer_of
from ..tasks.image_classification import Pixels
from ..tasks.task import Inputs, Samples, Task
from ..tasks.text_classification import FixedHead, Tokenised, pooling_of
from ..weights.source import Weights
from .heads import about_head
from .learner import Learner, copies
from .lora import adapted, save_adapter
from .settings import FinetuneSettings

Save = Callable[[nn.Module, Path], None]


def text_learner(
    name: str,
    base: Weights,
    train: Samples,
    val: Samples,
    label_names: Sequence[str],
    settings: FinetuneSettings,
) -> Learner:
    """A sequence classifier: the base under a new head."""
    module, head = _classifier(transformers.AutoModelForSequenceClassification, base, label_names)
    tokenizer = tokenizer_of(base, base)
    texts = Tokenised(name, tokenizer, settings.max_length, remember=len(train) + len(val))
    texts.bind(base, base, module)
    module, head = _maybe_adapted(module, head, settings, base, "SEQ_CLS")
    task = Task(name, copies(module), _logits, texts.collate, costs=texts.costs)
    return Learner(task, module, head, train, val, label_names, _saver(tokenizer.save_pretrained))


def embedding_learner(
    name: str,
    base: Weights,
    train: Samples,
    val: Samples,
    label_names: Sequence[str],
    settings: FinetuneSettings,
    weight: Tensor,
) -> Learner:
    """A sentence encoder under a head ``(classes, width)`` that stays as it is.

    Raises:
        UsageError: the head does not fit the classes or the encoder.
        WeightsError: transformers does not know the base.
    """
    configuration(base)
    with quiet():
        module, info = transformers.AutoModel.from_pretrained(str(_folder(base)), output_loading_info=True)
    if any(key.startswith("pooler.") for key in info["missing_keys"]):
        module.pooler = None  # drawn at random, of no use to the head, and no tensor of the base's
    module = module.float()
    width = int(module.config.hidden_size)
    if weight.shape[0] != len(label_names):
        raise UsageError(
            f"task '{name}': the head has {weight.shape[0]} rows but there are {len(label_names)} labels"
        )
    if weight.shape[1] != width:
        raise UsageError(f"task '{name}': the head is {weight.shape[1]} wide but the encoder {width}")
    fixed = FixedHead(weight, pooling_of(base, base))
    tokenizer = tokenizer_of(base, base)
    texts = Tokenised(name, tokenizer, settings.max_length, remember=len(train) + len(val))
    texts.bind(base, base, module)
    module, head = _maybe_adapted(module, frozenset(), settings, base, None)

    def beside(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        copy_sentence_layout(_folder(base), folder)
        (folder / "heads").mkdir()
        about = about_head(label_names, fixed.pooling)
        save_file({"weight": weight.contiguous()}, folder / "heads" / f"{name}.safetensors", about)

    task = Task(name, copies(module), fixed.logits, texts.collate, costs=texts.costs)
    return Learner(task, module, head, train, val, label_names, _saver(beside))


def image_learner(
    name: str,
    base: Weights,
    train: Samples,
    val: Samples,
    label_names: Sequence[str],
    settings: FinetuneSettings,
) -> Learner:
    """An image classifier: the base under a new head."""
    module, head = _classifier(transformers.AutoModelForImageClassification, base, label_names)
    pixels = Pixels(name, None)
    pixels.bind(base, base, module.config)
    module, head = _maybe_adapted(module, head, settings, base, None)

    def beside(folder: Path) -> None:
        found = processor_folder(base, base)
        if found is not None:
            shutil.copy(found / "preprocessor_config.json", folder)

    task = Task(name, copies(module), _logits, pixels.collate)
    return Learner(task, module, head, train, val, label_names, _saver(beside))


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def word_embeddings(module: nn.Module) -> list[str]:
    """Names of the input embeddings of a text model.

    They are half of a small encoder, a task's texts touch a fraction of the rows, and a merge would average
    rows that most experts never saw. So they are frozen unless told otherwise.
    """
    found: Any = module.get_input_embeddings()  # type: ignore[operator]
    return [name for name, p in module.named_parameters() if p is getattr(found, "weight", None)]


def copy_sentence_layout(base: Path, out: Path) -> None:
    """Keep what makes a folder a sentence-transformers one: its modules and their settings."""
    modules = read_json(base / "modules.json")
    if not isinstance(modules, list):
        return
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    for module in modules:
        path = str(module.get("path") or "")
        if path and ".." not in path and (base / path).is_dir():
            shutil.copytree(base / path, out / path)


def _classifier(auto: Any, base: Weights, label_names: Sequence[str]) -> tuple[Any, frozenset[str]]:
    """A model with a new head, and the names of the head's parameters.

    The pooler of a BERT classifier belongs to the body: it starts from the base's weights in every expert,
    so its task vector means what every other tensor's does. Where the base has none, it is part of the head.
    """
    folder = _folder(base)
    configuration(base)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(str(folder))
        config.num_labels = len(label_names)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: index for index, label in enumerate(label_names)}
        config.problem_type = "single_label_classification"
        try:
            module, info = auto.from_pretrained(
                str(folder), config=config, ignore_mismatched_sizes=True, output_loading_info=True
            )
        except ValueError as error:
            reason = str(error).splitlines()[0]
            if "Unrecognized configuration class" in reason:
                reason = f"transformers has no {auto.__name__} for the model type '{config.model_type}'"
            raise WeightsError(f"{base.label} cannot be the base of a classifier: {reason}") from None
    prefix = f"{module.base_model_prefix}."
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    names = (name for name, _ in module.named_parameters())
    head = frozenset(name for name in names if name in new or not name.startswith(prefix))
    return module.float(), head


def _maybe_adapted(
    module: Any, head: frozenset[str], settings: FinetuneSettings, base: Weights, task_type: str | None
) -> tuple[Any, frozenset[str]]:
    if settings.lora is None:
        return module, head
    return adapted(module, head, settings.lora, base=str(_folder(base)), task_type=task_type)


def _saver(beside: Callable[[Path], Any]) -> Save:
    """Save a model as transformers or peft do, and what belongs beside it."""

    def save(module: Any, folder: Path) -> None:
        if hasattr(module, "peft_config"):
            save_adapter(module, folder)
            whole = module.get_base_model()  # the adapter's own files do not name the classes
            whole.config.architectures = [type(whole).__name__]
            whole.config.save_pretrained(str(folder))
        else:
            with quiet():
                module.save_pretrained(str(folder))
        beside(folder)

    return save


def _folder(base: Weights) -> Path:
    if base.folder is None:
        raise WeightsError(
            f"{base.label} has no config.json, so it is no model of transformers; give the whole folder, "
            "or a task of kind module"
        )
    return base.folder
