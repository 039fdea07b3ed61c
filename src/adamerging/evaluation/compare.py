"""A comparison from start to end: open once, make and score row after row, keep each as it comes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import __version__
from ..adaptation.cache import key as content_key
from ..adaptation.loop import InterruptedRun
from ..adaptation.state import discard_state
from ..allocator import give_back_freed_memory
from ..errors import AdamergingError, UsageError
from ..geometry import geometry
from ..recipe import Recipe, Settings, load_recipe
from ..run import Prepared, prepare
from ..sharing.layer_map import map_of_experts
from ..stream import Workers
from ..tasks.resolve import make_tasks
from ..tasks.task import Task
from ..validation import Problems, make
from .bench import Bench, Reference, Seat, class_names_of, normalised, reference_of
from .beside import Beside, open_beside
from .choosing import check_choices, choose
from .entries import Wanted, wanted
from .explaining import explain, explains
from .making import Made, Maker
from .outsiders import Outsiders, plan_outsiders, seat_outsiders
from .pace import pace
from .planning import Outlook, Planned, outlook, plan_rows, scoring_of
from .records import (
    AVERAGE,
    BASE,
    CLEAN,
    EXPERTS,
    Comparison,
    Row,
    ScoreRecord,
    TaskRecord,
    label_of_expert,
)
from .settings import CompareSettings
from .shift import check_shift
from .shifted import adapted_anew, times_anew
from .slicing import check_slice, slice_record, still_true
from .store import RunFolder, row_name
from .usage import PeakMemory

Say = Callable[[str], None]
OnRow = Callable[[Row], None]
OnPlan = Callable[[Outlook], None]


def compare(
    recipe: Recipe | str | Path,
    *,
    out: str | Path,
    say: Say = lambda _: None,
    on_row: OnRow = lambda _: None,
    on_plan: OnPlan | None = None,
    command: str | None = None,
    **settings: Any,
) -> Comparison:
    """Compare merged models with their base, their experts and the simple average.

    Every row is written as soon as it is done. The same call goes on where an earlier one stopped, and
    computes again what depends on anything that has changed. A method that fails is a row with its reason.

    Args:
        recipe: base, experts, tasks with data, and the `compare` section; or the file with it.
        out: folder of the records.
        say: told what takes time.
        on_row: told of every row as it is done.
        on_plan: told how many rows there are and what they take, before the first is made.
        command: what a reader may type to run this again, for the record.
        settings: fields of `CompareSettings` that replace the recipe's: methods, seeds, limit, ...

    Raises:
        UsageError: nothing to score on, unknown methods, settings or data that cannot be right; before
            anything is computed.
        WeightsError: base or an expert cannot be opened.
        PlanError: they do not belong together.
        OutputError: the folder cannot be written, or another run is at work in it.
        InterruptedRun: stopped by the user; what is done is kept.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    fields = recipe.compare.model_dump(exclude_unset=True) if recipe.compare is not None else {}
    chosen = make(CompareSettings, {**fields, **settings}, "compare")
    asked = wanted(recipe, chosen.methods)
    if not any(task.evaluate for task in recipe.tasks.values()):
        raise UsageError(
            "there is nothing to score on: give labelled data under tasks, NAME: {evaluate: FILE}"
        )
    prepared = open_recipe(recipe)
    vectors = prepared.vectors
    tasks = make_tasks(recipe.tasks, vectors.experts, vectors.base, transductive=recipe.transductive)
    tasks = in_order(tasks, vectors.tasks)
    labels = {BASE, EXPERTS, AVERAGE, *map(label_of_expert, recipe.experts)}
    labels |= {item.row_label for item in asked}
    outsiders, models = _checked(chosen, tasks, prepared, labels, asked)
    folder = RunFolder(out)
    device = recipe.adapt.device if recipe.adapt is not None else "cpu"
    with folder.locked(), Workers(prepared.settings.threads) as workers:
        say("opening the models")
        bench = Bench(prepared, tasks, chosen, workers, device)
        seat_outsiders(bench, outsiders, say)
        planned = plan_rows(
            vectors.tasks, bench.scored_tasks(), asked, chosen.seeds, list(outsiders.tasks), outsiders.groups,
            models,
        )  # fmt: skip
        there = {row.name for row in planned if folder.find_row(row.name, row.key(bench)) is not None}
        if on_plan is not None:
            on_plan(outlook(planned, there, anew=times_anew(bench), pace=pace(bench)))
        return _Run(recipe, bench, folder, planned, say, on_row, command).run()


