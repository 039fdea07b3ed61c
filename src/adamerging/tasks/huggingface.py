"""Models of transformers built from opened weights, under the expert's own tensor names.

Nothing is read from a path here but tokenizers and processors: values come from `Weights`, so that a LoRA
adapter over its base, a head beside a merged body and an ordinary expert are all built the same way.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import UsageError, WeightsError
from ..weights.source import PART, Weights

_ADAPTER = "adapter_config.json"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its notes about tensors: what matters here is raised."""
    log = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def is_partial(weights: Weights) -> bool:
    """Whether weights are a change or a part of a model (a LoRA adapter, a head), not a whole one."""
    if weights.low_rank or PART.items() <= weights.metadata.items():
        return True
    return weights.folder is not None and (weights.folder / _ADAPTER).is_file()


def classifier(auto: Any, expert: Weights, base: Weights, task: str) -> nn.Module:
    """A classification model with the expert's values, in float32 and evaluation mode.

    Args:
        auto: the auto class, such as ``AutoModelForSequenceClassification``.
        expert: a whole model, or a part of one over the base.
        base: where tensors come from that a partial expert does not hold.
        task: for messages.

    Raises:
        WeightsError: no configuration, no such model in transformers, or tensors missing: of a head, that is
            said.
    """
    try:
        return _classifier(auto, expert, base)
    except WeightsError as error:
        error.args = (f"task '{task}': {error}",)
        raise


def _classifier(auto: Any, expert: Weights, base: Weights) -> nn.Module:
    partial = is_partial(expert)
    config = configuration(expert if expert.config is not None else base)
    if partial and expert.config is None:
        width = {expert.specs[name].shape[0] for name in _outputs(auto, config) if name in expert.specs}
        if len(width) == 1:
            config.num_labels = width.pop()
    return build(auto, config, expert, base if partial else None)


def encoder(expert: Weights, base: Weights) -> nn.Module:
    """An encoder without a head, in float32 and evaluation mode. Raises as `classifier`."""
    config = configuration(expert if expert.config is not None else base)
    return build(transformers.AutoModel, config, expert, base if is_partial(expert) else None)


def build(auto: Any, config: Any, expert: Weights, base: Weights | None) -> nn.Module:
    """Fill a model of transformers from weights.

    The library may name tensors otherwise than the files do (it renames on loading, and back on saving).
    The module's ``state_dict()`` speaks of them as the files do.

    Args:
        auto: the auto class.
        config: its configuration.
        expert: the values, under the names that a file of such a model has.
        base: stands in for tensors that the expert does not hold; its names may lack the body's prefix.

    Raises:
        WeightsError: tensors are missing or of another shape; all are listed.
    """
    skeleton = _skeleton(auto, config)
    kind, wanted = type(skeleton), set(skeleton.state_dict())
    tensors = _tensors(expert, base, kind.base_model_prefix)
    module, missing = _fitted(kind, config, tensors, expert.label)
    if missing:
        _refuse_missing(missing, expert, auto, config)
    if not wanted <= set(tensors):
        _name_as_stored(module, _stored_names(kind, config, tensors))
    return _frozen(module)


def filled(
    kind: Any,
    config: Any,
    tensors: Mapping[str, Tensor],
    label: str,
    stored: Mapping[str, str] | None = None,
) -> nn.Module:
    """Fill a model of a known class from tensors by its own names, in float32 and evaluation mode.

    Args:
        kind: a class of transformers.
        config: its configuration.
        tensors: the values.
        label: what messages call where they come from.
        stored: what ``state_dict()`` shall call tensors, by their own names.

    Raises:
        WeightsError: tensors are missing or of another shape; all are listed.
    """
    module, missing = _fitted(kind, config, tensors, label)
    if missing:
        raise WeightsError(f"{label} lacks tensors that {kind.__name__} needs: {', '.join(missing[:20])}")
    if stored is not None and any(name != other for name, other in stored.items()):
        _name_as_stored(module, stored)
    return _frozen(module)


def configuration(weights: Weights) -> Any:
    """The configuration object of opened weights.

    Raises:
        WeightsError: there is none, or this transformers does not know its model type.
    """
    fields = dict(weights.config or {})
    kind = fields.pop("model_type", None)
    if kind is None:
        raise WeightsError(
            f"{weights.label} has no config.json that names a model_type; give the whole folder, or use a "
            "module task for a model that is none of transformers"
        )
    try:
        return type(transformers.AutoConfig.for_model(kind)).from_dict(fields)
    except ValueError:
        raise WeightsError(
            f"{weights.label}: transformers {transformers.__version__} knows no model_type '{kind}'; "
            "use a module task"
        ) from None


def tokenizer_of(expert: Weights, base: Weights) -> Any:
    """The expert's tokenizer, else the base's.

    Raises:
        UsageError: neither folder has one.
    """
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
    return load_from(transformers.AutoTokenizer, _folder_with(files, expert, base, "tokenizer"))


def load_from(auto: Any, folder: Path) -> Any:
    """A tokenizer or processor from a local folder.

    Raises:
        UsageError: it cannot be loaded, with the library's own reason.
    """
    try:
        with quiet():
            return auto.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise UsageError(f"{auto.__name__} cannot load from {folder}: {error}") from None


def processor_folder(expert: Weights, base: Weights) -> Path | None:
    """The folder with a ``preprocessor_config.json``: the expert's, else the base's, else None."""
    for weights in (expert, base):
        if weights.folder is not None and (weights.folder / "preprocessor_config.json").is_file():
            return weights.folder
    return None


