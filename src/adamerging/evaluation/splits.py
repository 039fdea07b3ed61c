"""Which experts to merge and which tasks to leave out, as the ``unseen:`` of a comparison asks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from itertools import combinations
from typing import TypedDict

import numpy as np

from ..errors import UsageError
from .settings import Unseen


class Group(TypedDict):
    """One set of experts to merge.

    Attributes:
        group: its label, as `records.Row.group` holds it.
        experts: the experts to merge, in the recipe's order.
        held_in: tasks they were trained for, scored under their own heads.
        held_out: tasks of the recipe that none of them saw, scored under a head that is not their expert's.
    """

    group: str
    experts: list[str]
    held_in: list[str]
    held_out: list[str]


def split_plan(tasks: Sequence[str], unseen: Unseen) -> list[Group]:
    """All groups of a comparison: leave-out splits, then subsets; empty where none are asked for.

    Args:
        tasks: names of the recipe's tasks that have an expert, in its order.
        unseen: the settings.

    Raises:
        UsageError: see `leave_out_splits`.
    """
    groups = [] if unseen.leave_out is None else leave_out_splits(tasks, unseen.leave_out)
    return groups + ([] if unseen.subsets is None else subset_plan(tasks, unseen.subsets, unseen.seed))


def leave_out_splits(tasks: Sequence[str], leave_out: Sequence[Sequence[str]] | int) -> list[Group]:
    """The tasks to leave out in turn.

    Args:
        tasks: all names, in order.
        leave_out: splits in the order wanted, or m for every choice of m tasks, in the order of
            `itertools.combinations` over the tasks: the first m first.

    Raises:
        UsageError: unknown or repeated names, the same split twice, or nothing left to merge.
    """
    if isinstance(leave_out, int):
        if not 1 <= leave_out < len(tasks):
            raise UsageError(
                f"leave_out (={leave_out}) must be from 1 to {len(tasks) - 1}: there are {len(tasks)} tasks, "
                "and one expert at least must remain"
            )
        return [_leave_out(tasks, out) for out in combinations(tasks, leave_out)]
    problems = [problem for out in leave_out for problem in _problems(tasks, out)]
    known = [frozenset(out) for out in leave_out]
    problems += [
        f"the split [{', '.join(out)}] is given twice"
        for place, out in enumerate(leave_out)
        if frozenset(out) in known[:place]
    ]
    if problems:
        raise UsageError("leave_out:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return [_leave_out(tasks, out) for out in leave_out]


def subset_plan(tasks: Sequence[str], subsets: int, seed: int) -> list[Group]:
    """Random subsets of the experts of every size from 1 to all, each different: what is merged is held in,
    what is not is held out.

    The protocol of "What Matters for Model Merging at Scale?" (Yadav et al. 2024, arXiv 2410.03617), with
    every size. A size with no more subsets than asked for gives them all, in order.

    Args:
        tasks: all names, in order.
        subsets: how many of each size.
        seed: of the choice; subsets of one size do not depend on the other sizes.
    """
    groups = []
    for size in range(1, len(tasks) + 1):
        for number, chosen in enumerate(_subsets(len(tasks), size, subsets, seed), 1):
            names = [tasks[place] for place in chosen]
            rest = [name for name in tasks if name not in names]
            label = f"subset {size}/{number}: {', '.join(names)}"
            groups.append(Group(group=label, experts=names, held_in=list(names), held_out=rest))
    return groups


def _subsets(count: int, size: int, wanted: int, seed: int) -> list[tuple[int, ...]]:
    total = math.comb(count, size)
    if total <= wanted:
        return list(combinations(range(count), size))
    generator = np.random.default_rng([seed, count, size])
    if total <= 4 * wanted:  # drawing until all differ would take long
        every = list(combinations(range(count), size))
        return [every[place] for place in generator.permutation(total)[:wanted]]
    found: dict[tuple[int, ...], None] = {}
    while len(found) < wanted:
        found.setdefault(tuple(sorted(generator.permutation(count)[:size].tolist())))
    return list(found)


def _leave_out(tasks: Sequence[str], out: Sequence[str]) -> Group:
    left = [name for name in tasks if name not in out]
    held_out = [name for name in tasks if name in out]
    return Group(
        group=f"leave out: {', '.join(held_out)}", experts=left, held_in=list(left), held_out=held_out
    )


def _problems(tasks: Sequence[str], out: Sequence[str]) -> list[str]:
    shown = f"[{', '.join(out)}]"
    problems = []
    for name in out:
        if name not in tasks:
            close = difflib.get_close_matches(name, tasks, n=1, cutoff=0.4)
            hint = f", did you mean '{close[0]}'?" if close else f"; the tasks are {', '.join(tasks)}"
            problems.append(f"{shown}: there is no task '{name}' with an expert{hint}")
    if len(set(out)) < len(out):
        problems.append(f"{shown} names a task twice")
    if not out:
        problems.append("a split leaves out no task")
    elif not problems and len(out) == len(tasks):
        problems.append(f"{shown} leaves out every task; one expert at least must remain")
    return problems
