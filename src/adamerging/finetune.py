"""Fine-tune one expert: a base folder and labelled texts in, a Hugging Face folder out.

Two kinds of head:

* **trained** (the default): an ordinary ``...ForSequenceClassification`` folder.
* **frozen** (``frozen_head=``): the head is given, made from the label names by
  :func:`zero_shot_head`, and only the encoder learns. The folder keeps the encoder's own layout (a
  sentence-transformers folder stays one) and carries the head as ``heads/<name>.safetensors``.

The loop is our own rather than ``transformers.Trainer``: two learning rates, frozen tensors, batches of
like length and a head outside the model would each need a subclass there, and together they are short.

What is frozen is bit-identical in every expert, so its task vector is zero and the merge leaves it alone.
The word embeddings are frozen by default: they are half of a small encoder, a task's texts touch a
fraction of the rows, and a merge would average rows that most experts never saw.

The pooler of a BERT classifier (dense + tanh on the first token) belongs to the body. It starts from the
base's weights in every expert, so its task vector means what every other tensor's does.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from .errors import NonFiniteError, OutputError, UsageError

RECORD = "finetune.json"
"""Name of the record beside the weights: settings, validation accuracy by epoch, seconds."""

Batch = Mapping[str, Tensor]
Forward = Callable[[Batch], Tensor]
PathLike = str | os.PathLike[str]


class LabelledTexts(NamedTuple):
    """Texts and their label indices, of equal length."""

    texts: Sequence[str]
    labels: Sequence[int]


@dataclass(frozen=True)
class FinetuneResult:
    """What one fine-tuning did; written as ``finetune.json`` beside the weights."""

    val_accuracy: float
    best_epoch: float
    epochs_run: float
    history: list[dict[str, float]]
    seconds: float
    trained_parameters: int
    frozen_parameters: int
    settings: dict[str, Any]


def read_jsonl(path: PathLike) -> LabelledTexts:
    """Read ``{"text": str, "label": int}`` lines, gzipped if the name ends in ``.gz``."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return LabelledTexts([row["text"] for row in rows], [row["label"] for row in rows])


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the token vectors that are no padding, scaled to length one."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
    return nn.functional.normalize(mean, dim=-1)


