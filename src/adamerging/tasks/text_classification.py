"""Text classification: transformers' sequence classifiers; sentence encoders under a fixed linear head."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UsageError, WeightsError
from ..weights.source import Weights
from .data import Fields, read_task_data
from .huggingface import classifier, encoder, load_from, quiet, read_json, tokenizer_of
from .labels import class_names, settle
from .task import Inputs, Samples, Task

Pooling = Literal["mean", "cls"]


def text_task(
    name: str,
    adapt: Any = None,
    evaluate: Any = None,
    *,
    max_length: int | None = None,
    text_field: str | None = None,
    label_field: str | None = None,
    pair_field: str | None = None,
    label_names: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> Task:
    """A task whose expert is a sequence classifier of transformers, or a LoRA adapter with its head.

    Args:
        name: the same as its expert's.
        adapt: unlabeled texts; see `read_columns` for what data may be.
        evaluate: labelled texts.
        max_length: tokens kept of a text; by default what the expert was trained with, where its folder
            says so, else what the model can take.
        text_field: column of the text; guessed from common names.
        label_field: column of the label; guessed.
        pair_field: column of a second text, for pairs.
        label_names: class names by number, where data has names and the model does not.
        tokenizer: a tokenizer, or a folder with one; the expert's by default, else the base's.

    Raises:
        UsageError: the data cannot be what it is given as.
        MissingExtraError: a package of the ``data`` extra is needed.
    """
    fields = Fields(text_field, label_field, pair_field)
    unlabeled, labelled = read_task_data(name, adapt, evaluate, "text", fields, label_names)
    texts = Tokenised(name, tokenizer, max_length, remember=_count(unlabeled, labelled), asked=True)
    settings = _settings("text", max_length, fields)

    def skeleton(expert: Weights, base: Weights) -> nn.Module:
        module = classifier(transformers.AutoModelForSequenceClassification, expert, base, name)
        settings["max_length"] = texts.bind(expert, base, module)
        names = label_names or class_names(module.config.to_dict())  # type: ignore[union-attr, operator]
        settle(name, unlabeled, labelled, int(module.config.num_labels), names)  # type: ignore[union-attr, arg-type]
        return module

    return Task(
        name=name,
        skeleton=skeleton,
        forward=lambda module, inputs: module(**inputs).logits,
        collate=texts.collate,
        adapt=unlabeled,
        evaluate=labelled,
        costs=texts.costs,
        label_names=label_names,
        settings=settings,
    )


def embedding_text_task(
    name: str,
    adapt: Any = None,
    evaluate: Any = None,
    *,
    head: Tensor | str | Path | None = None,
    max_length: int | None = None,
    text_field: str | None = None,
    label_field: str | None = None,
    label_names: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> Task:
    """A task whose expert is a sentence encoder under a fixed linear head, as in zero-shot classification.

    Logits are the pooled, normalised embedding times the head's rows; the head carries its scale.

    Args:
        name: the same as its expert's.
        adapt: unlabeled texts; see `read_columns` for what data may be.
        evaluate: labelled texts.
        head: ``(classes, width)``, or a safetensors file with that one tensor; by default
            ``heads/<name>.safetensors`` in the expert's folder.
        max_length: as for `text_task`.
        text_field: column of the text; guessed from common names.
        label_field: column of the label; guessed.
        label_names: class names by number; by default those that the head's file states.
        tokenizer: as for `text_task`.

    Raises:
        UsageError: the data or the head cannot be what it is given as.
        MissingExtraError: a package of the ``data`` extra is needed.
    """
    fields = Fields(text_field, label_field)
    unlabeled, labelled = read_task_data(name, adapt, evaluate, "text", fields, label_names)
    texts = Tokenised(name, tokenizer, max_length, remember=_count(unlabeled, labelled), asked=True)
    settings = _settings("text_embedding", max_length, fields)
    state = FixedHead()

    def own_head(expert: Weights) -> tuple[Tensor, list[str] | None]:
        return read_head(head if head is not None else _head_file(expert, name))

    def skeleton(expert: Weights, base: Weights) -> nn.Module:
        module = encoder(expert, base)
        weight, stated = own_head(expert)
        width = int(module.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if weight.shape[1] != width:
            raise UsageError(f"task '{name}': the head is {weight.shape[1]} wide, the encoder {width}")
        state.head, state.pooling = weight, pooling_of(expert, base)
        settings["head"] = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        settings["max_length"] = texts.bind(expert, base, module)
        settle(name, unlabeled, labelled, len(weight), label_names or stated)
        return module

    return Task(
        name=name,
        skeleton=skeleton,
        forward=state.logits,
        collate=texts.collate,
        adapt=unlabeled,
        evaluate=labelled,
        costs=texts.costs,
        label_names=label_names,
        settings=settings,
        features=state.embedding,
        fixed_head=lambda expert, _: own_head(expert)[0],
    )


def read_head(source: Tensor | str | Path) -> tuple[Tensor, list[str] | None]:
    """A linear head ``(classes, width)`` in float32, and the names of its classes where the file states them.

    Raises:
        UsageError: not one finite matrix.
        WeightsError: the file cannot be read.
    """
    names = None
    if isinstance(source, Tensor):
        head, where = source.detach().clone(), "head"
    else:
        where = str(source)
        try:
            with safe_open(where, "pt") as file:
                keys = list(file.keys())
                labels = (file.metadata() or {}).get("labels")
                head = file.get_tensor(keys[0]) if len(keys) == 1 else torch.empty(0)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"the head {where} cannot be read: {error}") from None
        names = _names(labels)
    if head.ndim != 2 or not head.is_floating_point() or not bool(torch.isfinite(head).all()):
        raise UsageError(f"{where} must hold one finite matrix (classes, width), got {list(head.shape)}")
    return head.float(), names


class Tokenised:
    """Texts → token ids, each text once.

    Args:
        task: for messages.
        tokenizer: a tokenizer or a folder with one; found beside the model when None.
        max_length: tokens kept of a text; found when None.
        remember: how many texts to keep the tokens of: those that come again.
        asked: refuse a max_length that the model has no positions for, instead of keeping what it has.
    """

    def __init__(
        self, task: str, tokenizer: Any, max_length: int | None, remember: int = 0, asked: bool = False
    ) -> None:
        self.task, self.max_length, self.remember, self.asked = task, max_length, remember, asked
        self.given = (
            load_from(transformers.AutoTokenizer, Path(tokenizer)) if _is_path(tokenizer) else tokenizer
        )
        self._tokenizer: Any = None
        self._limit = 0
        self._folder: object = None
        self._rows: dict[Any, dict[str, list[int]]] = {}
        self._recent: dict[Any, dict[str, list[int]]] = {}  # texts whose costs were asked for last

    def bind(self, expert: Weights, base: Weights, module: Any) -> int:
        """Take the tokenizer that belongs to a model, and check that it does; the tokens kept of a text."""
        limit, most = self.max_length or _trained_length(expert, base), _most_tokens(module)
        if self.asked and most is not None and self.max_length is not None and self.max_length > most:
            raise UsageError(
                f"task '{self.task}': max_length (={self.max_length}) is more than the {most} tokens that "
                f"{expert.label} has positions for"
            )
        tokenizer = self.given or (
            self._tokenizer if self._folder == expert.folder and self._folder else tokenizer_of(expert, base)
        )
        limit = limit or _model_length(tokenizer, module.config)
        limit = limit if most is None else min(limit, most)
        if tokenizer is not self._tokenizer or limit != self._limit:
            self._rows.clear()
            self._recent.clear()
        self._tokenizer, self._limit, self._folder = tokenizer, limit, expert.folder
        vocabulary = module.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > vocabulary:
            highest = max(tokenizer.get_vocab().values(), default=0)
            if highest >= vocabulary:
                raise UsageError(
                    f"task '{self.task}': the tokenizer knows ids up to {highest}, the model only "
                    f"{vocabulary}: it belongs to another model"
                )
        # Classifiers on decoders look for the last token that is no padding.
        if getattr(module.config, "pad_token_id", None) is None:
            module.config.pad_token_id = _padding(tokenizer)
        return limit

    def costs(self, samples: Samples) -> list[int]:
        """Number of tokens of each sample."""
        rows = self._encode(samples.inputs)
        self._recent = {
            text: row for text, row in zip(samples.inputs, rows, strict=True) if text not in self._rows
        }
        return [len(row["input_ids"]) for row in rows]

    def collate(self, inputs: Sequence[Any]) -> Inputs:
        """Token ids of some texts, padded to the longest."""
        rows = self._encode(inputs)
        width = max(len(row["input_ids"]) for row in rows)
        left = self._tokenizer.padding_side == "left"
        fill = {
            "input_ids": _padding(self._tokenizer),
            "token_type_ids": self._tokenizer.pad_token_type_id,
        }
        batch = {key: torch.full((len(rows), width), fill.get(key, 0)) for key in rows[0]}
        for index, row in enumerate(rows):
            for key, values in row.items():
                place = slice(width - len(values), width) if left else slice(0, len(values))
                batch[key][index, place] = torch.tensor(values)
        return batch

    def _encode(self, inputs: Sequence[Any]) -> list[dict[str, list[int]]]:
        if self._tokenizer is None:
            if self.given is None:
                raise UsageError(
                    f"task '{self.task}' has no tokenizer yet: it comes with the expert. Build the model "
                    "first (task.skeleton), or pass tokenizer="
                )
            self._tokenizer = self.given
            self._limit = self.max_length or _model_length(self.given, None)
        found = {text: self._rows.get(text) or self._recent.get(text) for text in inputs}
        new = [text for text, row in found.items() if row is None]
        if new:
            pairs = isinstance(new[0], tuple)
            columns = [[text[side] for text in new] for side in (0, 1)] if pairs else [new]
            with quiet():
                encoded = self._tokenizer(*columns, truncation=True, max_length=self._limit)
            fresh = {
                text: {key: values[index] for key, values in encoded.items()}
                for index, text in enumerate(new)
            }
            if len(self._rows) + len(fresh) <= self.remember:
                self._rows.update(fresh)
            found.update(fresh)
        return [row for text in inputs if (row := found[text]) is not None]


@dataclass
class FixedHead:
    """Head ``(classes, width)`` and pooling; known once the expert is."""

    head: Tensor | None = None
    pooling: Pooling = "mean"

    def logits(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """``(texts, classes)``, in float32."""
        assert self.head is not None, "the skeleton comes first"
        return scores_under(self.head, self.embedding(module, inputs))

    def embedding(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """Pooled and of length one, ``(B, F)``."""
        hidden = module(**inputs).last_hidden_state
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return pool(hidden, inputs["attention_mask"], self.pooling)


def scores_under(head: Tensor, embedding: Tensor) -> Tensor:
    """Embeddings ``(B, F)`` times the rows of a head ``(C, F)``, in full precision: ``(B, C)``."""
    # bf16 would round logits of 30 to steps of an eighth
    with torch.autocast(embedding.device.type, enabled=False):
        return embedding @ head.to(embedding).T


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector of length one a text, from its first token or from the mean of all."""
    if pooling == "cls":
        return nn.functional.normalize(hidden[:, 0], dim=-1)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
    return nn.functional.normalize(mean, dim=-1)


