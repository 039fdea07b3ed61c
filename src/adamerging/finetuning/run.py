"""A fine-tuning recipe from start to end: read and check all data, then one expert after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import OutputError, UsageError
from ..naming import architecture
from ..tasks.data import DataKind, Fields, read_samples
from ..tasks.image_classification import image_task
from ..tasks.module import module_task
from ..tasks.resolve import factory, named
from ..tasks.spec import Kind
from ..tasks.task import Samples, Task
from ..tasks.text_classification import embedding_text_task, text_task
from ..weights import Weights, open_weights, sha256_file
from .heads import prompts_of, zero_shot_head
from .learner import Learner, checked, classes_of
from .modules import module_learner
from .processes import Say, default_threads, in_processes
from .record import RECORD, content_key, differences, read_record
from .rescore import is_stale, rescore
from .settings import MULTITASK, FinetuneRecipe, FinetuneSettings, FinetuneTask
from .train import Expert, identify, train
from .transformers_models import embedding_learner, image_learner, text_learner

Status = Literal["to train", "trained", "kept"]
OnStep = Callable[[str, int, int], None]
"""Called with (task, steps done, steps in all)."""

_DATA: Mapping[Kind, DataKind] = {
    "text": "text",
    "text_embedding": "text",
    "image": "image",
    "module": "array",
}
_USES: Mapping[Kind, tuple[str, ...]] = {
    "text": ("pair_field",),
    "text_embedding": ("templates", "scale"),
    "image": (),
    "module": ("model", "model_options", "collate", "forward"),
}
_LATER = frozenset({"collate", "forward"})
"""What records did not say at first. An expert of such a record is kept: nothing tells that they changed."""


@dataclass(frozen=True)
class Outcome:
    """What became of one expert.

    Attributes:
        name: the task; of the joint run ``multitask/<task>``.
        out: its folder.
        status: trained now, or kept from an earlier run of the same settings and data.
        record: what ``finetune.json`` holds; of one that is yet to be trained, its settings.
    """

    name: str
    out: Path
    status: Status
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One training: its learners and folders, checked but not begun."""

    name: str
    settings: FinetuneSettings
    parts: Sequence[Part]
    experts: Sequence[Expert]
    done: bool

    def learners(self) -> list[Learner]:
        """Fresh learners; draws their heads."""
        return [part.learner(self.settings) for part in self.parts]

    def outcomes(self, status: Status) -> list[Outcome]:
        """Of each folder, with its record as it is on disk."""
        pairs = zip(self.parts, self.experts, strict=True)
        prefix = f"{MULTITASK}/" if self.name == MULTITASK else ""
        return [Outcome(prefix + p.name, e.out, status, _record_of(p, e, status)) for p, e in pairs]

    def rescore(self, say: Say) -> None:
        """Score its experts again that were scored on other test data."""
        for part, expert in zip(self.parts, self.experts, strict=True):
            record = read_record(expert.out)
            if record is not None and part.test is not None and is_stale(record, part.test):
                say(self.name, f"{expert.out.name} is kept, and scored on {part.test.source}")
                rescore(expert.out, record, part.scored(), part.base, part.test)


@dataclass(frozen=True)
class Part:
    """One task of a recipe, its data read and checked."""

    name: str
    spec: FinetuneTask
    kind: Kind
    base: Weights
    base_digest: str
    train: Samples
    val: Samples
    test: Samples | None
    label_names: Sequence[str]

    def learner(self, settings: FinetuneSettings) -> Learner:
        """The model that is to be trained."""
        data = (self.name, self.base, self.train, self.val, self.label_names, settings)
        if self.kind == "text":
            return text_learner(*data)
        if self.kind == "text_embedding":
            return embedding_learner(*data, self.head)
        if self.kind == "image":
            return image_learner(*data)
        spec = self.spec
        return module_learner(
            *data, model=factory(str(spec.model), spec.model_options), collate=named(spec.collate),
            forward=named(spec.forward), about={"model": spec.model, "model_options": spec.model_options},
        )  # fmt: skip

    def scored(self) -> Task:
        """The task of its finished expert, to score it on the test data."""
        data: tuple[str, None, Samples | None] = (self.name, None, self.test)
        names, spec = self.label_names, self.spec
        if self.kind == "text":
            return text_task(*data, label_names=names)  # of the length that the expert was trained with
        if self.kind == "text_embedding":
            return embedding_text_task(*data, label_names=names)
        if self.kind == "image":
            return image_task(*data, label_names=names)
        return module_task(
            *data, model=factory(str(spec.model), spec.model_options), collate=named(spec.collate),
            forward=named(spec.forward), label_names=names,
        )  # fmt: skip

    @cached_property
    def head(self) -> torch.Tensor:
        """The zero-shot head of a text_embedding task."""
        prompts = prompts_of(self.label_names, self.spec.templates or ["{}"])
        return zero_shot_head(self.base.folder or self.base.label, prompts, scale=self.spec.scale)

    def identity(self) -> dict[str, Any]:
        """What decides the expert beside the settings of the training."""
        uses = {key: getattr(self.spec, key) for key in ("scale", *_USES[self.kind])}
        return {
            **(uses if self.kind in ("text_embedding", "module") else {}),
            "kind": self.kind,
            "base": self.base_digest,
            "train": self.train.fingerprint,
            "val": self.val.fingerprint,
            "labels": list(self.label_names),
        }


