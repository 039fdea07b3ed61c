"""A merged folder in use: one body in memory, a ready module a task, predictions with names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import __version__
from .errors import UsageError, WeightsError
from .masks import masked_names, restored
from .output.companions import companions
from .output.folder import RECORD, OutputFolder
from .output.preparation import prepares
from .output.tensors import write_tensors
from .surgery import has_parts, read_part
from .tasks.data import DataKind, Fields, check_inputs, read_samples
from .tasks.huggingface import quiet
from .tasks.image_classification import image_task
from .tasks.labels import class_names
from .tasks.module import module_task
from .tasks.resolve import guess_kind
from .tasks.spec import Kind
from .tasks.task import Samples, Task
from .tasks.text_classification import embedding_text_task, read_head, text_task
from .tasks.zero_shot_image import zero_shot_image_task
from .weights import Weights, open_weights
from .weights.shared_store import is_store, open_store
from .weights.source import PART

if TYPE_CHECKING:
    from .routing.routes import Routes
    from .routing.twin import TwinRoutes

Model = nn.Module | Callable[[], nn.Module]

_DATA_KINDS: Mapping[str, DataKind] = {
    "image": "image", "image_zero_shot": "image", "module": "array",
}  # fmt: skip
_CONFIG_OF_PARTS = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input.

    Attributes:
        label: name of the most likely class, or its number as text where classes have no names.
        index: its number.
        probability: softmax of its logit.
        probabilities: of every class, by number.
    """

    label: str
    index: int
    probability: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class _Ready:
    """A task with its module."""

    task: Task
    kind: Kind
    module: nn.Module
    names: Sequence[str] | None