def zero_shot_head(
    base: PathLike, prompts: Sequence[Sequence[str]], *, scale: float = 30.0, max_length: int = 64
) -> Tensor:
    """Head from label names: for each class the mean embedding of its prompts, length ``scale``.

    Args:
        base: Folder of a mean-pooling sentence encoder.
        prompts: For each class one text or more, such as a template filled with the label's name.
        scale: Logits are ``scale`` times the cosine of text and class.
        max_length: Tokens kept of a prompt.

    Returns:
        Weight ``[classes, width]``; ``mean_pool(...) @ weight.T`` are the logits.
    """
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(base))
        encoder = AutoModel.from_pretrained(str(base)).float().eval()
    rows = []
    with torch.inference_mode():
        for texts in prompts:
            batch = tokenizer(
                list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            pooled = mean_pool(encoder(**batch).last_hidden_state, batch["attention_mask"])
            rows.append(nn.functional.normalize(pooled.mean(0), dim=-1) * scale)
    return torch.stack(rows).clone()


def finetune_text(
    base: PathLike,
    train: LabelledTexts,
    val: LabelledTexts,
    out: PathLike,
    *,
    labels: Sequence[str],
    epochs: float = 2.0,
    body_lr: float = 5e-5,
    head_lr: float = 1e-3,
    batch_size: int = 32,
    max_length: int = 64,
    freeze: Sequence[str] = ("*word_embeddings*",),
    frozen_head: Tensor | None = None,
    name: str | None = None,
    seed: int = 0,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    patience: int = 2,
    max_examples: int | None = None,
    bf16: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> FinetuneResult:
    """Fine-tune a text classification expert and write it as a Hugging Face folder.

    The weights of the epoch with the best validation accuracy are kept.

    Args:
        base: Hugging Face folder or hub id of the encoder.
        train: Training texts.
        val: Validation texts; they choose the epoch.
        out: Folder to write, beside and renamed, so that it exists whole or not at all.
        labels: Label names; their number is the number of classes.
        epochs: Passes over the training texts; may be a fraction.
        body_lr: Peak learning rate of the encoder.
        head_lr: Peak learning rate of the new head.
        batch_size: Texts a step.
        max_length: Tokens kept of a text.
        freeze: Patterns of parameter names that stay bit-identical to the base.
        frozen_head: Weight ``[classes, width]`` on the normalised mean of the tokens; not trained.
        name: Name of the task, for the head's file; the folder's name by default.
        seed: Seeds the new head, the order of the texts and dropout. The global generator is restored.
        warmup: Fraction of the steps in which the learning rates rise, before they fall to zero.
        weight_decay: AdamW's, not applied to biases and norms.
        max_grad_norm: Gradients are clipped to this norm.
        patience: Stop after so many epochs without a better validation accuracy.
        max_examples: Use a random subset of the training texts, drawn by ``seed``.
        bf16: Train in bfloat16 autocast; weights, updates and evaluation stay float32. Two to three times
            as fast on processors with bf16 instructions, much slower on others.
        overwrite: Replace ``out`` if it exists.
        progress: Called with a line of text at every evaluation.

    Returns:
        The record that is also written as ``finetune.json``.

    Raises:
        OutputError: ``out`` exists and ``overwrite`` is not set.
        UsageError: Labels, head or patterns do not fit.
        NonFiniteError: The loss became NaN or infinite.
    """
    settings = {
        key: value
        for key, value in locals().items()
        if key not in {"train", "val", "out", "progress", "overwrite", "frozen_head"}
    }
    settings.update(base=str(base), labels=list(labels), freeze=list(freeze))
    settings["head"] = "trained" if frozen_head is None else "frozen"
    out = Path(out)
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; pass overwrite=True to replace it")
    for option, value in {"epochs": epochs, "batch_size": batch_size, "patience": patience}.items():
        if value <= 0:
            raise UsageError(f"{option} must be positive, not {value}")
    _check(train, "train", len(labels))
    _check(val, "val", len(labels))
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        if max_examples is not None and max_examples < len(train.texts):
            kept = torch.randperm(len(train.texts), generator=generator)[:max_examples].tolist()
            train = LabelledTexts([train.texts[i] for i in kept], [train.labels[i] for i in kept])
        tokenizer = AutoTokenizer.from_pretrained(str(base))
        model, forward, head_names = _build(base, labels, frozen_head)
        _freeze(model, freeze, head_names)
        optimizer = _optimizer(model, head_names, body_lr, head_lr, weight_decay)
        encode = _Encoded(tokenizer, train, max_length), _Encoded(tokenizer, val, max_length)
        history, best = _fit(
            model, forward, optimizer, *encode,
            epochs=epochs, batch_size=batch_size, warmup=warmup, max_grad_norm=max_grad_norm,
            patience=patience, bf16=bf16, generator=generator, progress=progress or (lambda _: None),
        )  # fmt: skip
        model.load_state_dict(best, strict=False)
        top = max(history, key=lambda row: row["val_accuracy"])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        result = FinetuneResult(
            val_accuracy=top["val_accuracy"],
            best_epoch=top["epoch"],
            epochs_run=history[-1]["epoch"],
            history=history,
            seconds=round(time.perf_counter() - started, 1),
            trained_parameters=trained,
            frozen_parameters=sum(p.numel() for p in model.parameters()) - trained,
            settings=settings,
        )
        _write(out, base, model, tokenizer, result, frozen_head, labels, name or out.name)
    return result


def text_logits(
    folder: PathLike,
    texts: Sequence[str],
    *,
    frozen_head: Tensor | None = None,
    max_length: int = 64,
    batch_size: int = 64,
) -> Tensor:
    """Logits of an expert's folder for texts, in their order; ``frozen_head`` as in training."""
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model, forward, _ = _load(folder, frozen_head)
    data = _Encoded(tokenizer, LabelledTexts(texts, [0] * len(texts)), max_length)
    return _logits(model, forward, data, batch_size)


def _check(data: LabelledTexts, which: str, classes: int) -> None:
    if len(data.texts) != len(data.labels):
        raise UsageError(f"{which}: {len(data.texts)} texts but {len(data.labels)} labels")
    if not data.texts:
        raise UsageError(f"{which} has no texts")
    low, high = min(data.labels), max(data.labels)
    if low < 0 or high >= classes:
        raise UsageError(f"{which}: label indices {low}..{high} do not fit the {classes} label names")


def _build(
    base: PathLike, labels: Sequence[str], frozen_head: Tensor | None
) -> tuple[nn.Module, Forward, frozenset[str]]:
    """Model, its logits as a function of a batch, and the names of the head's parameters."""
    if frozen_head is not None:
        if frozen_head.shape[0] != len(labels):
            raise UsageError(
                f"frozen_head has {frozen_head.shape[0]} rows but there are {len(labels)} labels"
            )
        return _load(base, frozen_head)
    config = AutoConfig.from_pretrained(str(base))
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    model = AutoModelForSequenceClassification.from_pretrained(str(base), config=config).float()
    prefix = model.base_model_prefix + "."
    head = frozenset(key for key, _ in model.named_parameters() if not key.startswith(prefix))
    return model, lambda batch: model(**batch).logits, head


def _load(folder: PathLike, frozen_head: Tensor | None) -> tuple[nn.Module, Forward, frozenset[str]]:
    if frozen_head is None:
        model = AutoModelForSequenceClassification.from_pretrained(str(folder)).float()
        return model, lambda batch: model(**batch).logits, frozenset()
    encoder = AutoModel.from_pretrained(str(folder)).float()
    width = encoder.config.hidden_size
    if frozen_head.shape[1] != width:
        raise UsageError(f"frozen_head is {frozen_head.shape[1]} wide but the encoder {width}")

    def forward(batch: Batch) -> Tensor:
        hidden = encoder(**batch).last_hidden_state.float()
        with torch.autocast("cpu", enabled=False):  # bf16 would round logits of 30 to steps of an eighth
            return mean_pool(hidden, batch["attention_mask"]) @ frozen_head.T

    return encoder, forward, frozenset()


def _freeze(model: nn.Module, patterns: Sequence[str], head: frozenset[str]) -> None:
    for pattern in patterns:
        hits = [p for key, p in model.named_parameters() if key not in head and fnmatchcase(key, pattern)]
        if not hits:
            raise UsageError(f"freeze pattern {pattern!r} matches no parameter of the body")
        for parameter in hits:
            parameter.requires_grad_(False)


def _optimizer(
    model: nn.Module, head: frozenset[str], body_lr: float, head_lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((key in head, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": head_lr if is_head else body_lr,
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
            for (is_head, is_matrix), parameters in groups.items()
        ],
        fused=True,
    )


class _Encoded:
    """Token ids of all texts, cut once; batches are padded to their own longest text."""

    def __init__(self, tokenizer: Any, data: LabelledTexts, max_length: int) -> None:
        self.rows = tokenizer(list(data.texts), truncation=True, max_length=max_length)["input_ids"]
        self.lengths = torch.tensor([len(row) for row in self.rows])
        self.labels = torch.tensor(list(data.labels))
        self.pad = int(tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> Batch:
        rows = [self.rows[i] for i in indices.tolist()]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Batches of like length in random order: sorted within stretches of 50 batches."""
        order = torch.randperm(len(self), generator=generator)
        batches: list[Tensor] = []
        for stretch in torch.split(order, 50 * batch_size):
            by_length = stretch[self.lengths[stretch].argsort(stable=True)]
            batches.extend(torch.split(by_length, batch_size))
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]

    def by_length(self, batch_size: int) -> Iterator[Tensor]:
        yield from torch.split(self.lengths.argsort(stable=True), batch_size)


def _logits(model: nn.Module, forward: Forward, data: _Encoded, batch_size: int) -> Tensor:
    model.eval()
    parts, order = [], []
    with torch.inference_mode():
        for indices in data.by_length(batch_size):
            parts.append(forward(data.batch(indices)).float())
            order.append(indices)
    logits = torch.cat(parts)
    result = torch.empty_like(logits)
    result[torch.cat(order)] = logits
    return result


def _fit(
    model: nn.Module,
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    train: _Encoded,
    val: _Encoded,
    *,
    epochs: float,
    batch_size: int,
    warmup: float,
    max_grad_norm: float,
    patience: int,
    bf16: bool,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train; return the history and the trained tensors of the best evaluation."""
    per_epoch = math.ceil(len(train) / batch_size)
    total = max(1, round(epochs * per_epoch))
    rising = max(1, round(warmup * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (total - step) / max(1, total - rising))
    )
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    best_accuracy, stale, step, loss_sum, since = -1.0, 0, 0, 0.0, 0
    while step < total and stale < patience:
        for indices in train.shuffled(batch_size, generator):
            model.train()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = forward(train.batch(indices))
            loss = nn.functional.cross_entropy(logits.float(), train.labels[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)
            optimizer.step()
            schedule.step()
            loss_sum, since, step = loss_sum + loss.item(), since + 1, step + 1
            if step == total:
                break
        accuracy = _accuracy(_logits(model, forward, val, 2 * batch_size), val.labels)
        row = {"epoch": step / per_epoch, "train_loss": loss_sum / since, "val_accuracy": accuracy}
        history.append(row)
        progress(f"epoch {row['epoch']:.2f}: loss {row['train_loss']:.4f}, val {accuracy:.4f}")
        loss_sum, since = 0.0, 0
        if not math.isfinite(row["train_loss"]):
            raise NonFiniteError(
                f"the training loss is not finite at epoch {row['epoch']:.2f}; nothing was written. "
                "Lower body_lr and head_lr, or look for weights of the base that are not finite."
            )
        if accuracy > best_accuracy:
            best_accuracy, stale = accuracy, 0
            best = {key: p.detach().clone() for key, p in trained.items()}
        else:
            stale += 1
    return history, best


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return int((logits.argmax(-1) == labels).sum()) / len(labels)


def _write(
    out: Path,
    base: PathLike,
    model: nn.Module,
    tokenizer: Any,
    result: FinetuneResult,
    frozen_head: Tensor | None,
    labels: Sequence[str],
    name: str,
) -> None:
    """Write beside ``out`` and rename, so that a folder of that name is always whole."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if frozen_head is not None:
        _copy_sentence_layout(Path(base), partial)
        (partial / "heads").mkdir()
        about = {"format": "pt", "labels": json.dumps(list(labels)), "pooling": "mean", "normalize": "true"}
        save_file({"weight": frozen_head.contiguous()}, partial / "heads" / f"{name}.safetensors", about)
    model.save_pretrained(partial)  # type: ignore[operator]
    tokenizer.save_pretrained(partial)
    (partial / RECORD).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def _copy_sentence_layout(base: Path, out: Path) -> None:
    """Keep what makes the folder a sentence-transformers one: its modules and their settings."""
    modules = base / "modules.json"
    if not modules.is_file():
        return
    shutil.copy(modules, out)
    for settings in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        if (base / settings).is_file():
            shutil.copy(base / settings, out)
    for module in json.loads(modules.read_text(encoding="utf-8")):
        if module["path"] and (base / module["path"]).is_dir():
            shutil.copytree(base / module["path"], out / module["path"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' notes about the head that is new and its progress bars."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
