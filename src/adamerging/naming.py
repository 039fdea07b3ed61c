"""What the names of tensors say: which prefix a model put before its body, where its head begins, which
names are tied, which belong to a vocabulary. Strings and shapes only; the decisions are taken in `plan`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal

Shape = tuple[int, ...]
Kind = Literal["language", "task", "unknown"]

_LANGUAGE = re.compile(r"For(CausalLM|ConditionalGeneration|MaskedLM|PreTraining)$|(LM|WithLM)Head(Model)?$")
_TASK = re.compile(r"[a-z0-9]For[A-Z]\w*$|DoubleHeadsModel$")

# First component of the name once prefixes are gone, so `layer1.se.fc.weight` and `fc1.weight` are no heads.
DEFAULT_HEADS = (
    "classifier",
    "classifiers",
    "pre_classifier",
    "aux_classifier",
    "classification_head",
    "multiple_choice_head",
    "mlp_head",
    "head",
    "heads",
    "head_dist",
    "fc",
    "_fc",
    "last_linear",
    "score",
    "qa_outputs",
    "logits",
    "logits_proj",
    "AuxLogits",
    "value_head",
    "v_head",
)

_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|shared|embed_in|tok_embeddings|token_embedding)\.weight$"
)
_OUTPUT = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|lm_loss|proj_out|vocab_projector|generator_lm_head"
    r"|(predictions|lm_head)\.decoder)\.weight$"
)
_VOCABULARY_BIAS = re.compile(
    r"(^|\.)(lm_head|embed_out|lm_loss|vocab_projector|generator_lm_head|predictions)(\.decoder)?\.bias$"
)
# Buffers that models compute for themselves; old files carry them, new ones do not.
_RECOMPUTED = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|token_type_ids)$")
_POOLER = re.compile(r"(^|\.)pooler\.")
_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")


def architecture(config: Mapping[str, Any] | None) -> str | None:
    """The model class that ``config.json`` names first, where there is one."""
    names = (config or {}).get("architectures")
    return str(names[0]) if isinstance(names, (list, tuple)) and names else None


def kind(name: str | None) -> Kind:
    """Whether a class name means a language model, a model with a task's head, or tells neither."""
    if name is None:
        return "unknown"
    if _TASK.search(name) and not re.search(
        r"For(CausalLM|ConditionalGeneration|MaskedLM|PreTraining)$", name
    ):
        return "task"
    return "language" if _LANGUAGE.search(name) else "unknown"


@lru_cache(maxsize=64)
def class_prefix(name: str) -> str | None:
    """``base_model_prefix`` of a class that transformers knows, with its dot; else None (imports it)."""
    import transformers

    try:
        prefix = getattr(getattr(transformers, name), "base_model_prefix", "")
    except (AttributeError, ImportError, RuntimeError):  # not its class, or one whose backend is missing
        return None
    return f"{prefix}." if prefix else None


def ties_embeddings(config: Mapping[str, Any] | None) -> bool | None:
    """Whether the configuration ties output to input embeddings; None where it does not say."""
    config = config or {}
    for level in (config, config.get("text_config")):
        if isinstance(level, Mapping) and isinstance(level.get("tie_word_embeddings"), bool):
            return bool(level["tie_word_embeddings"])
    return None


@lru_cache(maxsize=64)
def ties_by_default(model_type: str) -> bool | None:
    """What transformers takes for this model type where the configuration is silent. Imports transformers."""
    from transformers import AutoConfig

    try:
        value = getattr(AutoConfig.for_model(model_type), "tie_word_embeddings", None)
    except Exception:  # an unknown type, or a configuration that has no defaults: it tells nothing
        return None
    return value if isinstance(value, bool) else None


