"""`adamerging inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import flags, show
from .failing import guard
from .planned import notes_of, tensors, treatments
from .store import print_store

if TYPE_CHECKING:
    from ..geometry import Geometry


@guard()
def inspect(
    sources: flags.Sources = None,
    base: flags.Base = None,
    expert: flags.Experts = None,
    include: flags.Include = None,
    exclude: flags.Exclude = None,
    heads: flags.Heads = None,
    no_heads: flags.NoHeads = False,
    buffers: flags.BuffersFlag = None,
    vocabulary: flags.VocabularyFlag = None,
    every_tensor: Annotated[
        bool, typer.Option("--tensors", help="List every tensor with its treatment.")
    ] = False,
    as_json: flags.AsJson = False,
    threads: flags.Threads = None,
) -> None:
    """Say what would be merged, and how the task vectors lie to each other. Writes nothing.

    Of a store alone, say which task has which layers of its own.

    Example: adamerging inspect base/ sst2=experts/sst2 trec=experts/trec
    """
    if len(sources or []) == 1 and base is None and not expert and _is_store(sources):
        print_store(Path((sources or [""])[0]), as_json=as_json)
        return
    changes = flags.given(
        include=include,
        exclude=exclude,
        heads=heads,
        buffers=buffers,
        vocabulary=vocabulary,
        threads=threads,
    )
    if no_heads:
        if heads:
            raise UsageError("--heads and --no-heads exclude each other")
        changes["heads"] = []
    recipe = flags.recipe_from(sources or [], base, expert or [], changes)

    from ..geometry import geometry
    from ..run import prepare_inspection

    prepared = prepare_inspection(recipe)
    if not as_json:
        console = show.console()
        console.print(treatments(prepared.plan))
        if every_tensor:
            console.print()
            console.print(tensors(prepared.plan))
        for text in notes_of(prepared):
            show.note(text)
    found = geometry(prepared.vectors, prepared.relatedness, threads=recipe.threads)
    if as_json:
        show.print_json(
            {
                "base": prepared.vectors.base.label,
                "experts": {task: w.label for task, w in prepared.vectors.experts.items()},
                "plan": {**prepared.plan.summary(), "notes": notes_of(prepared)},
                **({"tensors": prepared.plan.rows()} if every_tensor else {}),
                "geometry": found.as_dict(),
            }
        )
    else:
        _show(found)


def _is_store(sources: list[str] | None) -> bool:
    return bool(sources) and (Path((sources or [""])[0]).expanduser() / "store.json").is_file()


def _show(found: Geometry) -> None:
    console = show.console()
    console.print()
    rows = [
        (task, f"{e.norm:.4g}", f"{e.relative:.2%}", f"{e.unchanged:.1%}", f"{e.cosine:.3f}")
        for task, e in found.experts.items()
    ]
    columns = ["expert", ">norm", ">of the base's", ">unchanged", ">cosine to base"]
    console.print(show.table("Task vectors", columns, rows))
    if found.pairs:
        console.print()
        pairs = [
            (*pair.experts, f"{pair.cosine:+.3f}", f"{pair.conflicts:.1%}", f"{pair.shared:.1%}")
            for pair in found.pairs
        ]
        console.print(show.table("Pairs", ["", "", ">cosine", ">sign conflicts", ">both changed"], pairs))
    if len(found.blocks) > 1:
        console.print()
        blocks = [
            (block.name, f"{block.base:.4g}", *(f"{block.norms[task]:.4g}" for task in found.experts))
            for block in found.blocks
        ]
        columns = ["block", ">base", *(f">{task}" for task in found.experts)]
        console.print(show.table("Norm by block", columns, blocks))
    for text in found.warnings:
        show.warn(text)