class MergedModel:
    """A folder written by a merge: a body, shared by the modules of all tasks.

    Args:
        folder: the folder.
        body: its opened weights.
        record: its ``run.json``.
        model: makes the module, or is one, for models that are none of transformers.
        head: for each task what follows the module, where the module ends before the logits.
        device: where the tensors live.

    Attributes:
        folder: the folder.
        tasks: names of the tasks.
        record: how the folder came about.
    """

    def __init__(
        self,
        folder: Path,
        body: Weights,
        record: Mapping[str, Any],
        *,
        model: Model | None = None,
        head: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.record, self.device = folder, record, torch.device(device)
        self.tasks: tuple[str, ...] = tuple(record.get("experts") or _heads_in(folder))
        self._body, self._model, self._head = body, model, head or {}
        self._shared: dict[str, Tensor] = {}
        self._own = masked_names(folder) if "masks" in record else frozenset()
        self._routes: Routes | TwinRoutes | None = None
        self._ready: dict[str, _Ready] = {}

    def task(self, name: str) -> nn.Module:
        """The model of one task, ready to run: `module` by another name."""
        return self.module(name)

    def module(self, task: str) -> nn.Module:
        """The model of one task in evaluation mode. All tasks' modules hold the same body tensors.

        Where the merge kept a mask for each task (`emr`, `tall_masks`), each has its own instead. Where it
        learned surgery, the module applies it before its head.

        Raises:
            UsageError: no such task, or a model that is none of transformers and was not given.
            WeightsError: the folder is not whole.
        """
        return self._get(task).module

    def label_names(self, task: str) -> Sequence[str] | None:
        """Names of a task's classes by number, where known. Raises as `module`."""
        return self._get(task).names

    def kind(self, task: str) -> Kind:
        """What a task's inputs are. Raises as `module`."""
        return self._get(task).kind

    def predict(
        self, task: str | Sequence[str], inputs: Sequence[Any], *, batch_size: int = 32
    ) -> list[Prediction]:
        """Predictions for inputs, in their order.

        Args:
            task: name of the task; or one name an input, for a batch of several tasks.
            inputs: texts (or pairs of texts), images, or arrays, as the task was adapted to.
            batch_size: inputs a forward pass.

        Raises:
            UsageError: no such task, or inputs that are none.
        """
        if isinstance(inputs, str):
            raise UsageError("inputs is one text; give a list of texts: [text]")
        if not isinstance(task, str):
            return self._predict_mixed(list(task), list(inputs), batch_size)
        ready = self._get(task)
        items = list(inputs)
        if not items:
            return []
        columns = list(zip(*items, strict=True)) if isinstance(items[0], tuple) else [items]
        for column in columns:
            check_inputs(column, _DATA_KINDS.get(ready.kind, "text"), f"inputs for task '{task}'")
        from .evaluation.inference import logits_of

        samples = Samples(items, None, "inputs", "")
        logits = logits_of(ready.module, ready.task, samples, batch_size=batch_size, device=self.device)
        return [_prediction(row, ready.names) for row in logits.softmax(-1)]

    def route(self, inputs: Sequence[Any], *, batch_size: int = 32) -> list[dict[str, float]]:
        """How much of each expert each input takes, by its name: the mean gate over all that is routed.

        Args:
            inputs: as `predict` takes them; no task need be known.
            batch_size: inputs a forward pass.

        Raises:
            UsageError: a model that does not route, or inputs that are none.
        """
        if "routing" not in self.record:
            raise UsageError(f"{self.folder} has the same weights for every input: it does not route")
        if isinstance(inputs, str):
            raise UsageError("inputs is one text; give a list of texts: [text]")
        ready, items = self._get(self.tasks[0]), list(inputs)
        if not items:
            return []
        check_inputs(items, _DATA_KINDS.get(ready.kind, "text"), "inputs to route")
        assert self._routes is not None
        found: list[dict[str, float]] = []
        for start in range(0, len(items), batch_size):
            batch = ready.task.collate(items[start : start + batch_size])
            with torch.inference_mode():
                ready.task.forward(ready.module, {name: t.to(self.device) for name, t in batch.items()})
            gates = [gate.values for gate in self._routes.gates if gate.values is not None]
            for row in torch.stack(gates).mean(0).tolist():
                found.append(dict(zip(self._routes.tasks, row, strict=True)))
        return found

    def _predict_mixed(
        self, tasks: Sequence[str], inputs: Sequence[Any], batch_size: int
    ) -> list[Prediction]:
        """Inputs of several tasks: those of one task go through its model together."""
        if len(tasks) != len(inputs):
            raise UsageError(f"{len(tasks)} names of tasks for {len(inputs)} inputs; give one for each")
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(tasks):
            self._check(name)  # of all, before any is computed
            rows.setdefault(name, []).append(row)
        found: dict[int, Prediction] = {}
        for name, own in rows.items():
            said = self.predict(name, [inputs[row] for row in own], batch_size=batch_size)
            found.update(zip(own, said, strict=True))
        return [found[row] for row in range(len(inputs))]

    def stored(self, task: str) -> dict[str, Tensor]:
        """A task's tensors by the names and in the dtypes of the files they come from, tied ones once.

        Raises as `module`.
        """
        part = self._part(task)
        prefix = f"{getattr(self.module(task), 'base_model_prefix', '')}."
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        body = self._body_of(task)
        for name, tensor in self.module(task).state_dict().items():
            if tensor.data_ptr() in seen and tensor.numel():
                continue
            seen.add(tensor.data_ptr())
            specs = [
                part.specs.get(name),
                body.specs.get(name),
                body.specs.get(name.removeprefix(prefix)),
            ]
            spec = next((found for found in specs if found is not None), None)
            tensors[name] = tensor if spec is None else tensor.to(spec.dtype)
        return tensors

    def parts(self, task: str) -> tuple[Weights, Weights, Mapping[str, Any]]:
        """What a task of its own is made from: its own weights, the body's, and keys of its `TaskSpec`.

        Raises as `module`.
        """
        self._check(task)
        part = self._part(task)
        stated: Mapping[str, Any] = (self.record.get("tasks") or {}).get(task, {})
        kind = stated.get("kind") or self._kind(task, part)
        known = {"kind": kind, "max_length": stated.get("max_length")}
        if kind in ("text_embedding", "image_zero_shot"):
            known["head"] = str(self._fixed_head(task))
        return part, self._body_of(task), {key: value for key, value in known.items() if value is not None}

    def complete(self, task: Task, module: nn.Module) -> tuple[Task, str]:
        """Put into a task's module what the folder keeps beside the body: what routes, or surgery.

        Args:
            task: of this folder.
            module: as the task's skeleton makes it of `parts`, on the device where it will run.

        Returns:
            The task to run the module with from now on, and the fingerprint of what is no tensor of the
            module; empty where there is none.

        Raises:
            UsageError: no such task.
            WeightsError: the folder is not whole.
        """
        self._check(task.name)
        if "routing" in self.record:
            from .routing.folder import open_routes

            if self._routes is None:
                self._routes = open_routes(self.folder, self._body, self.record["routing"], self.device)
            self._routes.install(module, self._names(module), f"the model of task '{task.name}'")
        if not has_parts(self.record):
            return task, ""
        operation = read_part(self.folder, task.name)
        return operation.attach(task, module, self._part(task.name), self._body), operation.fingerprint

    def _names(self, module: nn.Module) -> dict[int, str]:
        """The body's name of a module's tensors, by their ids."""
        prefix = f"{getattr(module, 'base_model_prefix', '')}."
        found = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            names = (name, name.removeprefix(prefix))
            stored = next((self._body.aliases.get(n, n) for n in names if self._has(n)), None)
            if stored is not None:
                found[id(tensor)] = stored
        return found

    def _check(self, task: str) -> None:
        if task not in self.tasks:
            raise UsageError(f"{self.folder} has no task '{task}'; it has {', '.join(self.tasks) or 'none'}")

    def _get(self, task: str) -> _Ready:
        self._check(task)
        if task not in self._ready:
            self._ready[task] = self._build(task)
        return self._ready[task]

    def _build(self, name: str) -> _Ready:
        part = self._part(name)
        stated: Mapping[str, Any] = (self.record.get("tasks") or {}).get(name, {})
        kind: Kind = stated.get("kind") or self._kind(name, part)
        length = stated.get("max_length")
        names = class_names(part.config)
        if kind == "text":
            task = text_task(name, max_length=length)
        elif kind == "text_embedding":
            path = self._fixed_head(name)
            task = embedding_text_task(name, max_length=length, head=path)
            names = read_head(path)[1]
        elif kind == "image":
            task = image_task(name)
        elif kind == "image_zero_shot":
            path = self._fixed_head(name)
            task = zero_shot_image_task(name, head=path)
            names = read_head(path)[1]
        else:
            task = module_task(name, model=self._factory(stated), head=self._head.get(name))
        module = task.skeleton(part, self._body_of(name))
        self._share(module, name, part)
        task, _ = self.complete(task, module.to(self.device))
        return _Ready(task, kind, module.to(self.device), names)

    def _body_of(self, name: str) -> Weights:
        """The body as a task uses it."""
        if "masks" not in self.record:
            return self._body
        return restored(self.folder, self._body, self.record["masks"], name)

    def _own_of(self, name: str) -> frozenset[str]:
        """Tensors of the body that a task has values of its own of."""
        del name
        return self._own

    def _fixed_head(self, name: str) -> Path:
        """Where a task's head lies that is outside its module, if it has one."""
        return self.folder / "heads" / f"{name}.safetensors"

    def _first(self, stored: str, tensor: Tensor) -> Tensor:
        """The tensor of the body that all modules hold: the first one's."""
        return self._shared.setdefault(stored, tensor)

    def small_files(self, task: str) -> Iterator[tuple[Path, str]]:
        """Configuration and tokenizer files that belong to a task's model, with their names in its folder.

        A tokenizer or processor that the task has of its own stands for the merged folder's.
        """
        own = {name: path for path, name in companions(self._own_folder(task))}
        replaced = {prepares(name) for name in own} - {None}
        for path, name in companions(self.folder):
            if name not in own and prepares(name) not in replaced:
                yield path, name
        yield from ((path, name) for name, path in own.items())

    def _own_folder(self, task: str) -> Path:
        """Where lies what a task has of its own."""
        return self.folder / "heads" / task

    def _part(self, name: str) -> Weights:
        """What a task has of its own: its head, its configuration, and what prepares its inputs."""
        own = self._own_folder(name)
        path = own / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            raise WeightsError(f"{path} is not valid JSON: {error}") from None
        if (own / "head.safetensors").is_file():
            opened = open_weights(own / "head.safetensors")
            return replace(opened, label=str(own), config=config, folder=own, metadata=PART)
        return Weights(str(own), {}, _nothing, config=config, folder=own, metadata=PART)

    def _kind(self, name: str, part: Weights) -> Kind:
        if self._model is not None:
            return "module"
        if self._fixed_head(name).is_file():
            clip = (self._body.config or {}).get("model_type") == "clip"
            return "image_zero_shot" if clip else "text_embedding"
        return "module" if self._body.config is None else guess_kind(name, part, self._body)

    def _factory(self, stated: Mapping[str, Any]) -> Model:
        if self._model is None:
            named = f" It was made by {stated['model']}." if stated.get("model") else ""
            raise UsageError(
                f"{self.folder} is no model of transformers, so its code must be given: load(folder, "
                f"model=...), a module or a function that makes one.{named}"
            )
        return self._model

    def _share(self, module: nn.Module, task: str, part: Weights) -> None:
        """Replace the body's tensors in a module by those of the modules before it."""
        kept = self._own_of(task)
        prefix = f"{getattr(module, 'base_model_prefix', '')}."
        replaced: dict[int, Tensor] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            names = (name, name.removeprefix(prefix))
            stored = next((self._body.aliases.get(n, n) for n in names if self._has(n)), None)
            if name not in part.specs and stored is not None and stored not in kept:
                first = self._first(stored, tensor)
                if first.shape == tensor.shape:
                    replaced[id(tensor)] = first
        for owner in module.modules():
            for slots in (owner._parameters, owner._buffers):
                for leaf, own in list(slots.items()):
                    if own is not None and id(own) in replaced:
                        slots[leaf] = replaced[id(own)]  # type: ignore[assignment]

    def _has(self, name: str) -> bool:
        return name in self._body.specs or name in self._body.aliases


def load(
    folder: str | Path,
    *,
    model: Model | None = None,
    head: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    device: torch.device | str = "cpu",
) -> MergedModel:
    """Open a folder that a merge wrote, or a store of tasks over one base.

    Args:
        folder: the folder.
        model: makes the module, or is one, for models that are none of transformers. No code named in the
            folder is ever run.
        head: for such models, what follows the module, by task.
        device: where the tensors shall live.

    Raises:
        WeightsError: not a folder with weights, or it is damaged.
    """
    path = Path(folder).expanduser()
    if is_store(path):
        from .sharing.serving import SharedModel

        return SharedModel(open_store(path), model=model, head=head, device=device)
    if not path.exists():
        raise WeightsError(f"{path} does not exist; give the folder that a merge wrote")
    if not (path / RECORD).is_file():
        raise WeightsError(
            f"{path} was not written by a merge: it has no {RECORD}. Open ordinary models with transformers"
        )
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path / RECORD} is not valid JSON: {error}") from None
    _check_record(path / RECORD, record)
    return MergedModel(path, open_weights(path), record, model=model, head=head, device=device)