def _checked(
    settings: CompareSettings,
    tasks: Sequence[Task],
    prepared: Prepared,
    labels: Collection[str],
    asked: Sequence[Wanted],
) -> tuple[Outsiders, list[Beside]]:
    """Refuse what makes no sense for these tasks, all of it at once, before anything is computed."""
    problems, outsiders, models = Problems(), Outsiders(), list[Beside]()
    with problems.gathered():
        scored = [task.name for task in tasks if task.evaluate is not None]
        models = open_beside(settings.models, scored, labels, base=prepared.vectors.base)
    with problems.gathered():
        if settings.shift is not None:
            check_shift(settings.shift, tasks)
    with problems.gathered():
        outsiders = plan_outsiders(settings.unseen, tasks, prepared)
    with problems.gathered():
        check_slice(settings, tasks)
    with problems.gathered():
        check_choices(asked, tasks)
    problems.refuse("compare")
    return outsiders, models


def open_recipe(recipe: Recipe) -> Prepared:
    """Base and experts of a recipe, opened and planned; its method is no matter.

    Raises:
        UsageError: a tokenizer other than the base's.
        AdamergingError: as `run.merge`.
    """
    if recipe.tokenizer != "base":
        raise UsageError("data goes through the base's tokenizer; tokenizer: base")
    fields = recipe.model_dump(include=set(Settings.model_fields) - {"method", "options", "scale", "weights"})
    settings = Settings.model_validate({**fields, "method": "weighted"})
    experts = {name: expert.path for name, expert in recipe.experts.items()}
    return prepare(recipe.base, experts, settings, notes=recipe.notes)


def in_order(tasks: Sequence[Task], experts: Sequence[str]) -> list[Task]:
    """The tasks in the experts' order."""
    return sorted(tasks, key=lambda task: list(experts).index(task.name))