def pooling_of(expert: Weights, base: Weights) -> Pooling:
    """How a sentence-transformers folder pools; mean where nothing says otherwise."""
    for weights in (expert, base):
        if weights.folder is None:
            continue
        for root in (weights.folder, weights.folder.parent):
            modules = read_json(root / "modules.json")
            if isinstance(modules, list):
                return pooling_in(root, modules)
    return "mean"


def pooling_in(root: Path, modules: list[Mapping[str, Any]]) -> Pooling:
    """How a sentence-transformers folder pools. Raises `UsageError` for ways that are not supported."""
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    odd = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if odd:
        raise UsageError(f"{root}: its module {', '.join(odd)} is not supported in a text_embedding task")
    for kind, module in zip(kinds, modules, strict=True):
        if kind == "Pooling":
            found = read_json(root / str(module.get("path", "")) / "config.json") or {}
            on = [key for key, value in found.items() if key.startswith("pooling_mode_") and value is True]
            mode = str(found.get("pooling_mode", "mean" if not on else ""))
            if mode == "mean" or on == ["pooling_mode_mean_tokens"]:
                return "mean"
            if mode == "cls" or on == ["pooling_mode_cls_token"]:
                return "cls"
            raise UsageError(f"{root}: it pools by {mode or ', '.join(on)}; only mean and cls are supported")
    return "mean"