def stored_names(config: Mapping[str, Any] | None) -> Mapping[str, str]:
    """What files call the tensors that transformers calls otherwise in memory, by the names in memory.

    Its releases from 5 on rename the layers of some models (ViT, BEIT, Swin, ...) on loading, and back on
    saving; an adapter's file has the names in memory. Empty where nothing is renamed, or nothing is known.
    Imports transformers.
    """
    name = architecture(config)
    if not config or name is None or not isinstance(config.get("model_type"), str):
        return {}
    return _stored_names(name, json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _stored_names(name: str, config: str) -> Mapping[str, str]:
    import torch
    import transformers

    fields = json.loads(config)
    try:
        from transformers.core_model_loading import revert_weight_conversion

        with torch.device("meta"):
            known = type(transformers.AutoConfig.for_model(fields["model_type"])).from_dict(fields)
            model = getattr(transformers, name)(known)
        held = model.state_dict()
        owners = {id(tensor): key for key, tensor in held.items()}
        # What is not the same tensor afterwards was put together or taken apart: no name stands for it.
        stored = [
            (key, owners.get(id(tensor))) for key, tensor in revert_weight_conversion(model, held).items()
        ]
    except Exception:  # not its class, another release of it, or a configuration of code of its own
        return {}
    return {key: file for file, key in stored if key is not None and key != file}


def matching(patterns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of ``patterns`` that one of ``names`` matches (`fnmatch`, case counts), or None."""
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)


def is_recomputed(name: str) -> bool:
    """A buffer that its model computes itself (``rotary_emb.inv_freq``), so a file may lack it."""
    return bool(_RECOMPUTED.search(name))


def is_statistics(name: str) -> bool:
    """A running mean or variance, as BatchNorm keeps them."""
    return bool(_STATISTICS.search(name))


def is_pooler(name: str) -> bool:
    """Part of what sums up a sequence for a head; many encoders come without one."""
    return bool(_POOLER.search(name))


def is_vocabulary(name: str) -> bool:
    """Input or output embeddings over a vocabulary, or the output's bias."""
    return any(pattern.search(name) for pattern in (_INPUT, _OUTPUT, _VOCABULARY_BIAS))


def tie_partner(name: str, shapes: Mapping[str, Shape]) -> str | None:
    """The name in ``shapes`` that ``name`` is tied to wherever its model ties embeddings, or None.

    Output to input embeddings, the ``embed_tokens`` of encoder and decoder to ``shared``, the bias of
    ``decoder`` to that of the module it sits in; always of the same shape.
    """
    shape = shapes[name]
    if name.endswith("decoder.bias"):
        candidates = [name.removesuffix("decoder.bias") + "bias"]
    elif _OUTPUT.search(name):
        candidates = [other for other in shapes if _INPUT.search(other)]
    elif re.search(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$", name):
        candidates = [other for other in shapes if re.search(r"(^|\.)shared\.weight$", other)]
    else:
        return None
    candidates = [other for other in candidates if other != name and shapes.get(other) == shape]
    # `shared` is what the others are tied to, where a model has several input embeddings.
    return min(candidates, key=lambda other: not other.endswith("shared.weight"), default=None)


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What stands before the names of the body: in the base, and in an expert. One of the two is empty."""

    base: str = ""
    expert: str = ""

    def local(self, name: str) -> str | None:
        """An expert's name without its prefix; None for a name outside it."""
        return name[len(self.expert) :] if name.startswith(self.expert) else None

    def to_base(self, name: str, known: Callable[[str], bool]) -> str | None:
        """The base's name for an expert's name, where the base has it."""
        local = self.local(name)
        candidates = ([self.base + local] if local is not None else []) + [name]
        return next((candidate for candidate in candidates if known(candidate)), None)


def _leading(names: Mapping[str, Shape], depth: int = 3) -> list[str]:
    """Prefixes of at most ``depth`` components that at least a tenth of the names share."""
    count: dict[str, int] = {}
    for name in names:
        parts = name.split(".")[:-1][:depth]
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end]) + "."
            count[prefix] = count.get(prefix, 0) + 1
    return [prefix for prefix, number in count.items() if 10 * number >= len(names)]


def _score(base: Mapping[str, Shape], expert: Mapping[str, Shape], prefixes: Prefixes) -> tuple[int, int]:
    same_name = same_shape = 0
    for name, shape in expert.items():
        if not name.startswith(prefixes.expert):
            continue
        target = prefixes.base + name[len(prefixes.expert) :]
        if target in base:
            same_name += 1
            same_shape += base[target] == shape
    return same_name, same_shape


def align(
    base: Mapping[str, Shape], expert: Mapping[str, Shape], hint: Callable[[], str | None]
) -> list[Prefixes]:
    """How an expert's names become the base's: the prefixes under which most names, then shapes, agree.

    Args:
        base: shape by name, tied names included.
        expert: the same of the expert.
        hint: gives the body's prefix by the expert's class; asked only where names leave a choice.

    Returns:
        The one answer, or several where nothing decides between them.
    """
    plain = Prefixes()
    names = _score(base, expert, plain)[0]
    if names == min(len(base), len(expert)):
        return [plain]
    candidates = [Prefixes(expert=p) for p in _leading(expert)] + [Prefixes(base=p) for p in _leading(base)]
    scores = {pair: _score(base, expert, pair) for pair in candidates}
    best = max(scores.values(), default=(0, 0))
    if best[0] <= names or 2 * best[0] < min(len(base), len(expert)):
        return [plain]
    winners = sorted((p for p, score in scores.items() if score == best), key=lambda p: (p.base, p.expert))
    if len(winners) > 1 and (known := hint()) is not None:
        winners = [p for p in winners if f".{p.base}{p.expert}".endswith(f".{known}")] or winners
    return winners


def body_of(expert: Sequence[str], prefixes: Prefixes, prefix: str) -> str | None:
    """Where the body of class prefix ``prefix`` lies among an expert's names; None where it is not found."""
    if f".{prefixes.expert}".endswith(f".{prefix}"):
        return prefixes.expert
    for candidate in (prefixes.expert + prefix, prefix):
        if any(name.startswith(candidate) for name in expert):
            return candidate
    return None


def wrapper_of(names: Sequence[str]) -> str:
    """The components before which nothing else stands in any name: ``module.``, ``model.``."""
    if not names:
        return ""
    first, *rest = (name.split(".")[:-1] for name in names)
    length = len(first)
    for parts in rest:
        length = next(
            (i for i in range(min(length, len(parts))) if parts[i] != first[i]), min(length, len(parts))
        )
    return "".join(f"{part}." for part in first[:length])


def is_default_head(local: str) -> bool:
    """Whether the first component of a name is one that heads usually bear."""
    return local.split(".")[0] in DEFAULT_HEADS


def block_template(name: str) -> str | None:
    """The name with its block numbers replaced by ``*``; None where it has none."""
    parts = name.split(".")
    if not any(part.isdigit() for part in parts):
        return None
    return ".".join("*" if part.isdigit() else part for part in parts)
