"""Learners → folders: train, score, write whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import UsageError
from ..output.folder import OutputFolder
from ..tasks.task import Samples
from .learner import Learner
from .loop import OnStep, Say, accuracy_on, fit, freeze, share_body, worth
from .record import RECORD, FinetuneResult, content_key
from .settings import FinetuneSettings
from .transformers_models import word_embeddings


def identify(settings: FinetuneSettings, others: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """All settings, for the record, and their key: over those that are no defaults, and others but None."""
    given = {name: value for name, value in others.items() if value is not None}
    key = content_key({**settings.model_dump(exclude_defaults=True), **given})
    return {**settings.model_dump(), **others}, key


@dataclass(frozen=True)
class Expert:
    """What becomes one folder.

    Attributes:
        out: the folder.
        settings: everything that decides the result, for the record.
        key: identifies it.
        test: labelled data to score the result on.
    """

    out: Path
    settings: Mapping[str, Any]
    key: str
    test: Samples | None = None


def train(
    make: Callable[[], Sequence[Learner]],
    experts: Sequence[Expert],
    settings: FinetuneSettings,
    *,
    device: str | None = None,
    overwrite: bool = False,
    dress: Callable[[Learner], Learner] = lambda learner: learner,
    say: Say = lambda _: None,
    on_step: OnStep = lambda step, total: None,
) -> list[FinetuneResult]:
    """Train one learner, or several over one body, and write a folder for each.

    Args:
        make: makes the learners; called once the seed is set, since heads are drawn there.
        experts: where each goes.
        settings: of the training.
        device: where to train; cuda where there is one when None.
        overwrite: replace the folders of an earlier run.
        dress: changes each learner once it is on its device and what is frozen is frozen.
        say: called with a line at every evaluation.
        on_step: called with (steps done, steps in all).

    Raises:
        OutputError: a folder exists or cannot be written.
        UsageError: settings that do not fit the model.
        NonFiniteError: the loss became NaN or infinite.
    """
    place = where(device)
    started = time.perf_counter()
    with seeded(settings.seed, place) as generator:
        learners = [_subset(each, settings, generator) for each in make()]
        for learner in learners:
            prepare_learner(learner, settings, place)
        learners = [dress(learner) for learner in learners]
        if len(learners) > 1:
            share_body(learners)
        bf16 = wants_bf16(settings.bf16, place, learners)
        history = fit(
            learners, settings, generator=generator, bf16=bf16, say=say, on_step=on_step
        )  # fmt: skip
    top = max(history, key=worth)
    size = 2 * settings.batch_size
    # All before the first is written: that takes the parameters, which may be shared, off the device.
    scores = [
        None if expert.test is None else accuracy_on(learner, expert.test, size)
        for learner, expert in zip(learners, experts, strict=True)
    ]
    results = []
    for learner, expert, score in zip(learners, experts, scores, strict=True):
        parameters = list(learner.module.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        result = FinetuneResult(
            val_accuracy=top.get("val_by_task", {}).get(learner.name, top["val_accuracy"]),
            test_accuracy=score,
            best_epoch=top["epoch"],
            epochs_run=history[-1]["epoch"],
            history=history,
            seconds=round(time.perf_counter() - started, 1),
            trained_parameters=trained,
            frozen_parameters=sum(p.numel() for p in parameters) - trained,
            settings=dict(expert.settings),
            key=expert.key,
            machine={
                "device": str(place), "threads": torch.get_num_threads(), "bf16": bf16,
                "torch": torch.__version__, "adamerging": __version__,
            },
            test_data=None if expert.test is None else expert.test.fingerprint,
        )  # fmt: skip
        write(learner, expert.out, result, overwrite=overwrite)
        results.append(result)
    return results


def write(learner: Learner, out: Path, result: FinetuneResult, *, overwrite: bool) -> None:
    """Write an expert's folder: weights, what belongs to them, and the record."""
    learner.module.to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with OutputFolder(out, overwrite=overwrite, record=RECORD) as target:
        learner.save(learner.module.eval(), target.path)
        target.write_text(RECORD, json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n")
        target.commit()


def where(device: str | None) -> torch.device:
    """The device that is named, else cuda where there is one.

    Raises:
        UsageError: no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return place


def wants_bf16(setting: Any, device: torch.device, learners: Sequence[Learner]) -> bool:
    """Whether to compute in bfloat16: as told, or where it is fast.

    Transformers are two to three times as fast on processors with instructions for it, and much slower on
    others; convolutions take twice as long on any.
    """
    if setting != "auto":
        return bool(setting)
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if any(learner.task.settings.get("kind") == "module" for learner in learners):
        return False
    has: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and has()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """Seed torch, and give it its state back in the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def prepare_learner(learner: Learner, settings: FinetuneSettings, device: torch.device) -> None:
    """Bring a learner to its device and freeze what is not to learn. Raises as `train`."""
    learner.module.to(device)
    if settings.batchnorm_momentum is not None:
        for part in learner.module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.momentum = settings.batchnorm_momentum
    if settings.channels_last:
        learner.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.lora is not None:
        if settings.freeze:
            raise UsageError("freeze and lora exclude each other: with lora the whole body is frozen")
        return
    patterns = settings.freeze
    if patterns is None:
        texts = hasattr(learner.module, "get_input_embeddings") and learner.task.costs is not None
        patterns = word_embeddings(learner.module) if texts else []
    freeze(learner, patterns)


def _subset(learner: Learner, settings: FinetuneSettings, generator: torch.Generator) -> Learner:
    count, samples = settings.max_examples, learner.train
    if count is None or count >= len(samples):
        return learner
    assert samples.labels is not None
    chosen = torch.randperm(len(samples), generator=generator)[:count].tolist()
    learner.train = Samples(
        [samples.inputs[i] for i in chosen],
        [samples.labels[i] for i in chosen],
        samples.source,
        f"{samples.fingerprint}, {count} of seed {settings.seed}",
    )
    return learner
