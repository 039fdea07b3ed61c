"""A sharing recipe from start to end: train each task over the base, choose its penalty, write the store."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import OutputError, UsageError
from ..finetuning.learner import Learner
from ..finetuning.processes import Say, default_threads, in_processes
from ..finetuning.record import read_record
from ..finetuning.run import Job, OnStep, Part, is_done, make_job, read_parts, run_job, torch_threads
from ..finetuning.settings import FinetuneSettings
from ..finetuning.train import Expert, identify, prepare_learner, seeded, train, where
from ..weights import Weights, open_weights
from ..weights.shared_store import is_store, read_index
from .collect import FIGURES, load_task, names_in_base, saver
from .joint import joint_base
from .settings import JOINT, ShareRecipe, TapsSettings
from .shared_task import SharedTask
from .store import write_store
from .taps import gate_layers

Status = Literal["to train", "trained", "kept"]


@dataclass(frozen=True)
class Trial:
    """One task trained with one penalty.

    Attributes:
        task: its name.
        penalty: λ.
        folder: where it is.
        status: trained now, or kept from an earlier run of the same settings and data.
        record: what ``finetune.json`` holds: accuracies, history, settings.
        figures: what ``gates.json`` holds: open layers, numbers of parameters, scores.
    """

    task: str
    penalty: float
    folder: Path
    status: Status
    record: Mapping[str, Any] = field(repr=False)
    figures: Mapping[str, Any] = field(repr=False)

    @property
    def parameters(self) -> int:
        """Values that the task adds to the base: changes, small tensors, head."""
        return sum(self.figures["parameters"].values())


@dataclass(frozen=True)
class FrontierPoint:
    """All tasks with one penalty, or each with the one chosen for it.

    Attributes:
        penalty: λ; None where each task has its own.
        val_accuracy: mean over the tasks, from 0 to 1.
        test_accuracy: the same; None where a task has no test data.
        multiple: parameters of base and tasks together, as a multiple of the base's.
        open_share: mean share of the gated layers that are open.
    """

    penalty: float | None
    val_accuracy: float
    test_accuracy: float | None
    multiple: float
    open_share: float


@dataclass(frozen=True)
class ShareResult:
    """What a run of a sharing recipe made.

    Attributes:
        out: the store's folder.
        base: the base that the tasks share: as given to `open_weights`.
        base_parameters: number of its values that the tasks' models have; its own head is none of theirs.
        trials: every task with every penalty, in the recipe's order; none of them trained in a dry run.
        chosen: the trial of each task of the recipe that is stored; empty in a dry run.
        others: tasks that the store has from earlier runs, and keeps.
    """

    out: Path
    base: str
    base_parameters: int
    trials: Sequence[Trial]
    chosen: Mapping[str, Trial]
    others: Mapping[str, Trial] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> dict[str, SharedTask]:
        """The stored tasks, their tensors memory-mapped."""
        return {name: load_task(trial.folder) for name, trial in {**self.others, **self.chosen}.items()}

    @cached_property
    def frontier(self) -> list[FrontierPoint]:
        """Accuracy against parameters: a point for each penalty, the chosen ones last."""
        if not self.chosen:
            return []
        penalties = list(dict.fromkeys(trial.penalty for trial in self.trials))
        points = [
            self._point(penalty, [trial for trial in self.trials if trial.penalty == penalty])
            for penalty in penalties
        ]
        return points if len(points) == 1 else [*points, self._point(None, list(self.chosen.values()))]

    def record(self) -> dict[str, Any]:
        """All of it but the tensors, as plain data."""
        return {
            "kind": "share",
            "base": self.base,
            "base_parameters": self.base_parameters,
            "tasks": {name: _plain(trial) for name, trial in {**self.others, **self.chosen}.items()},
            "trials": [_plain(trial) for trial in self.trials],
            "frontier": [vars(point) for point in self.frontier],
        }

    def _point(self, penalty: float | None, trials: Sequence[Trial]) -> FrontierPoint:
        tests = [trial.record["test_accuracy"] for trial in trials]
        count = len(trials)
        return FrontierPoint(
            penalty,
            sum(trial.record["val_accuracy"] for trial in trials) / count,
            None if None in tests else sum(tests) / count,
            1 + sum(trial.parameters for trial in trials) / self.base_parameters,
            sum(trial.figures["open"] / trial.figures["layers"] for trial in trials) / count,
        )


def share(
    recipe: ShareRecipe,
    *,
    dry_run: bool = False,
    say: Say = lambda task, line: None,
    on_step: OnStep = lambda task, step, total: None,
) -> ShareResult:
    """Train tasks that share a base, each with the few layers of its own that it needs (TAPS).

    Every task is trained from the base alone, which stays as it is: their order does not matter, and adding
    one changes no other (arXiv 2203.16708). Trainings go to ``out.tasks/<task>/penalty-<λ>``; one of an
    earlier run with the same settings, data and base is kept, so that a run that was stopped goes on. The
    store at ``out`` appears whole.

    Args:
        recipe: see `load_share_recipe`.
        dry_run: check all, train nothing.
        say: called with the task and a line at every evaluation.
        on_step: called with the task, the steps done, and the steps in all.

    Raises:
        UsageError: data, labels, settings or gates that do not fit.
        WeightsError: the base cannot be opened.
        OutputError: a training of another recipe is in the way, or the output cannot be written.
        NonFiniteError: a training loss became NaN or infinite.
    """
    if recipe.out is None:
        raise UsageError("no output folder: give --out FOLDER, or out: in the recipe")
    out = Path(recipe.out).expanduser()
    work = _beside(out)
    source = recipe.base
    parts = read_parts(recipe.tasks, open_weights(source))
    for part in parts:
        _check_gates(part, recipe)
    with torch_threads(recipe.threads):
        base_is_there = True
        if recipe.joint:
            job = _joint_job(parts, recipe, work / JOINT)
            base_is_there = job.done or not dry_run
            if base_is_there:
                source = _joint(job, recipe, work / JOINT, say, on_step)
                parts = read_parts(recipe.tasks, open_weights(source))
        waiting = [
            _waiting(part, penalty, recipe, work, fresh=not base_is_there)
            for part in parts
            for penalty in recipe.penalties()
        ]
        others = _others(out, work, parts[0], recipe)
        if not dry_run:
            _train(waiting, recipe, source, say, on_step)
    status: Status = "to train" if dry_run else "trained"
    trials = [each.outcome(status) for each in waiting]
    chosen = {} if dry_run else {part.name: _choose(part.name, trials, recipe.tolerance) for part in parts}
    whole = sum(spec.numel for spec in parts[0].base.specs.values())
    size = max((trial.figures["body"] for trial in trials if "body" in trial.figures), default=whole)
    result = ShareResult(out, source, size, trials, chosen, others)
    for name, trial in chosen.items():
        if not trial.figures["open"]:
            say(name, _nothing_open(trial))
    if not dry_run:
        save(result, out)
    return result


def save(result: ShareResult, out: Path) -> None:
    """Write the store of the chosen trials, unless it is there already."""
    record = json.loads(json.dumps(result.record(), default=str))
    if is_store(out) and _keys(read_index(out).record) == _keys(record):
        return
    write_store(out, result.base, result.tasks, record, overwrite=True)


def _keys(record: Mapping[str, Any]) -> dict[str, str]:
    """What identifies the training of each task of a store."""
    return {name: task.get("key") for name, task in record.get("tasks", {}).items()}


def _others(out: Path, work: Path, part: Part, recipe: ShareRecipe) -> dict[str, Trial]:
    """The tasks that the store has beside the recipe's, from earlier runs over the same base.

    Raises:
        OutputError: ``out`` is something else, or has tasks that no training is left of, and may not be
            replaced.
    """
    if not out.exists():
        return {}
    if not is_store(out):
        raise OutputError(f"{out} exists and is no store; choose another --out, or remove it")
    found = read_index(out).record.get("tasks", {}) if not recipe.overwrite else {}
    others, lost = {}, []
    for name, task in found.items():
        folder = work / name / f"penalty-{task.get('penalty', 0):g}"
        record = read_record(folder) or {}
        if name in recipe.tasks:
            continue
        if record.get("key") == task.get("key") and record["settings"]["base"] == part.base_digest:
            others[name] = Trial(name, task["penalty"], folder, "kept", record, _read_figures(folder))
        else:
            lost.append(name)
    if lost or (not found and not recipe.overwrite):
        which = f"the tasks {', '.join(lost)}" if lost else "tasks"
        raise OutputError(
            f"{out} has {which} of another base, or of which {work} holds no training; they would be lost. "
            "Choose another --out, or pass --overwrite to replace the store"
        )
    return others


@dataclass(frozen=True)
class _Waiting:
    """One task and penalty, checked but not begun."""

    part: Part
    gates: TapsSettings
    settings: FinetuneSettings
    expert: Expert
    done: bool

    def run(self, recipe: ShareRecipe, say: Say, on_step: OnStep) -> None:
        """Train."""
        name = self.part.name
        if recipe.sweep is not None:
            name += f", penalty {self.gates.penalty:g}"
        self.expert.out.parent.mkdir(parents=True, exist_ok=True)
        train(
            lambda: [self.part.learner(self.settings)], [self.expert], self.settings, device=recipe.device,
            overwrite=self.expert.out.exists(),
            dress=lambda learner: gated(learner, self.gates, self.part.base, self.settings),
            say=lambda line: say(name, line), on_step=lambda step, total: on_step(name, step, total),
        )  # fmt: skip

    def outcome(self, status: Status) -> Trial:
        """The trial, with its record as it is on disk."""
        folder = self.expert.out
        record = read_record(folder) if self.done or status == "trained" else None
        return Trial(
            self.part.name, self.gates.penalty, folder, "kept" if self.done else status,
            record or {"settings": self.expert.settings}, _read_figures(folder) if record else {},
        )  # fmt: skip


def _waiting(part: Part, penalty: float, recipe: ShareRecipe, work: Path, *, fresh: bool) -> _Waiting:
    gates = recipe.gates.model_copy(update={"penalty": float(penalty)})
    settings = recipe.settings_of(part.name)
    about = {**part.identity(), "gates": gates.model_dump()}
    expert = Expert(work / part.name / f"penalty-{penalty:g}", *identify(settings, about), part.test)
    done = not fresh and is_done(expert, overwrite=recipe.overwrite)
    return _Waiting(part, gates, settings, expert, done)


def _train(every: Sequence[_Waiting], recipe: ShareRecipe, source: str, say: Say, on_step: OnStep) -> None:
    """Train what is not done; with ``jobs`` several at a time."""
    waiting = [each for each in every if not each.done]
    if recipe.jobs == 1 or len(waiting) < 2:
        for each in waiting:
            each.run(recipe, say, on_step)
        return
    plain = {**recipe.model_dump(exclude_unset=True), "base": source, "joint": False}
    calls = {
        f"{each.part.name}, penalty {each.gates.penalty:g}": (plain, each.part.name, each.gates.penalty)
        for each in waiting
    }
    threads = recipe.threads or default_threads(recipe.jobs)
    in_processes(_in_process, calls, jobs=recipe.jobs, threads=threads, say=say)


def _in_process(say: Say, plain: dict[str, Any], name: str, penalty: float) -> None:
    """Train one task with one penalty of a recipe as plain data."""
    recipe = ShareRecipe.model_validate(plain)
    (part,) = read_parts({name: recipe.tasks[name]}, open_weights(recipe.base))
    work = _beside(Path(str(recipe.out)))
    _waiting(part, penalty, recipe, work, fresh=True).run(recipe, say, lambda task, step, total: None)


def _beside(out: Path) -> Path:
    """Folder of the trainings of a store."""
    out = out.expanduser()
    return out.with_name(f"{out.name}.tasks")


def gated(learner: Learner, settings: TapsSettings, base: Weights, training: FinetuneSettings) -> Learner:
    """A learner whose layers are gated, and that is saved as what its task adds to the base."""
    in_base = names_in_base(learner.module, base)
    steps = round(training.epochs * math.ceil(len(learner.train) / training.batch_size))
    gates = gate_layers(learner.module, settings, head=learner.head, steps=steps)
    learner.save = saver(learner, gates, in_base)
    learner.aim = gates
    return learner


def _check_gates(part: Part, recipe: ShareRecipe) -> None:
    """Refuse gates that do not fit before anything is trained."""
    settings, cpu = recipe.settings_of(part.name), where("cpu")
    with seeded(settings.seed, cpu):
        learner = part.learner(settings)
        prepare_learner(learner, settings, cpu)
        try:
            gated(learner, recipe.gates, part.base, settings)
        except UsageError as error:
            raise UsageError(f"task '{part.name}': {error}") from None


def _choose(name: str, trials: Sequence[Trial], tolerance: float) -> Trial:
    """The trial with the fewest parameters whose accuracy on val is within ``tolerance`` of the best."""
    mine = [trial for trial in trials if trial.task == name]
    best = max(trial.record["val_accuracy"] for trial in mine)
    good = [trial for trial in mine if trial.record["val_accuracy"] >= best - tolerance]
    return min(good, key=lambda trial: (trial.parameters, -trial.record["val_accuracy"]))


def _joint_job(parts: Sequence[Part], recipe: ShareRecipe, folder: Path) -> Job:
    if len(parts) < 2:
        raise UsageError("joint trains one base on several tasks, and the recipe has one alone")
    settings: FinetuneSettings = recipe.together(recipe.joint)
    if settings.lora is not None:
        raise UsageError("joint trains whole weights; give it lora: null among its own settings")
    return make_job(JOINT, parts, settings, folder / "tasks", overwrite=recipe.overwrite)


def _joint(job: Job, recipe: ShareRecipe, folder: Path, say: Say, on_step: OnStep) -> str:
    """Train the base that the tasks share on all of them; its folder."""
    if not job.done:
        (folder / "tasks").mkdir(parents=True, exist_ok=True)
        run_job(job, recipe.device, say, on_step)
    return str(joint_base(open_weights(recipe.base), job.experts, folder / "base"))


def _nothing_open(trial: Trial) -> str:
    own = trial.figures["parameters"]["own"]
    small = " and its own biases and norms" if own else ""
    return (
        f"no layer is open at penalty {trial.penalty:g}: the task has the base with a head of its own{small}"
        ", a linear probe; a lower penalty opens layers"
    )


def _read_figures(folder: Path) -> dict[str, Any]:
    path = folder / FIGURES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _plain(trial: Trial) -> dict[str, Any]:
    keys = ("val_accuracy", "test_accuracy", "best_epoch", "epochs_run", "seconds", "key", "settings")
    found = {key: trial.record[key] for key in keys if key in trial.record}
    return {"task": trial.task, "penalty": trial.penalty, "status": trial.status, **found, **trial.figures}