def read_json(path: Path) -> Any:
    """A small JSON file, or None where there is none.

    Raises:
        UsageError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None


def low_rank_change(weights: Weights, name: str) -> Tensor:
    """The change that LoRA factors stand for, in float32 and the tensor's own shape when reshaped."""
    factors = weights.factors(name)
    return (factors.left.float() * factors.scale) @ factors.right.float()


def _folder_with(files: tuple[str, ...], expert: Weights, base: Weights, what: str) -> Path:
    folders = [weights.folder for weights in (expert, base) if weights.folder is not None]
    for folder in folders:
        if any((folder / name).is_file() for name in files):
            return folder
    raise UsageError(
        f"neither {expert.label} nor {base.label} comes with a {what} ({', '.join(files)}); pass {what}="
    )


def _skeleton(auto: Any, config: Any) -> Any:
    """The model without values."""
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except ValueError:
        raise WeightsError(
            f"transformers has no {auto.__name__} for the model type '{config.model_type}'. "
            "Is the task of another kind? A recipe says so with the key kind"
        ) from None


def _outputs(auto: Any, config: Any) -> tuple[str, ...]:
    """The tensors that make the logits: those whose shape follows the number of classes."""
    shapes: list[Mapping[str, Any]] = []
    for count in (3, 5):
        trial = type(config).from_dict({**config.to_dict(), "id2label": dict.fromkeys(range(count), "")})
        shapes.append({name: tensor.shape for name, tensor in _skeleton(auto, trial).state_dict().items()})
    return tuple(name for name, shape in shapes[0].items() if shapes[1].get(name) != shape)


def _fitted(kind: Any, config: Any, tensors: Mapping[str, Tensor], label: str) -> tuple[Any, list[str]]:
    """The model with its values, and the names of those that are missing."""
    module, info = _load(kind, config, tensors)
    if info["mismatched_keys"]:
        wrong = [f"  - {name}: {list(a)}, not {list(b)}" for name, a, b in sorted(info["mismatched_keys"])]
        raise WeightsError(f"{label} does not fit its configuration:\n" + "\n".join(wrong[:20]))
    return module, sorted(info["missing_keys"])


def _frozen(module: Any) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.float().eval()  # type: ignore[no-any-return]


def _load(kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    with quiet():
        module, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    return module, info


def _tensors(expert: Weights, base: Weights | None, prefix: str) -> dict[str, Tensor]:
    """Copies of the values by the names that a file of the expert's model has."""
    tensors: dict[str, Tensor] = {}
    if base is not None:
        own = [*base.specs, *base.aliases]
        lead = "" if any(name.startswith(f"{prefix}.") for name in own) or not prefix else f"{prefix}."
        tensors = {lead + name: _copy(base.read(base.aliases.get(name, name))) for name in own}
    for name in (*expert.specs, *expert.aliases):
        stored = expert.aliases.get(name, name)
        if stored not in expert.low_rank:
            tensors[name] = _copy(expert.read(stored))
        elif name in tensors:
            tensors[name] += low_rank_change(expert, stored).reshape(tensors[name].shape)
        else:
            raise WeightsError(f"{expert.label} changes {name}, which its base does not have")
    return tensors


def _copy(value: Tensor) -> Tensor:
    return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)


def _stored_names(kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The file's name of each of the module's tensors, found by loading values that tell who they are."""
    names = list(tensors)
    marked = {name: _mark(number, tensors[name]) for number, name in enumerate(names)}
    module, _ = _load(kind, config, marked)
    found = {}
    for name, tensor in module.state_dict().items():
        number = int(tensor.reshape(-1)[0]) if tensor.numel() else -1
        stored = names[number] if 0 <= number < len(names) else name
        if stored in marked and torch.equal(tensor, marked[stored]):
            found[name] = stored
        elif name not in tensors:
            raise WeightsError(
                f"transformers {transformers.__version__} keeps {name} of {kind.__name__} in another layout "
                "than the file does; convert the experts and the base with it, or use a module task"
            )
    return found


def _mark(number: int, tensor: Tensor) -> Tensor:
    """A tensor of the same shape that holds its number, and one other value to show a transposition."""
    marked = torch.full(tensor.shape, float(number))
    if tensor.ndim > 1 and tensor.shape[-1] > 1:
        marked.view(-1)[tensor.shape[-1] - 1] = -1.0
    return marked


def _name_as_stored(module: nn.Module, names: Mapping[str, str]) -> None:
    def rename(owner: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        del owner, metadata
        renamed = {prefix + names.get(key[len(prefix) :], key[len(prefix) :]): state[key] for key in state}
        state.clear()
        state.update(renamed)

    module._register_state_dict_hook(rename)  # type: ignore[no-untyped-call]


def _refuse_missing(missing: list[str], expert: Weights, auto: Any, config: Any) -> None:
    outputs = _outputs(auto, config)
    # An encoder's pooler is of no use here, and sentence encoders often come without.
    missing = [name for name in missing if outputs or not name.startswith("pooler.")]
    if not missing:
        return
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    if any(name in outputs for name in missing):
        saved = " (for an adapter: modules_to_save)" if is_partial(expert) else ""
        raise WeightsError(
            f"{expert.label} has no head: it lacks {shown}. Give the expert as it was saved with its "
            f"head{saved}; for an encoder under a zero-shot head, use the kind text_embedding"
        )
    raise WeightsError(f"{expert.label} lacks tensors that {auto.__name__} needs: {shown}")