class _Run:
    """The rows of one comparison, one after the other."""

    def __init__(
        self,
        recipe: Recipe,
        bench: Bench,
        folder: RunFolder,
        planned: Sequence[Planned],
        say: Say,
        on_row: OnRow,
        command: str | None,
    ) -> None:
        self.command = command
        self.recipe, self.bench, self.folder, self.planned = recipe, bench, folder, planned
        self.say, self.on_row = say, on_row
        self.references: dict[Reference, float] = {}
        self.complete = False  # whether the references are
        self.expert_logits: dict[str, Tensor] = {}
        self.rows: dict[str, Row] = {}

    def run(self) -> Comparison:
        record = self._record()
        self.folder.write_run(record)
        # Experts and base come first: the others are measured by them.
        first = {"expert": 0, "base": 1}
        order = sorted(self.planned, key=lambda row: first.get(row.kind, 2) if row.group is None else 3)
        try:
            for number, planned in enumerate(order, 1):
                self._row(planned, f"{number}/{len(order)}")
                if planned.kind == "base" and planned.group is None:
                    self._measure_references()
            record = record.model_copy(update={"slice": record.slice or self._slice(record.geometry)})
        except (KeyboardInterrupt, InterruptedRun):
            raise InterruptedRun(
                f"stopped; {len(self.rows)} of {len(self.planned)} rows are in {self.folder.path}, and the "
                "same command goes on"
            ) from None
        record = record.model_copy(update={"complete": True})
        self.folder.write_run(record)
        return record.model_copy(update={"rows": [self.rows[planned.name] for planned in self.planned]})

    def _row(self, planned: Planned, number: str) -> None:
        name = planned.name
        key = planned.key(self.bench)
        row = self.folder.find_row(name, key)
        if row is None:
            about = "" if planned.seed is None else f", seed {planned.seed}"
            self.say(f"{number} {planned.label}{about}")
            row = self._computed(planned, key)
            self.folder.write_row(name, row)
        self._refer(planned, row.scores)
        self.rows[name] = self._measured(name, row) if self.complete else row
        self.on_row(self.rows[name])

    def _refer(self, planned: Planned, scores: Sequence[ScoreRecord]) -> None:
        """Keep what others are measured by: experts on their own tasks, the base on unseen ones."""
        for score in scores:
            own = planned.kind == "expert" and score.task in planned.experts and not score.unseen
            if own or (planned.kind == "base" and score.unseen):
                self.references[reference_of(score)] = score.accuracy

    def _measure_references(self) -> None:
        """Measure the rows of the references by each other, which takes all of them."""
        self.complete = True
        for name, row in self.rows.items():
            self.rows[name] = self._measured(name, row)

    def _measured(self, name: str, row: Row) -> Row:
        """A row measured by the references, which may be others than when it was written."""
        scores = normalised(row.scores, self.references)
        if scores != row.scores:
            row = row.model_copy(update={"scores": scores})
            self.folder.write_row(name, row)
        return row

    def _computed(self, planned: Planned, key: str) -> Row:
        row = Row(
            label=planned.label, kind=planned.kind, seed=planned.seed, group=planned.group,
            experts=list(planned.experts), key=key,
        )  # fmt: skip
        whole = self._whole(planned)
        if whole is not None:
            own = {(name, False) for name in planned.tasks}
            scores = [s for s in whole.scores if s.condition == CLEAN and (s.task, s.unseen) in own]
            return whole.model_copy(update={"group": planned.group, "key": key, "scores": scores, "why": {}})
        state = self.folder.state(content_key(key))
        maker = Maker(self.bench, planned.experts, say=self.say)
        try:
            if planned.beside is not None:
                return row.model_copy(update=self._beside(planned.beside))
            if planned.kind not in ("base", "expert") and self._explains(planned):
                self._ask_experts(planned.tasks)
            give_back_freed_memory()  # of the row before, whose memory this one's figure would show
            with PeakMemory() as memory:
                made, update = self._made(planned, maker, state)
            row = row.model_copy(update=update)
            row = row.model_copy(update=self._scored(planned, made, maker, row))
        except (InterruptedRun, KeyboardInterrupt):
            raise
        except AdamergingError as error:
            return row.model_copy(update={"failed": str(error)})
        except Exception as error:  # one method's defect is no reason to lose the others' rows
            return row.model_copy(update={"failed": f"{type(error).__name__}: {error}"})
        discard_state(state)
        adapted = made.adapted and self.recipe.transductive
        return row.model_copy(
            update={
                "memory": memory.nbytes,
                "seconds": round(made.seconds, 3),
                "labelled": made.labelled,
                "transductive": adapted,
                "warnings": list(made.warnings),
                "history": [dict(record) for record in made.history],
                "coefficients": made.coefficients,
                "parameters": made.parameters,
            }
        )

    def _beside(self, model: Beside) -> dict[str, Any]:
        """What the row of a model made elsewhere says: there is nothing to make."""
        scores = normalised(list(model.scores(self.bench, self.recipe.tasks)), self.references)
        folders = {task: str(folder) for task, folder in model.folders.items()}
        return {"scores": scores, "settings": {"model": folders}}

    def _explains(self, planned: Planned) -> bool:
        """Whether a row is explained: those of all experts are."""
        return planned.group is None and explains(self.bench.settings)

    def _whole(self, planned: Planned) -> Row | None:
        """The row of all experts that a group's row would only repeat."""
        if planned.group is None or set(planned.experts) != set(self.bench.prepared.vectors.tasks):
            return None
        row = self.rows.get(row_name(planned.label, None, planned.seed))
        return row if row is not None and row.failed is None and planned.kind != "base" else None

    def _made(self, planned: Planned, maker: Maker, state: Path) -> tuple[Made, dict[str, Any]]:
        """The body made that model, and what the row says of how it was chosen."""
        if planned.kind == "base":
            return maker.base(), {}
        if planned.kind == "expert":
            return maker.expert(planned.experts[0]), {}
        if planned.wanted is None:
            return maker.average(), {"settings": {"method": "average"}}
        choice = choose(planned.wanted, planned.seed, maker, self.bench, planned.tasks, state)
        return choice.made, {"settings": choice.settings, "chosen_on": choice.chosen_on}

    def _scored(self, planned: Planned, made: Made, maker: Maker, row: Row) -> dict[str, Any]:
        """Scores under every condition, and what explains them."""
        bench, whole = self.bench, self.bench.fingerprint()
        keep_logits = self._explains(planned)
        wants = keep_logits and planned.kind != "expert"
        records: list[ScoreRecord] = []
        logits: dict[str, Tensor] = {}
        own = planned.experts if planned.kind == "expert" else planned.tasks
        anew = adapted_anew(bench.settings, made) if planned.group is None else None
        for task in own:
            with made.model_for(task, bench, whole) as model:
                scored = bench.score(model, task, logits=keep_logits)
                records.append(scored.record)
                if scored.result.logits is not None:
                    logits[task] = scored.result.logits
                if not anew and planned.group is None:
                    for condition, samples in bench.conditions(task):
                        records.append(bench.score(model, task, samples, condition).record)
        if planned.kind == "expert":
            name = planned.experts[0]
            self.expert_logits |= logits
            for task, under in bench.answers(name):
                records.append(bench.score(whole, task, under=under).record)
        if not made.per_task:  # a model for each task has none for a task without
            records += [bench.score(whole, task, unseen=True).record for task in planned.unseen]
        self._refer(planned, records)
        if anew:
            records += anew(planned, maker, row)
        why = explain(bench, logits, self.expert_logits) if wants else {}
        return {"scores": normalised(records, self.references), "fingerprint": whole, "why": why}

    def _ask_experts(self, tasks: Sequence[str]) -> None:
        """The experts' own logits, to see where a merged model differs; from the cache where they are."""
        for task in tasks:
            if task in self.expert_logits or task not in self.bench.prepared.vectors.tasks:
                continue
            Maker(self.bench, (task,)).expert(task)
            scored = self.bench.score(self.bench.fingerprint(), task, logits=True)
            assert scored.result.logits is not None
            self.expert_logits[task] = scored.result.logits

    def _record(self) -> Comparison:
        bench, recipe = self.bench, self.recipe
        vectors = bench.prepared.vectors
        common = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"out", "overwrite"})
        unseen = bench.settings.unseen
        settings: dict[str, Any] = {"command": self.command} if self.command is not None else {}
        settings |= {"recipe": common, "seeds": bench.settings.seeds, **scoring_of(bench.settings)}
        settings |= {"unseen": unseen.model_dump(exclude_defaults=True) if unseen is not None else None}
        found = _geometry(bench.prepared)
        shared = map_of_experts(vectors.experts)
        earlier = self.folder.find_slice() if bench.settings.why else None
        return Comparison(
            title=f"{len(vectors.tasks)} experts of {'/'.join(Path(vectors.base.label).parts[-2:])}",
            adamerging=__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            complete=False,
            planned=len(self.planned),
            order=[planned.name for planned in self.planned],
            base=vectors.base.label,
            experts={name: weights.label for name, weights in vectors.experts.items()},
            tasks=[
                _task_record(seat)
                for seat in (*bench.seats.values(), *bench.outside.values())
                if not seat.unseen or seat.task.name not in bench.seats
            ],
            settings=settings,
            versions={
                "adamerging": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            geometry=found,
            slice=earlier if still_true(bench, found, earlier) else None,
            sharing=shared.as_dict() if shared is not None else None,
        )

    def _slice(self, found: dict[str, Any] | None) -> dict[str, Any] | None:
        """The surface over two coefficients."""
        if not self.bench.settings.why or found is None:
            return None
        try:
            return slice_record(self.bench, found, self.say)
        except (InterruptedRun, KeyboardInterrupt):
            raise
        except Exception as error:  # the rows are there all the same
            self.say(f"no loss surface: {error}")
            return None


def _task_record(seat: Seat) -> TaskRecord:
    task = seat.task
    names = class_names_of(seat)
    classes = (
        len(names) if names is not None else getattr(getattr(seat.module, "config", None), "num_labels", None)
    )
    return TaskRecord(
        name=task.name,
        kind=task.settings.get("of") or task.settings.get("kind"),
        classes=classes,
        label_names=names or [],
        adapt=task.adapt.source if task.adapt is not None else None,
        adapt_samples=len(task.adapt) if task.adapt is not None else 0,
        evaluate=task.evaluate.source if task.evaluate is not None else None,
        evaluate_samples=len(task.evaluate) if task.evaluate is not None else 0,
        unseen=seat.unseen,
    )


def _geometry(prepared: Prepared) -> dict[str, Any]:
    """Lengths, cosines and sign conflicts of the task vectors, as matrices in the experts' order."""
    found = geometry(prepared.vectors, prepared.relatedness, threads=prepared.settings.threads)
    tasks = list(prepared.vectors.tasks)
    size = range(len(tasks))
    cosines = [[1.0 if i == j else 0.0 for j in size] for i in size]
    conflicts = [[0.0 for _ in size] for _ in size]
    for pair in found.pairs:
        i, j = (tasks.index(name) for name in pair.experts)
        cosines[i][j] = cosines[j][i] = pair.cosine
        conflicts[i][j] = conflicts[j][i] = pair.conflicts
    return {
        "tasks": tasks,
        "norms": [found.experts[name].norm for name in tasks],
        "cosines": cosines,
        "sign_conflicts": conflicts,
    }
