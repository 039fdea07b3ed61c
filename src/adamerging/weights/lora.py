"""PEFT LoRA adapters, kept as their two factors: ``change = scale · left @ right``, never multiplied out.

The scaling rules are those of PEFT (``tuners/lora/layer.py``, ``tuners/lora/model.py``): alpha / r, or
alpha / √r with rsLoRA, both looked up in ``rank_pattern`` and ``alpha_pattern`` by module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import naming
from ..errors import WeightsError
from .folder import PREFERRED, read_config, read_json_object
from .formats import open_file
from .source import Factors, Spec, Weights

T = TypeVar("T")
CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")

MERGE_FIRST = (
    "In the environment that made it, merge it into its base "
    "(`model.merge_and_unload().save_pretrained(folder)`) and give that folder as the expert."
)

# Options of LoraConfig whose change of the weights is not `scale · B @ A`: key → its name in messages.
REFUSED_OPTIONS: Mapping[str, str] = {
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "a bias inside LoRA (lora_bias)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "use_qalora": "QALoRA (use_qalora)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing (arrow_config)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "kasa_config": "KaSA (kasa_config)",
    "layer_replication": "replicated layers (layer_replication)",
    "trainable_token_indices": "trainable tokens (trainable_token_indices)",
}

# Initialisations that leave the base as it was, so that B @ A is the whole change. Others change the base.
PLAIN_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
INIT_NAMES: tuple[tuple[str, str], ...] = (
    ("pissa", "PiSSA"),
    ("olora", "OLoRA"),
    ("corda", "CorDA"),
    ("loftq", "LoftQ"),
    ("lora_ga", "LoRA-GA"),
)

# Tensor names that no supported option writes: what ends so → its name in messages. First match wins.
FOREIGN_TENSORS: tuple[tuple[str, str], ...] = (
    # PEFT adds the change of the out-projection twice, in training too (peft PR 3774); releases will differ.
    (r"\.base_layer\.out_proj\.lora_[AB](\..+)?", "LoRA on nn.MultiheadAttention"),
    (r"\.lora_magnitude_vector(\..+)?", "DoRA (lora_magnitude_vector)"),
    (r"\.lora_B(\.[^.]+)?\.bias", "a bias inside LoRA (lora_bias)"),
    (r"\.trainable_tokens_delta(\..+)?", "trainable tokens"),
    (r"\.lora_E(\..+)?", "AdaLoRA"),
    (r"\.lora_(?!(embedding_)?[AB](\.|$))[^.]+(\..+)?", "a kind of LoRA that is not known here"),
)

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
PREFIX = "base_model.model."


@dataclass
class _Change:
    """One changed tensor: where its factors are in the file, and whether it is an embedding."""

    module: str  # as PEFT matches patterns against it
    embedding: bool
    stored: dict[str, str] = field(default_factory=dict)  # "A" or "B" → name in the file


def is_adapter(path: Path) -> bool:
    """Whether a path is a PEFT adapter: a folder with ``adapter_config.json``, or the weight file in one.

    Args:
        path: an existing path.

    Returns:
        True for an adapter.
    """
    if path.is_dir():
        return (path / CONFIG).is_file()
    return path.name in FILES and (path.parent / CONFIG).is_file()


def open_lora(path: Path, base: Weights | None = None) -> Weights:
    """A LoRA adapter as an expert that changes only what it holds.

    Args:
        path: the adapter's folder, or the weight file in it.
        base: the weights that it was trained on. From them come true shapes, and whether a weight is stored
            transposed (GPT-2's Conv1D); without them the adapter's ``fan_in_fan_out`` decides.

    Returns:
        Weights with the changed tensors in `Weights.low_rank`, and trained biases and ``modules_to_save`` as
        full tensors, under the names that they have in the model; where transformers holds the model under
        other names than its files do, under those of the files. A change of a linear layer has the shape
        (out, in), or (in, out) where the weight is stored transposed; of an embedding (rows, width); of a
        convolution (out, in, height, width), or as many dimensions as it has. Metadata has
        ``base_model_name_or_path`` as the adapter states it; ``base_model_checked`` is ``no``: nobody
        compared it to `base`, and a name would prove nothing.

    Raises:
        WeightsError: the adapter is no LoRA, or a kind of LoRA whose change is not a product of two factors
            added to the base (DoRA, PiSSA, ...): all reasons in one message; or it is damaged.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json_object(folder / CONFIG)
    _raise_all(folder, list(_refusals(config)))
    stored = open_file(_weight_file(folder, path))

    changes, full, kept_bases, problems = _classify(stored)
    _raise_all(folder, problems)
    files = _names_in_files([*changes, *full], changes, base)
    changes, full = _renamed(changes, files), _renamed(full, files)
    kept_bases = _renamed(kept_bases, files)
    _raise_all(folder, list(_misfits(changes, config, stored)), remedy="Fetch or save the adapter again.")
    flipped = _flipped(changes, stored, base, bool(config.get("fan_in_fan_out")))
    specs = {name: _spec(change, stored, name in flipped) for name, change in changes.items()}
    aliases = _tied(changes, specs, stored, flipped) if config.get("ensure_weight_tying") else {}
    guards = _guards(kept_bases, specs, stored, base, folder)

    def reader_of(name: str) -> Callable[[], Factors]:
        change, scale, guard = changes[name], scaling(changes[name].module, config), guards.get(name)

        def read() -> Factors:
            if guard is not None:
                guard()
            return _factors(change, stored, scale, name in flipped)

        return read

    return Weights(
        label=str(path),
        specs={
            **{name: spec for name, spec in specs.items() if name not in aliases},
            **{name: _stored_spec(stored, original) for name, original in full.items()},
        },
        reader=lambda name: _read(stored, full[name]),
        low_rank={name: reader_of(name) for name in changes if name not in aliases},
        aliases=aliases,
        files=(*stored.files, folder / CONFIG),  # it holds the scale of the change
        metadata={
            **stored.metadata,
            "base_model_name_or_path": str(config.get("base_model_name_or_path") or ""),
            "base_model_checked": "no",
            "modules_to_save": json.dumps(config.get("modules_to_save") or []),
            "task_type": str(config.get("task_type") or ""),
        },
        folder=folder,
        config=read_config(folder),
        notes=(*stored.notes, *_notes(config, kept_bases, base)),
    )


def scaling(module: str, config: Mapping[str, Any]) -> float:
    """What PEFT multiplies ``B @ A`` with for one module.

    Args:
        module: the module's name in the model, without PEFT's prefix.
        config: the parsed ``adapter_config.json``.

    Returns:
        alpha / r, or alpha / √r with rsLoRA.
    """
    rank = _rank(module, config)
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _rank(module: str, config: Mapping[str, Any]) -> int:
    return int(_by_pattern(config.get("rank_pattern"), module, config.get("r", 8)))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's `get_pattern_key`: the first key that matches the end of the module's name, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _refusals(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"it is a {kind or 'PEFT'} adapter; only LoRA is a low-rank change of the base's weights"
        return
    for key, name in REFUSED_OPTIONS.items():
        if config.get(key):
            yield f"it uses {name}"
    for key, value in config.items():
        if key.startswith("use_") and value is True and key not in (*REFUSED_OPTIONS, "use_rslora"):
            yield f"it uses {key}, which is not known here"
    init = str(config.get("init_lora_weights", True)).lower()
    if init not in PLAIN_INITS:
        name = next(
            (name for start, name in INIT_NAMES if init.startswith(start)), f"init_lora_weights={init}"
        )
        yield f"it was initialised by {name}, which changes the base too, so it is relative to another base"


def _raise_all(folder: Path, problems: list[str], remedy: str = MERGE_FIRST) -> None:
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems[:50])
        raise WeightsError(f"the adapter {folder} cannot be used as it is:\n{listed}\n{remedy}")


def _weight_file(folder: Path, path: Path) -> Path:
    if path.is_file():
        return path
    models = [name for name in PREFERRED if (folder / name).is_file()]
    found = [name for name in FILES if (folder / name).is_file()]
    if models:
        raise WeightsError(
            f"{folder} holds both a model ({models[0]}) and an adapter ({found[0] if found else CONFIG}). "
            "Name the file that is meant."
        )
    if not found:
        raise WeightsError(
            f"{folder} has an {CONFIG} and no {' or '.join(FILES)}. Fetch or save the adapter again."
        )
    return folder / found[0]


def _classify(stored: Weights) -> tuple[dict[str, _Change], dict[str, str], dict[str, str], list[str]]:
    """Sort the file's tensors: changes, full tensors, copies of the base under a change; and problems."""
    names = [*stored.specs, *stored.aliases]
    changes: dict[str, _Change] = {}
    full: dict[str, str] = {}
    foreign: dict[str, list[str]] = {}
    for original in names:
        name = original.removeprefix(PREFIX)
        what = next((what for ending, what in FOREIGN_TENSORS if re.search(ending + "$", name)), None)
        factor = FACTOR.fullmatch(name)
        if what:
            foreign.setdefault(what, []).append(name)
        elif factor:
            target = _unwrapped(f"{factor['module']}.weight")
            change = changes.setdefault(target, _Change(factor["module"], bool(factor["kind"])))
            change.stored[factor["side"]] = original
        elif ".original_module." not in name:
            plain = _unwrapped(name)
            if plain == name or plain not in full:  # bias="all" writes a saved module's bias twice
                full[plain] = original
    kept_bases = {name: full.pop(name) for name in list(full) if name in changes}
    problems = [f"it holds {what}: {', '.join(named[:3])}" for what, named in foreign.items()]
    if not changes and not full and not problems:
        problems.append("it holds no tensor")
    return changes, full, kept_bases, problems


def _unwrapped(name: str) -> str:
    """The name in the model, without the wrappers that PEFT puts around modules."""
    name = re.sub(r"(^|\.)base_layer\.", r"\1", name)
    return re.sub(r"(^|\.)modules_to_save\.(default\.)?", r"\1", name)


def _names_in_files(names: Iterable[str], changes: Iterable[str], base: Weights | None) -> Mapping[str, str]:
    """What the base's files call tensors that transformers has under other names in memory."""
    if base is None or all(_in_base(name, base) is not None for name in changes):
        return {}
    renamed = naming.stored_names(base.config)
    return {name: _by_part(name, renamed) for name in names if _in_base(name, base) is None}


def _renamed(by_name: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    return {names.get(name, name): value for name, value in by_name.items()}


def _by_part(name: str, names: Mapping[str, str]) -> str:
    """A name by a map of names that may have fewer or more leading parts; itself where the map lacks it."""
    lead, rest = "", name
    while rest:
        if rest in names:
            return lead + names[rest]
        first, _, rest = rest.partition(".")
        lead += f"{first}."
    longer = [(old, new) for old, new in names.items() if old.endswith(f".{name}")]
    if len(longer) != 1:
        return name
    old, new = longer[0]
    return new.removeprefix(old.removesuffix(name))


def _misfits(changes: Mapping[str, _Change], config: Mapping[str, Any], stored: Weights) -> Iterator[str]:
    """Factors that are missing, of a wrong rank, or not the two halves of one matrix."""
    for name, change in changes.items():
        missing = [side for side in "AB" if side not in change.stored]
        if missing:
            yield f"{name}: lora_{missing[0]} is missing"
            continue
        a, b = (_stored_spec(stored, change.stored[side]).shape for side in "AB")
        rank = _rank(change.module, config)
        if len(a) < 2 or len(b) < 2:
            yield f"{name}: factors of shape {list(a)} and {list(b)} are incomplete (not gathered?)"
        elif a[0] != b[1] and len(b) > 2 and a[0] % max(b[1], 1) == 0:
            yield f"{name}: LoRA on a convolution with groups has no change of the weight's own shape"
        elif a[0] != b[1]:
            yield f"{name}: factors of shape {list(a)} and {list(b)} do not belong together"
        elif a[0] != rank:
            yield f"{name}: its rank is {a[0]}, not {rank} as {CONFIG} says (r, rank_pattern)"


def _spec(change: _Change, stored: Weights, flipped: bool) -> Spec:
    a, b = (_stored_spec(stored, change.stored[side]) for side in "AB")
    shape = (b.shape[0], *a.shape[1:])
    return Spec(shape[::-1] if flipped else shape, torch.promote_types(a.dtype, b.dtype))


def _factors(change: _Change, stored: Weights, scale: float, flipped: bool) -> Factors:
    a, b = (_read(stored, change.stored[side]).flatten(1) for side in "AB")
    if a.dtype != b.dtype:
        a, b = (half.to(torch.promote_types(a.dtype, b.dtype)) for half in (a, b))
    return Factors(a.T, b.T, scale) if flipped else Factors(b, a, scale)


def _flipped(changes: Mapping[str, _Change], stored: Weights, base: Weights | None, flag: bool) -> set[str]:
    """The tensors whose weight is stored (in, out): embeddings, and Conv1D layers as GPT-2 has them.

    PEFT decides layer by layer and saves the flag of the last one. So the base's shape decides where it
    can; a square weight goes with others of its last name, then with all others, then with the flag.
    """
    flipped = {name for name, change in changes.items() if change.embedding}
    votes: dict[str, bool] = {}
    open_questions = []
    for name, change in changes.items():
        plain = _spec(change, stored, False).shape
        if change.embedding or len(plain) != 2:
            continue
        in_base = _in_base(name, base)
        if plain[0] != plain[1] and in_base in (plain, plain[::-1]):
            votes[name] = in_base == plain[::-1]
        else:
            open_questions.append(name)
    for name in open_questions:
        leaf = name.split(".")[-2:]
        alike = {vote for other, vote in votes.items() if other.split(".")[-2:] == leaf} or set(
            votes.values()
        )
        if alike.pop() if len(alike) == 1 else flag:
            flipped.add(name)
    return flipped | {name for name, vote in votes.items() if vote}


def _tied(
    changes: Mapping[str, _Change], specs: Mapping[str, Spec], stored: Weights, flipped: set[str]
) -> dict[str, str]:
    """Changes of tied layers, which PEFT trains as one and writes twice; the embedding's is kept."""
    aliases = {}
    for name, change in changes.items():
        for other in [other for other in changes if changes[other].embedding and not change.embedding]:
            if specs[name] == specs[other]:
                ours, theirs = (_factors(changes[n], stored, 1.0, n in flipped) for n in (name, other))
                if torch.equal(ours.left, theirs.left) and torch.equal(ours.right, theirs.right):
                    aliases[name] = other
    return aliases


def _in_base(name: str, base: Weights | None) -> tuple[int, ...] | None:
    """The shape that a tensor has in the base, which may have fewer or more leading name parts."""
    if base is None:
        return None
    wanted = name
    while True:
        spec = base.specs.get(base.aliases.get(wanted, wanted))
        if spec is not None:
            return spec.shape
        if wanted.count(".") <= 1:
            break
        wanted = wanted.partition(".")[2]
    longer = [spec.shape for other, spec in base.specs.items() if other.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None


def _guards(
    kept: Mapping[str, str], specs: Mapping[str, Spec], stored: Weights, base: Weights | None, folder: Path
) -> dict[str, Callable[[], None]]:
    """Checks that the copies of the base in an adapter (PEFT saves targeted embeddings) are the base's."""
    problems = []
    for name, original in kept.items():
        shape, in_base = _stored_spec(stored, original).shape, _in_base(name, base)
        if shape != specs[name].shape or in_base not in (None, shape):
            problems.append(
                f"{name}: the adapter was trained over a copy of shape {list(shape)}, "
                f"the base has {list(in_base or specs[name].shape)} (a vocabulary that was resized?)"
            )
    _raise_all(folder, problems)

    def guard_of(name: str, original: str) -> Callable[[], None]:
        def guard() -> None:
            if base is None or name not in base.specs:
                return
            ours, theirs = _read(stored, original), base.read(name)
            for start in range(0, len(theirs), 4096):
                rows = slice(start, start + 4096)
                if not torch.equal(ours[rows].to(theirs.dtype), theirs[rows].to(ours.device)):
                    _raise_all(
                        folder, [f"{name}: the adapter's own copy of the base differs from {base.label}"]
                    )

        return guard

    return {name: guard_of(name, original) for name, original in kept.items()}


def _stored_spec(stored: Weights, name: str) -> Spec:
    return stored.specs[stored.aliases.get(name, name)]


def _read(stored: Weights, name: str) -> Tensor:
    return stored.read(stored.aliases.get(name, name))


def _notes(config: Mapping[str, Any], kept: Mapping[str, str], base: Weights | None) -> Iterator[str]:
    stated = config.get("base_model_name_or_path")
    if stated and base is not None:
        yield f"the adapter says that its base is {stated}; the base in use is {base.label}; not compared"
    if kept and base is None:
        yield f"the adapter's own copies of the base were passed over: {', '.join(kept)}"
