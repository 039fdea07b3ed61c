"""A merge from start to end: open, plan, check, merge, write. Orchestration only."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .errors import PlanError, UsageError
from .masks import masked_nbytes, refuse_masks, write_masks
from .merging import check_method, check_statistics, fill, merged_pieces, output_dtype
from .methods import Method, chain, make_method
from .norms import OWN, Statistics, as_stored, statistics_of
from .output.card import hub_id, model_card
from .output.companions import companions, is_tokenizer, with_dtype
from .output.folder import RECORD, OutputFolder
from .output.preparation import own_preparation
from .output.tensors import TensorWriter, index_json, sharded, write_tensors
from .plan import Plan, make_plan
from .recipe import Recipe, Settings
from .relatedness import UNRELATED, Relatedness, relatedness
from .stream import Pipeline, Workers
from .task_vectors import TaskVectors
from .tasks.task import Task
from .validation import make
from .vocabulary import Vocabulary, extra, settle
from .weights import Fingerprints, Spec, Weights, open_weights, sha256_file

Progress = Callable[[int, int], None]
"""Called with (values read so far, values to read); from any thread."""


@dataclass(frozen=True)
class Prepared:
    """Opened, planned and checked: everything that is known before a tensor is merged.

    Attributes:
        settings: how to merge.
        method: the method, or chain of methods.
        vectors: base, experts and plan.
        relatedness: how each expert lies to the base.
        files: the output's weight files, each with the name, shape and dtype of its tensors.
        vocabulary: rows and tokenizer files where vocabularies differ.
        about: what the record says of the data that the method looked at.
    """

    settings: Settings
    method: Method
    vectors: TaskVectors
    relatedness: Mapping[str, Relatedness]
    files: Mapping[str, Mapping[str, Spec]]
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The merge plan."""
        return self.vectors.plan

    @property
    def own_statistics(self) -> bool:
        """Whether each task has BatchNorm statistics of its own beside the common weights, as asked."""
        asked = self.settings.buffers == "task" and self.method.masks is None
        return asked and bool(self.plan.with_treatment("averaged"))

    @property
    def statistics_with_heads(self) -> bool:
        """Whether BatchNorm statistics lie with each task's head; with masks they are always its expert's."""
        return self.own_statistics or self.method.masks is not None

    @property
    def specs(self) -> dict[str, Spec]:
        """The body's tensors as they are written, of all its files."""
        return {name: spec for specs in self.files.values() for name, spec in specs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the output's tensors, heads included."""
        body = sum(spec.nbytes for spec in self.specs.values())
        heads = sum(spec.nbytes for head in self.plan.heads.values() for spec in head.values())
        masks = masked_nbytes(self) if self.method.masks is not None else 0
        averaged = self.plan.with_treatment("averaged") if self.statistics_with_heads else ()
        own = len(self.vectors.tasks) * sum(entry.spec.nbytes for entry in averaged)
        return body + heads + own + masks + self._extra_nbytes()

    def _extra_nbytes(self) -> int:
        """Bytes of the rows that are kept for one task alone."""
        total = 0
        for task, rows in self.plan.extra_rows.items():
            specs = self.vectors.experts[task].specs
            total += sum(specs[n].nbytes // specs[n].shape[0] * (b - a) for n, (a, b) in rows.items())
        return total

    @property
    def reads(self) -> int:
        """Values of each task vector that the merge reads, all passes together."""
        passes = self.method.reads + (self.method.masks is not None)
        return passes * sum(self.vectors.numel(entry) for entry in self.vectors.entries())


@dataclass(frozen=True)
class MergeResult:
    """What a merge gives back.

    Attributes:
        plan: what happened to each tensor.
        record: what ``run.json`` holds.
        out: the folder, when one was written.
        body: the merged body by tensor name, when none was written.
        heads: for each task its own tensors by name, when no folder was written.
    """

    plan: Plan
    record: Mapping[str, Any]
    out: Path | None = None
    body: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)


def merge(
    base: Any,
    experts: Mapping[str, Any],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    tasks: Iterable[Task] = (),
    transductive: bool = False,
    **settings: Any,
) -> MergeResult:
    """Merge experts into one model.

    Args:
        base: path, hub id, state dict or module of the pre-trained model; never changed.
        experts: the same by task name; also LoRA adapters over the base.
        out: folder to write, which must not exist; without it the result stays in memory.
        overwrite: replace the folder of an earlier run.
        progress: called with (values read, values to read).
        tasks: data by expert (see `adamerging.tasks`), for methods that look at unlabeled inputs, for
            BatchNorm statistics, and to score on.
        transductive: unlabeled and labelled data may be the same; the record says so.
        settings: any field of `recipe.Settings`: method, options, scale, weights, ...

    Raises:
        UsageError: a setting that cannot be right.
        WeightsError: something that cannot be opened.
        PlanError: base and experts do not belong together; every mismatch is listed.
        NonFiniteError: NaN or infinity in the weights.
        OutputError: the folder cannot be written.
    """
    prepared = prepare(base, experts, make(Settings, settings, "settings of merge"))
    tasks = list(tasks)
    if not tasks:
        return execute(prepared, out=out, overwrite=overwrite, progress=progress)
    from .adaptation.static import merge_with_tasks
    from .tasks.data import refuse_overlap

    refuse_overlap(tasks, transductive=transductive)
    return merge_with_tasks(
        prepared, tasks, out=out, overwrite=overwrite, transductive=transductive, progress=progress
    )


def prepare_recipe(recipe: Recipe) -> Prepared:
    """Open, plan and check as a recipe says. Raises as `merge`."""
    fields = recipe.model_dump(include=set(Settings.model_fields))
    settings = Settings.model_validate({**fields, "weights": recipe.weights_by_expert()})
    experts = {name: expert.path for name, expert in recipe.experts.items()}
    return prepare(recipe.base, experts, settings, notes=recipe.notes)


def prepare_inspection(recipe: Recipe) -> Prepared:
    """As `prepare_recipe`, for a look: unrelated experts are shown, not refused; the method is no matter."""
    fields = recipe.model_dump(include={"include", "exclude", "heads", "buffers", "vocabulary", "threads"})
    settings = Settings.model_validate({**fields, "method": "weighted", "allow": ["unrelated"]})
    return prepare(recipe.base, {name: expert.path for name, expert in recipe.experts.items()}, settings)


def prepare(
    base: Any, experts: Mapping[str, Any], settings: Settings, *, notes: Iterable[str] = ()
) -> Prepared:
    """Open, plan and check; reads no more than a sample of the weights. Raises as `merge`.

    Args:
        notes: what a reader of the plan should know besides its own.
    """
    method = chain([make_method(name, options) for name, options in settings.chain()])
    check_task_names(experts)
    _check_tokenizer(settings.tokenizer, experts)
    opened_base = open_weights(base)
    opened = {task: open_weights(source, base=opened_base) for task, source in experts.items()}
    plan = make_plan(
        opened_base,
        opened,
        include=settings.include,
        exclude=settings.exclude,
        heads=settings.heads,
        buffers=settings.buffers,
        vocabulary=settings.vocabulary if settings.tokenizer == "base" else "shared",
    )
    vocabulary = Vocabulary()
    if settings.tokenizer != "base" or settings.vocabulary == "shared":
        plan, vocabulary = settle(plan, opened_base, opened, settings.tokenizer)
    plan = replace(plan, notes=(*notes, *plan.notes))
    vectors = TaskVectors(
        plan, opened_base, opened, weights=settings.weights, allow_nonfinite="nonfinite" in settings.allow
    )
    check_method(method, vectors, settings.scale)
    _check_ties(vectors)
    related = relatedness(vectors)
    if "unrelated" not in settings.allow:
        _refuse_unrelated(vectors, related)
    dtype = _dtype(settings)
    specs = {
        name: Spec(vocabulary.spec(entry).shape, output_dtype(entry, dtype))
        for name, entry in plan.entries.items()
    }
    return Prepared(settings, method, vectors, related, sharded(specs, opened_base.shards), vocabulary)


def execute(
    prepared: Prepared,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    prints: Fingerprints | None = None,
) -> MergeResult:
    """Merge what was prepared. Raises as `merge`.

    Args:
        prepared: what is merged, and how.
        out: folder to write.
        overwrite: replace the folder of an earlier run.
        progress: called with (values read, values to read).
        prints: where hashing of the inputs may have begun.
    """
    started = time.perf_counter()
    vectors = prepared.vectors
    check_statistics(prepared.method, vectors)
    if progress is not None:
        vectors.on_read = _Counter(prepared.reads, progress)
    if out is None:
        body, heads = _in_memory(prepared)
        return MergeResult(prepared.plan, run_record(prepared, started), body=body, heads=heads)
    inputs = [vectors.base, *vectors.experts.values()]
    files = [path for weights in inputs for path in weights.files]
    with check_out(prepared, out, overwrite=overwrite) as folder, prints or Fingerprints() as prints:
        folder.require(prepared.nbytes)
        prints.begin(files)
        outputs = _write_body(prepared, folder) | write_heads(prepared, folder)
        masks: dict[str, Any] = {}
        if prepared.method.masks is not None:
            written, masks["masks"] = write_masks(prepared, folder)
            outputs |= written
        write_companions(prepared, folder)
        record = run_record(prepared, started, prints.of(files), outputs) | masks
        folder.write_text(RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        folder.write_text("README.md", model_card(record))
        folder.commit()
    return MergeResult(prepared.plan, record, out=folder.target)


def check_out(prepared: Prepared, out: str | Path | None, *, overwrite: bool = False) -> OutputFolder:
    """The output folder, not created yet, after a look whether it may be written.

    Raises:
        UsageError: there is no name.
        OutputError: it exists, or is, holds or lies in an input.
    """
    if out is None or not str(out).strip():
        raise UsageError("no output folder was named")
    inputs = [prepared.vectors.base, *prepared.vectors.experts.values()]
    paths = [
        path for weights in inputs for path in (*weights.files, *([weights.folder] if weights.folder else []))
    ]
    return OutputFolder(out, overwrite=overwrite, inputs=paths)


def _pipeline(prepared: Prepared, workers: Workers) -> tuple[Pipeline, dict[str, Any]]:
    """The surveyed method, and the keywords of `merged_pieces`."""
    settings, method = prepared.settings, prepared.method
    check_statistics(method, prepared.vectors)
    scale = method.scale if settings.scale is None else settings.scale
    return Pipeline(prepared.vectors, method.stages, workers), {
        "scale": scale,
        "dtype": _dtype(settings),
        "tails": prepared.vocabulary.tails,
    }


def _write_body(prepared: Prepared, folder: OutputFolder) -> dict[str, str]:
    """Stream the merged tensors into the weight files; sha256 by file name."""
    metadata = {"format": "pt", **prepared.vectors.base.metadata, **prepared.plan.aliases}
    hashes: dict[str, str] = {}
    with Workers(prepared.settings.threads) as workers:
        pipeline, keywords = _pipeline(prepared, workers)
        for file, specs in prepared.files.items():
            with TensorWriter(folder.path / file, specs, metadata) as writer:
                for piece in merged_pieces(pipeline, specs, **keywords):
                    writer.write(piece.values)
            hashes[file] = writer.sha256
    if len(prepared.files) > 1:
        total = sum(spec.nbytes for spec in prepared.specs.values())
        folder.write_text(
            "model.safetensors.index.json",
            index_json({file: list(specs) for file, specs in prepared.files.items()}, total),
        )
    return hashes


def _in_memory(prepared: Prepared) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    refuse_masks(prepared.method)
    specs = prepared.specs
    parts: dict[str, list[Tensor]] = {name: [] for name in specs}
    with Workers(prepared.settings.threads) as workers:
        pipeline, keywords = _pipeline(prepared, workers)
        for piece in merged_pieces(pipeline, specs, **keywords):
            parts[piece.entry.name].append(piece.values)
    body = {
        name: (torch.cat(values) if values else torch.empty(0, dtype=specs[name].dtype)).reshape(
            specs[name].shape
        )
        for name, values in parts.items()
    }
    return with_heads(prepared, body)


def with_heads(
    prepared: Prepared, body: Mapping[str, Tensor], statistics: Mapping[str, Statistics] | None = None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The body under all of the base's names, and the tensors of each task's own.

    Args:
        prepared: what is merged.
        body: merged, one tensor an entry of the plan.
        statistics: as of `write_heads`.
    """
    named = {**body, **{alias: body[name] for alias, name in prepared.plan.aliases.items()}}
    heads = {task: head_of(prepared, task, (statistics or {}).get(task)) for task in prepared.plan.heads}
    return {name: named[name] for name in sorted(named)}, heads


def merge_into(tensors: Mapping[str, Tensor], prepared: Prepared, workers: Workers) -> None:
    """Stream the merged body into tensors that exist: no second model is held.

    Args:
        tensors: by the base's names, in their shapes; of a dtype that holds the output's.
        prepared: what is merged.
        workers: threads.

    Raises:
        AdamergingError: as `merge`.
    """
    pipeline, keywords = _pipeline(prepared, workers)
    fill(tensors, pipeline, prepared.plan.entries, **keywords)


def head_of(prepared: Prepared, task: str, statistics: Statistics | None = None) -> dict[str, Tensor]:
    """The tensors kept for one task, by the names and with the values of its expert.

    Args:
        prepared: what is merged.
        task: which.
        statistics: of BatchNorm, where each task has its own and these are not its expert's.
    """
    vectors = prepared.vectors
    expert, prefixes = vectors.experts[task], prepared.plan.prefixes[task]
    head = {}
    for name in prepared.plan.heads[task]:
        if name in expert.low_rank:  # a change of a head that the base owns
            factors = expert.factors(name)
            own_name = prefixes.to_base(name, vectors.base.specs.__contains__)
            assert own_name is not None
            own = vectors.base.read(own_name)
            change = (factors.left.float() * factors.scale) @ factors.right.float()
            head[name] = (own.float() + change.reshape(own.shape)).to(own.dtype)
        else:
            head[name] = expert.read(name).clone()
    if prepared.statistics_with_heads:
        head |= as_stored(vectors, task, statistics or statistics_of(vectors, task))
    return head | extra(expert, prepared.plan.extra_rows.get(task, {}))


def write_heads(
    prepared: Prepared, folder: OutputFolder, statistics: Mapping[str, Statistics] | None = None
) -> dict[str, str]:
    """One folder a task: its head's tensors and the expert's configuration; sha256 by file name of weights.

    And the expert's tokenizer or processor, where that is another than the base's.

    Args:
        prepared: what is merged.
        folder: under construction.
        statistics: BatchNorm statistics of each task's own, where these are not its expert's.
    """
    hashes = {}
    for task in prepared.plan.heads:
        expert = prepared.vectors.experts[task]
        tensors = head_of(prepared, task, (statistics or {}).get(task))
        if tensors:
            name = f"heads/{task}/head.safetensors"
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            metadata = {"format": "pt", **prepared.vocabulary.metadata(task, prepared.plan)}
            hashes[name] = write_tensors(folder.path / name, tensors, metadata)
        if expert.config is not None:
            folder.write_text(
                f"heads/{task}/config.json", json.dumps(expert.config, indent=2, ensure_ascii=False)
            )
        fixed = f"heads/{task}.safetensors"  # a head outside the model, that its encoder was trained under
        if expert.folder is not None and (expert.folder / fixed).is_file():
            folder.copy(expert.folder / fixed, fixed)
            hashes[fixed] = sha256_file(folder.path / fixed)
        tokenizer = prepared.settings.tokenizer == "base" and task not in prepared.plan.extra_rows
        base = prepared.vectors.base.folder
        for path in own_preparation(expert.folder, base, tokenizer=tokenizer):
            folder.copy(path, f"heads/{task}/{path.name}")
    return hashes


def write_fixed_heads(prepared: Prepared, tasks: Iterable[Task], folder: OutputFolder) -> dict[str, str]:
    """The heads that were made for tasks, not trained with their experts, where no expert brought one.

    They go where a fixed head that an expert brings goes too: ``heads/<task>.safetensors``, one matrix
    (classes, width), with the names of the classes. Returns sha256 by file name.
    """
    hashes = {}
    for task in tasks:
        name = f"heads/{task.name}.safetensors"
        if task.fixed_head is None or (folder.path / name).exists():
            continue
        weight = task.fixed_head(prepared.vectors.experts[task.name], prepared.vectors.base)
        about = {} if task.label_names is None else {"labels": json.dumps(list(task.label_names))}
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        hashes[name] = write_tensors(folder.path / name, {"weight": weight}, {"format": "pt", **about})
    return hashes


def write_companions(prepared: Prepared, folder: OutputFolder) -> None:
    """Configuration and whatever else small belongs to the base; the tokenizer of whom it was asked."""
    base, tokenizer = prepared.vectors.base, prepared.settings.tokenizer
    expert = prepared.vectors.experts.get(tokenizer) if tokenizer != "base" else None
    other = None if expert is None else expert.folder
    if base.folder is not None:
        for path, name in companions(base.folder):
            if other is None or not is_tokenizer(name):
                folder.copy(path, name)
    if other is not None:
        for path, name in companions(other):
            if is_tokenizer(name) or name == "generation_config.json":
                folder.copy(path, name)
    for name, text in prepared.vocabulary.files.items():
        folder.write_text(name, text)
    if base.config is not None:
        config = with_dtype(base.config, prepared.settings.dtype)
        config = prepared.vocabulary.resized(config, prepared.plan.entries)
        if expert is not None:  # what ends a text, say, goes with the tokenizer
            config |= {
                key: value for key, value in (expert.config or {}).items() if key.endswith("_token_id")
            }
        folder.write_text("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check_task_names(experts: Mapping[str, Any]) -> None:
    """Refuse names that cannot be those of folders.

    Raises:
        UsageError: no names at all, or some that cannot; all are listed.
    """
    if not experts:
        raise UsageError("no experts: give at least one, as name=path")
    bad = [
        name
        for name in experts
        if not name.strip() or name.startswith(".") or set(name) & set('/\\:*?"<>|\0')
    ]
    if bad:
        raise UsageError(f"names of experts become folder names; these cannot: {', '.join(map(repr, bad))}")


def _check_tokenizer(tokenizer: str, experts: Mapping[str, Any]) -> None:
    if tokenizer not in ("base", "union", *experts):
        raise UsageError(
            f"tokenizer (='{tokenizer}') must be base, union, or an expert: {', '.join(experts)}"
        )


def _refuse_unrelated(vectors: TaskVectors, related: Mapping[str, Relatedness]) -> None:
    strangers = [task for task, found in related.items() if not found.related]
    if strangers:
        raise PlanError(
            [
                f"expert '{task}' ({vectors.experts[task].label}) does not look fine-tuned from "
                f"{vectors.base.label}: the cosine between their weights is {related[task].cosine:.2f}, "
                "of a fine-tuned model about 1"
                for task in strangers
            ],
            f"Give the base that the experts were fine-tuned from (cosine at least {UNRELATED}), "
            "leave these experts out, or go on in spite of it: allow: [unrelated].",
        )


def _check_ties(vectors: TaskVectors) -> None:
    """Tensors that are stored twice though they are tied must be equal."""
    pairs = [("the base", vectors.base, pair) for pair in vectors.plan.base_tied_checks]
    for task, checks in vectors.plan.tied_checks.items():
        pairs += [(f"expert '{task}'", vectors.experts[task], pair) for pair in checks]
    wrong = [
        f"{first} and {second} of {who} ({weights.label}) should be one tied tensor and hold different values"
        for who, weights, (first, second) in pairs
        if not torch.equal(weights.read(first), weights.read(second))
    ]
    if wrong:
        raise PlanError(
            wrong, "Untie the base (tie_word_embeddings: false), or exclude one of the two tensors."
        )


def idle_warnings(vectors: TaskVectors) -> list[str]:
    """Sentences about experts that changed nothing of what is merged while others did (after a full read)."""
    idle = [task for task, names in vectors.changed.items() if not names]
    if len(idle) == len(vectors.changed):
        return []
    said = "is identical to the base in every merged tensor: it adds nothing"
    return [f"expert '{task}' {said}" for task in idle]


def statistics_warning(prepared: Prepared) -> list[str]:
    """One sentence where the merged model has BatchNorm statistics not its own, or each task has some."""
    if prepared.own_statistics:
        return [OWN]
    if not prepared.plan.with_treatment("averaged") or prepared.statistics_with_heads:
        return []
    return [
        "the model has BatchNorm, and its statistics are the mean of the experts', not those of the merged "
        "model: accuracy can fall to half. Give unlabeled data for every expert (--data NAME=FILE, or tasks: "
        "in the recipe) to have them re-estimated"
    ]


def _dtype(settings: Settings) -> torch.dtype | None:
    return None if settings.dtype is None else getattr(torch, settings.dtype)


class _Counter:
    """Adds up what is read, for a progress callback."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self._lock = threading.Lock()

    def __call__(self, values: int) -> None:
        with self._lock:
            self.done += values
            self.progress(min(self.done, self.total), self.total)


def run_record(
    prepared: Prepared,
    started: float,
    inputs: Mapping[Path, str] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What ``run.json`` holds: enough to repeat the merge and to tell whether anything has changed."""
    vectors, settings = prepared.vectors, prepared.settings

    def source(weights: Weights) -> dict[str, Any]:
        files = {path.name: (inputs or {}).get(path) for path in weights.files}
        return {
            "label": weights.label,
            "hub_id": hub_id(weights.label) if weights.folder and not Path(weights.label).exists() else None,
            "sha256": files,
        }

    experts = {task: source(weights) for task, weights in vectors.experts.items()}
    recipe = {"base": vectors.base.label, "experts": {task: w.label for task, w in vectors.experts.items()}}
    return {
        "kind": "merge",
        "recipe": {**recipe, **settings.model_dump(exclude_defaults=True), "method": settings.method},
        "method": prepared.method.name,
        "options": [{name: options} for name, options in settings.chain()],
        "scale": prepared.method.scale if settings.scale is None else settings.scale,
        "seed": prepared.method.seed,
        "base": source(vectors.base),
        "experts": experts,
        "outputs": dict(outputs or {}),
        "config": vectors.base.config is not None,
        "plan": {**prepared.plan.summary(), "notes": list(prepared.plan.notes)},
        "unchanged": list(vectors.unchanged()),
        "warnings": [*idle_warnings(vectors), *statistics_warning(prepared)],
        "relatedness": {
            task: found.cosine for task, found in prepared.relatedness.items() if found.cosine == found.cosine
        },
        "versions": {
            "adamerging": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **prepared.about,
        "threads": settings.threads or torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 3),
    }