def _check_record(path: Path, record: Any) -> None:
    """Refuse what no merge wrote.

    Raises:
        WeightsError: it is no mapping, or what it says of experts and tasks is none.
    """
    wrong = [] if isinstance(record, dict) else ["it holds no keys and values"]
    for key in ("experts", "tasks") if not wrong else ():
        found = record.get(key) or {}
        if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
            wrong.append(f"'{key}' does not say by name what each is")
    if wrong:
        raise WeightsError(
            f"{path} is damaged: {'; '.join(wrong)}. Take it from a copy, or write the folder again: merge"
        )


def load_module(folder: str | Path, task: str, *, device: torch.device | str = "cpu") -> nn.Module:
    """One task's model of a merged folder: the class of transformers, ready to run, also where it routes.

    Args:
        folder: that a merge wrote.
        task: whose head.
        device: where the tensors shall live.

    Raises:
        UsageError: no such task, or a model that is none of transformers (see `load`).
        WeightsError: not a folder with weights, or it is damaged.
    """
    return load(folder, device=device).module(task)


def export(folder: str | Path, task: str, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write one task's whole classifier, as plain transformers loads it: body, head, tokenizer.

    Args:
        folder: a folder that a merge wrote, or a store.
        task: name of the task.
        out: folder to write.
        overwrite: replace the folder of an earlier export.

    Raises:
        UsageError: no such task, one that is no classifier of transformers, or a model that routes by input.
        WeightsError: the folder cannot be opened.
        OutputError: the output cannot be written.
    """
    merged = load(folder)
    if "routing" in merged.record:
        raise UsageError(
            f"{folder} routes by input: its MLPs have other weights for every input, which no class of plain "
            "transformers has. Use it as it is: adamerging predict, adamerging.load or adamerging.load_module"
        )
    kind = merged.kind(task)
    if kind not in ("text", "image"):
        raise UsageError(
            f"task '{task}' is of kind {kind}, for which transformers has no classifier to write; "
            f"{folder} itself holds the body, and heads/{task} what belongs to the task"
        )
    if has_parts(merged.record):
        raise UsageError(
            f"task '{task}' has a part before its head (surgery) with a ReLU in it, which no weights of an "
            f"ordinary model can take in: open the folder itself, adamerging.load({str(folder)!r})"
        )
    module: Any = merged.module(task)
    tensors = merged.stored(task)
    with OutputFolder(out, overwrite=overwrite, inputs=[merged.folder]) as target:
        target.require(sum(tensor.nbytes for tensor in tensors.values()))
        digest = write_tensors(target.path / "model.safetensors", tensors, {"format": "pt"})
        with quiet():
            module.config.architectures = [type(module).__name__]
            module.config.save_pretrained(target.path)
        for path, name in merged.small_files(task):
            if "/" not in name and name not in ("config.json", *_CONFIG_OF_PARTS):
                target.copy(path, name)
        record = {
            "kind": "export",
            "task": task,
            "merge": {key: merged.record.get(key) for key in ("kind", "method", "base")},
            "outputs": {"model.safetensors": digest},
            "versions": {"adamerging": __version__, "torch": torch.__version__},
        }
        target.write_text(RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        target.commit()
    return target.target


def read_inputs(path: str, kind: Kind, fields: Fields | None = None) -> Sequence[Any]:
    """The inputs in a file, for `MergedModel.predict`. Raises as `read_samples`."""
    return read_samples(path, _DATA_KINDS.get(kind, "text"), fields).inputs


def _prediction(row: Tensor, names: Sequence[str] | None) -> Prediction:
    index = int(row.argmax())
    label = names[index] if names is not None else str(index)
    return Prediction(label, index, float(row[index]), tuple(row.tolist()))


def _heads_in(folder: Path) -> list[str]:
    heads = folder / "heads"
    return sorted(path.name for path in heads.iterdir() if path.is_dir()) if heads.is_dir() else []


def _nothing(name: str) -> Tensor:
    raise KeyError(name)