def _head_file(expert: Weights, name: str) -> Path:
    path = (expert.folder or Path()) / "heads" / f"{name}.safetensors"
    if expert.folder is None or not path.is_file():
        raise WeightsError(
            f"task '{name}': {expert.label} has no heads/{name}.safetensors; pass head=, a matrix "
            "(classes, width) or a safetensors file with one"
        )
    return path


def _names(labels: str | None) -> list[str] | None:
    try:
        found = json.loads(labels) if labels else None
    except ValueError:
        return None
    return [str(label) for label in found] if isinstance(found, list) else None


def _trained_length(expert: Weights, base: Weights) -> int | None:
    """The number of tokens that the expert was trained with, where its folder (else the base's) says so."""
    for weights in (expert, base):
        if weights.folder is None:
            continue
        record = read_json(weights.folder / "finetune.json")
        length = record.get("settings", {}).get("max_length") if isinstance(record, dict) else None
        sentence = read_json(weights.folder / "sentence_bert_config.json")
        if length is None and isinstance(sentence, dict) and weights is expert:
            length = sentence.get("max_seq_length")
        if isinstance(length, int) and length > 0:
            return length
    return None


def _positions(config: Any) -> Any:
    """How many positions a configuration speaks of; None where it does not."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and re.search("roberta|camembert|mpnet", str(config.model_type)):
        positions -= 2  # their positions count from behind the padding id
    return positions


def _most_tokens(module: nn.Module) -> int | None:
    """The tokens that a model with a table of positions can take; None for one that does without a table."""
    tables = [name for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    bound = any(re.search(r"position|\bwpe$", name) for name in tables)
    return (_positions(module.config) or None) if bound else None


def _model_length(tokenizer: Any, config: Any) -> int:
    lengths = [tokenizer.model_max_length, _positions(config)]
    return min(
        (int(length) for length in lengths if isinstance(length, int) and 0 < length < 10**6), default=512
    )


def _count(*splits: Samples | None) -> int:
    return sum(len(split) for split in splits if split is not None)


def _padding(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def _settings(kind: str, max_length: int | None, fields: Fields) -> dict[str, Any]:
    named = {"text_field": fields.input, "label_field": fields.label, "pair_field": fields.pair}
    given = {"max_length": max_length, **named}
    return {"kind": kind, **{key: value for key, value in given.items() if value is not None}}


def _is_path(tokenizer: Any) -> bool:
    return isinstance(tokenizer, str | Path)