def finetune(
    recipe: FinetuneRecipe,
    *,
    dry_run: bool = False,
    say: Say = lambda task, line: None,
    on_step: OnStep = lambda task, step, total: None,
) -> list[Outcome]:
    """Make the experts of a recipe, each in a folder of its own.

    All data is read and checked before anything is trained. An expert that an earlier run has made from the
    same settings, data and base is kept; a run that was interrupted goes on with the task where it stopped.
    One that is kept is scored again where its test data are others than then.

    Args:
        recipe: see `load_finetune_recipe`.
        dry_run: check all, train nothing.
        say: called with the task and a line at every evaluation.
        on_step: called with the task, the steps done, and the steps in all.

    Returns:
        One outcome for each task, in the recipe's order; those of the joint run last.

    Raises:
        UsageError: data, labels or settings that do not fit; of all tasks in one message.
        WeightsError: the base cannot be opened.
        OutputError: an expert's folder exists and was made otherwise, or cannot be written.
        NonFiniteError: a training loss became NaN or infinite.
    """
    jobs = prepare(recipe)
    waiting = [] if dry_run else [job for job in jobs if not job.done]
    if recipe.jobs > 1 and len(waiting) > 1:
        plain = recipe.model_dump(exclude_unset=True)
        calls = {job.name: (plain, job.name) for job in waiting}
        threads = recipe.threads or default_threads(recipe.jobs)
        in_processes(_in_process, calls, jobs=recipe.jobs, threads=threads, say=say)
    else:
        with torch_threads(recipe.threads):
            for job in waiting:
                run_job(job, recipe.device, say, on_step)
    if not dry_run:
        with torch_threads(recipe.threads):
            for job in jobs:
                if job.done:
                    job.rescore(say)
    trained: Status = "to train" if dry_run else "trained"
    return [outcome for job in jobs for outcome in job.outcomes("kept" if job.done else trained)]


def prepare(recipe: FinetuneRecipe) -> list[Job]:
    """Read and check everything. Raises as `finetune`."""
    if recipe.out is None:
        raise UsageError("no output folder: give --out FOLDER, or out: in the recipe")
    parts = read_parts(recipe.tasks, open_weights(recipe.base))
    out = Path(recipe.out).expanduser()
    again = recipe.overwrite
    jobs = [
        make_job(part.name, [part], recipe.settings_of(part.name), out, overwrite=again) for part in parts
    ]
    if recipe.multitask:
        settings = recipe.together(recipe.multitask)
        if settings.lora is not None:
            raise UsageError("multitask trains whole weights; give it lora: null among its own settings")
        jobs.append(make_job(MULTITASK, parts, settings, out / MULTITASK, overwrite=again))
    return jobs


def read_parts(tasks: Mapping[str, FinetuneTask], base: Weights) -> list[Part]:
    """Read and check the data of every task. Raises as `finetune`."""
    digest = digest_of(base)
    parts, problems = [], []
    for name, spec in tasks.items():
        try:
            parts.append(_part(name, spec, base, digest))
        except UsageError as error:
            problems.append(str(error))
    if problems:
        many = problems[0] if len(problems) == 1 else "\n".join(f"  - {text}" for text in problems)
        raise UsageError(many if len(problems) == 1 else f"{len(problems)} tasks cannot be trained:\n{many}")
    return parts


def make_job(
    name: str, parts: Sequence[Part], settings: FinetuneSettings, out: Path, *, overwrite: bool
) -> Job:
    """One training of one task, or of several over one body, into ``out/<task>``.

    Raises:
        OutputError: a folder holds something else and may not be replaced.
    """
    about = [part.identity() for part in parts]
    if len(parts) > 1:
        together = [each["train"] for each in about]
        about = [{**each, "together": together} for each in about]
    experts = [
        Expert(out / part.name, *identify(settings, each), part.test)
        for part, each in zip(parts, about, strict=True)
    ]
    done = [is_done(expert, overwrite=overwrite) for expert in experts]
    return Job(name, settings, parts, experts, all(done))


