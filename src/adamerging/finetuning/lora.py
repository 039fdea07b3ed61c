"""A LoRA adapter around a model in training (peft)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import MissingExtraError, UsageError
from .settings import LoraSettings


def adapted(
    module: nn.Module, head: Iterable[str], settings: LoraSettings, *, base: str, task_type: str | None
) -> tuple[nn.Module, frozenset[str]]:
    """Wrap a model: the body learns a low-rank change, the head is trained whole and saved along.

    Args:
        module: the model; changed in place, as peft does.
        head: names of the head's parameters.
        settings: rank and so on.
        base: what the adapter's configuration calls its base.
        task_type: peft's name of the task, such as ``SEQ_CLS``.

    Returns:
        The wrapped model, and the names of the head's parameters in it.

    Raises:
        MissingExtraError: peft is not installed.
        UsageError: no layer of the model is called as the targets are.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtraError("peft", "lora", "training a LoRA adapter") from None
    owners = sorted({name.rpartition(".")[0] for name in head})
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        modules_to_save=owners or None,
        task_type=task_type,
    )
    try:
        with warnings.catch_warnings():  # of transformers, to peft: it asks by a name that is out of date
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            wrapped: Any = get_peft_model(module, config)
    except ValueError as error:
        raise UsageError(
            f"lora: {error}; give lora.targets, ends of the names of the layers to adapt"
        ) from None
    wrapped.peft_config["default"].base_model_name_or_path = base
    names = (name for name, p in wrapped.named_parameters() if p.requires_grad)
    return wrapped, frozenset(name for name in names if ".modules_to_save." in name)


def save_adapter(module: nn.Module, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
    module.save_pretrained(str(folder))  # type: ignore[operator]
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
