"""A merge without learning that has data at hand: BatchNorm statistics re-estimated, and scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..masks import fill_task, refuse_masks, task_scales
from ..run import (
    MergeResult,
    Prepared,
    Progress,
    check_out,
    execute,
    idle_warnings,
    run_record,
    statistics_warning,
    with_heads,
)
from ..stream import Workers
from ..tasks.task import Task
from ..weights import Fingerprints
from .body import Body
from .cache import content_of
from .loop import estimate_statistics, own_of_each, taken_statistics
from .scoring import Fill, FillOwn, average_into, score
from .session import make_learner
from .settings import resolve
from .statistics import Gathering, check_tasks, gather, without_inputs
from .store import VectorStore
from .write import write_model, write_record

_ROUNDS = 16


def merge_with_tasks(
    prepared: Prepared,
    tasks: Sequence[Task],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    transductive: bool = False,
    progress: Progress | None = None,
    prints: Fingerprints | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> MergeResult:
    """Merge by a method, in memory where the tasks' data is of use, else streaming.

    Averaged BatchNorm statistics are re-estimated where every expert has unlabeled data (with masks each task
    has its expert's, and nothing is); base, experts, simple average and merged model are scored where tasks
    have labelled data.

    Args:
        prepared: what is merged.
        tasks: data by expert.
        out: folder to write.
        overwrite: replace the folder of an earlier run.
        transductive: for the record.
        progress: of the merge.
        prints: where hashing of the inputs may have begun.
        say: told what takes time.

    Raises:
        UsageError: data, and a tokenizer other than the base's; a task without an expert.
        AdamergingError: as `run.merge`.
    """
    strange = [task.name for task in tasks if task.name not in prepared.vectors.tasks]
    if strange:
        raise UsageError("\n".join(f"task '{name}' has no expert" for name in strange))
    if prepared.method.statistics is not None:
        if out is not None:
            check_out(prepared, out, overwrite=overwrite)  # before what takes long
        prints = prints or Fingerprints()
        prepared = with_statistics(prepared, tasks, prints, say)
    estimated = estimates_statistics(prepared, tasks)
    if prepared.method.masks is not None:
        about = _about_masked(prepared, tasks, out, say, estimated) | {"transductive": transductive}
        prepared = replace(prepared, about={**prepared.about, **about})
        return execute(prepared, out=out, overwrite=overwrite, progress=progress, prints=prints)
    if not estimated and all(task.evaluate is None for task in tasks):
        return execute(prepared, out=out, overwrite=overwrite, progress=progress, prints=prints)
    _check_tokenizer(prepared)
    started = time.perf_counter()
    folder = check_out(prepared, out, overwrite=overwrite) if out is not None else None
    body, statistics, extra = _merge(prepared, tasks, progress, say, estimated)
    inputs = [prepared.vectors.base, *prepared.vectors.experts.values()]
    with prints or Fingerprints() as prints:
        hashes = prints.of([path for weights in inputs for path in weights.files])
    record = run_record(prepared, started, hashes) | extra
    record |= {"transductive": transductive, "tasks": {task.name: dict(task.settings) for task in tasks}}
    if folder is None:
        merged = {n: body.tensors[n].detach().to(spec.dtype) for n, spec in prepared.specs.items()}
        own, heads = with_heads(prepared, merged, statistics)
        return MergeResult(prepared.plan, record, body=own, heads=heads)
    with folder:
        folder.require(prepared.nbytes)
        record["outputs"] = write_model(folder, prepared, body.tensors, tasks, statistics)
        write_record(folder, record)
        folder.commit()
    return MergeResult(prepared.plan, record, out=folder.target)


def estimates_statistics(prepared: Prepared, tasks: Sequence[Task]) -> bool:
    """Whether averaged BatchNorm statistics are re-estimated: where every expert has unlabeled data."""
    return bool(prepared.plan.with_treatment("averaged")) and not without_inputs(prepared.vectors, tasks)


def with_statistics(
    prepared: Prepared,
    tasks: Sequence[Task],
    prints: Fingerprints,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """The same with what the method must know of the tasks' inputs, see `statistics.gather`.

    Raises:
        UsageError: tasks without unlabeled inputs, all named; a tokenizer other than the base's.
    """
    _check_tokenizer(prepared)
    vectors, settings = prepared.vectors, prepared.settings
    check_tasks(prepared.method, vectors, tasks)
    inputs = [vectors.base, *vectors.experts.values()]
    body = Body(vectors, torch.device("cpu"))
    modules = {
        task.name: body.attach(task.name, task.skeleton(vectors.experts[task.name], vectors.base))
        for task in tasks
    }
    with Workers(settings.threads) as workers:
        hashes = prints.of([path for weights in inputs for path in weights.files])
        content = [content_of(weights, hashes) for weights in inputs]
        given = Gathering(vectors, body, tasks, modules, content, workers, say)
        informed, _ = gather(given, prepared.method, settings.chain(), settings.scale)
    wanted = prepared.method.statistics
    about = {
        task.name: {
            "source": task.adapt.source,
            "fingerprint": task.adapt.fingerprint,
            "samples": min(len(task.adapt), wanted.samples),
        }
        for task in tasks
        if task.adapt is not None and wanted is not None
    }
    settled = {task.name: dict(task.settings) for task in tasks}
    return replace(prepared, vectors=informed, about={"data": about, "tasks": settled})


def _check_tokenizer(prepared: Prepared) -> None:
    if prepared.settings.tokenizer != "base":
        raise UsageError("data goes through the base's tokenizer; tokenizer: base")


def _about_masked(
    prepared: Prepared,
    tasks: Sequence[Task],
    out: str | Path | None,
    say: Callable[[str], None],
    estimated: bool,
) -> dict[str, Any]:
    """What the record says of the tasks where each has weights of its own, with its expert's statistics."""
    if out is None:
        refuse_masks(prepared.method)
    about: dict[str, Any] = {"tasks": {task.name: dict(task.settings) for task in tasks}}
    if all(task.evaluate is None for task in tasks):
        return about
    _check_tokenizer(prepared)
    with Workers(prepared.settings.threads) as workers:
        VectorStore(prepared.vectors, workers).scan()
        scales = task_scales(prepared, workers)
        bench = _Bench(prepared, tasks, workers, estimated)

        def own(task: str) -> None:
            fill_task(bench.body.tensors, prepared, workers, task, scales[task])

        scores = bench.score(lambda: bench.body.reset(prepared.vectors), say, own)
    return about | scores


def _merge(
    prepared: Prepared,
    tasks: Sequence[Task],
    progress: Progress | None,
    say: Callable[[str], None],
    estimated: bool,
) -> tuple[Body, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The merged body, statistics of the tasks' own, and what the record says about these and scores."""
    merged = execute(prepared, progress=progress).body
    with Workers(prepared.settings.threads) as workers:
        bench = _Bench(prepared, tasks, workers, estimated)

        own: dict[str, dict[str, Tensor]] = {}
        common: dict[str, Tensor] = {}

        def fill() -> None:
            with torch.no_grad():
                for name, tensor in bench.body.tensors.items():
                    tensor.copy_(merged[name])
            bench.refresh()
            if prepared.own_statistics:
                own.update(own_of_each(bench.learners, prepared.vectors, bench.body, _ROUNDS))
                common.update(taken_statistics(bench.body))

        each = (lambda task: bench.body.load_statistics(own[task])) if prepared.own_statistics else None
        scores = bench.score(fill, say, each)
        bench.body.load_statistics(common)  # after those of the last task
    said = "re-estimated on the tasks' data" + (", for each task on its own" if own else "")
    extra: dict[str, Any] = {"statistics": said} if estimated else {}
    warned = prepared.own_statistics or not estimated
    extra["warnings"] = idle_warnings(prepared.vectors) + (statistics_warning(prepared) if warned else [])
    return bench.body, own, extra | scores


class _Bench:
    """A working body with the tasks over it, where base, experts, average and a merge are scored.

    Args:
        prepared: what is merged.
        tasks: with their data.
        workers: threads.
        estimated: BatchNorm statistics are re-estimated on the tasks' data.
    """

    def __init__(self, prepared: Prepared, tasks: Sequence[Task], workers: Workers, estimated: bool) -> None:
        self.vectors, self.workers, self.own = prepared.vectors, workers, prepared.own_statistics
        self.body = Body(self.vectors, torch.device("cpu"))
        experts, base = self.vectors.experts, self.vectors.base
        self.modules = [
            (task, self.body.attach(task.name, task.skeleton(experts[task.name], base))) for task in tasks
        ]
        settings = resolve({"preset": "paper"})
        asked = tasks if estimated else ()
        self.learners = [make_learner(task, self.body, prepared, settings) for task in asked]

    def refresh(self) -> None:
        """Re-estimate the body's statistics, if they are to be."""
        if self.learners:
            estimate_statistics(self.learners, self.body, _ROUNDS)

    def average(self) -> None:
        """Make the body the experts' average."""
        average_into(self.body, self.vectors, self.workers)
        if not self.own:
            self.refresh()

    def score(self, merged: Fill, say: Callable[[str], None], own: FillOwn | None = None) -> dict[str, Any]:
        """The scores for the record, if any task has labelled data; the body ends as the merge.

        Args:
            merged: makes the body the merge.
            say: told what is scored.
            own: makes it a task's, where each has weights of its own.
        """
        models = {
            "base": lambda: self.body.load_base(self.vectors),
            "average": self.average,
            "merged": merged,
        }
        each: dict[str, FillOwn] = {} if own is None else {"merged": own}
        learners = {learner.task.name: learner for learner in self.learners}
        if self.own and learners:
            each["average"] = lambda task: estimate_statistics([learners[task]], self.body, _ROUNDS)
        found = score(self.modules, self.body, self.vectors, models, say, each)
        return {} if found is None else {"scores": found.as_dict()}