def is_done(expert: Expert, *, overwrite: bool) -> bool:
    """Whether the folder holds this very expert.

    Raises:
        OutputError: it holds another one, or something else, and may not be replaced.
    """
    if not expert.out.exists():
        return False
    record = read_record(expert.out)
    if record is not None and record.get("key") == (_former_key(record, expert) or expert.key):
        return True
    if overwrite:
        return False
    if record is None:
        raise OutputError(
            f"{expert.out} exists and holds no {RECORD}, so it is no expert of an earlier run; choose "
            "another --out or remove it"
        )
    plain = json.loads(json.dumps(dict(expert.settings), default=str))
    found = differences(record.get("settings") or {}, plain)
    raise OutputError(
        f"{expert.out} was made otherwise: {'; '.join(found) or 'by another version'}. Choose another "
        "--out, or pass --overwrite to train it again"
    )


def _former_key(record: Mapping[str, Any], expert: Expert) -> str | None:
    """The key that the expert had while `_LATER` was not counted; None where the record is of after that."""
    if _LATER & (record.get("settings") or {}).keys():
        return None
    own = {name: expert.settings[name] for name in FinetuneSettings.model_fields}
    others = {name: v for name, v in expert.settings.items() if name not in {*own, *_LATER}}
    return identify(FinetuneSettings.model_validate(own), others)[1]


def _record_of(part: Part, expert: Expert, status: Status) -> dict[str, Any]:
    """What an outcome says: of what is yet to be trained, nothing that an earlier training was."""
    record = read_record(expert.out) if status != "to train" else None
    if record is None:
        return {"settings": expert.settings}
    stale = is_stale(record, part.test)
    return {name: value for name, value in record.items() if not (stale and name == "test_accuracy")}


def run_job(job: Job, device: str | None, say: Say, on_step: OnStep) -> None:
    """Train, and write the folders."""
    existing = any(expert.out.exists() for expert in job.experts)
    train(
        job.learners, job.experts, job.settings, device=device,
        overwrite=existing, say=lambda line: say(job.name, line),
        on_step=lambda step, total: on_step(job.name, step, total),
    )  # fmt: skip


def _in_process(say: Say, plain: dict[str, Any], name: str) -> None:
    """Train one expert, or the joint run, of a recipe as plain data."""
    recipe = FinetuneRecipe.model_validate(plain)
    if name != MULTITASK:
        recipe = recipe.model_copy(update={"tasks": {name: recipe.tasks[name]}, "multitask": False})
    for job in prepare(recipe):
        if job.name == name and not job.done:
            run_job(job, recipe.device, say, lambda task, step, total: None)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Train with so many threads, and set the number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _part(name: str, spec: FinetuneTask, base: Weights, digest: str) -> Part:
    kind = spec.kind or _guess_kind(name, spec, base)
    if kind not in _USES:
        raise UsageError(f"task '{name}': kind {kind} cannot be trained, only {', '.join(_USES)}")
    useless = [key for each in _USES.values() for key in each if key not in _USES[kind]]
    given = [key for key in useless if key in spec.model_fields_set and getattr(spec, key)]
    if given:
        raise UsageError(f"task '{name}' is of kind {kind}, which has no use for: {', '.join(given)}")
    if kind == "module" and spec.model is None:
        raise UsageError(f"task '{name}' is of kind module: name what makes its model, package.module:name")
    fields = Fields(spec.input_field, spec.label_field, spec.pair_field)

    def read(which: str, source: str) -> Samples:
        try:
            return read_samples(source, _DATA[kind], fields)
        except UsageError as error:
            raise UsageError(f"task '{name}', {which}: {error}") from None

    found = {"train": read("train", spec.train), "val": read("val", spec.val)}
    if spec.test is not None:
        found["test"] = read("test", spec.test)
    names = _label_names(name, spec.label_names) or classes_of(found["train"])
    if len(names) == 1:
        raise UsageError(f"task '{name}' has one class alone, {names[0]!r}: there is nothing to tell apart")
    good = {which: checked(name, which, samples, names) for which, samples in found.items()}
    return Part(name, spec, kind, base, digest, good["train"], good["val"], good.get("test"), names)


def _guess_kind(name: str, spec: FinetuneTask, base: Weights) -> Kind:
    if spec.model is not None:
        return "module"
    config = base.config or {}
    if "vocab_size" in config and "vision_config" not in config:
        return "text_embedding" if spec.templates else "text"
    if "image_size" in config or "num_channels" in config:
        return "image"
    raise UsageError(
        f"task '{name}': the base {base.label} ({architecture(base.config) or 'no configuration'}) does not "
        "tell what kind of task this is; give kind: text, text_embedding, image or module"
    )


def _label_names(name: str, given: list[str] | str | None) -> list[str] | None:
    if not isinstance(given, str):
        return given
    try:
        found = json.loads(Path(given).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"task '{name}', label_names: {given} cannot be read as JSON: {error}") from None
    found = found.get("label_names") if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise UsageError(
            f"task '{name}', label_names: {given} must hold a list of names, or an object with label_names"
        )
    return found


def digest_of(base: Weights) -> str:
    """sha256 over the base's files."""
    return content_key({path.name: sha256_file(path) for path in base.files})
