"""Batches by budget, in the data's order, made once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adamerging.evaluation import inference
from adamerging.evaluation.inference import Feed, alike, logits_from, logits_of
from adamerging.tasks import Task, module_task, text_task
from adamerging.weights import open_weights

X = torch.arange(20.0).reshape(10, 2)


def make_task() -> Task:
    return module_task("t", evaluate=[(x, 0) for x in X], model=nn.Identity)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=300), st.sampled_from([None, 1, 7, 64]))
def test_batches_hold_every_sample_once_within_the_budget(costs: list[int], size: int | None) -> None:
    batches = alike(costs, size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(costs)))
    for batch in batches:
        assert size is None or len(batch) <= size
        padded = len(batch) * max(costs[index] for index in batch)
        assert size is not None or len(batch) == 1 or padded <= inference.TOKENS
    assert [costs[i] for batch in batches for i in batch] == sorted(costs)


def test_logits_come_in_the_order_of_the_data_whatever_the_batches() -> None:
    task = make_task()
    assert task.evaluate is not None
    for size in (None, 1, 3, 10):
        assert torch.equal(logits_of(nn.Identity(), task, task.evaluate, batch_size=size), X)
    costly = replace(task, costs=lambda samples: [int(-x[0]) for x in samples.inputs])
    assert torch.equal(logits_of(nn.Identity(), costly, task.evaluate, batch_size=3), X)


def test_inputs_are_made_once_and_kept_as_far_as_they_fit() -> None:
    seen: list[int] = []
    task = make_task()
    assert task.evaluate is not None
    counted = replace(task, collate=lambda items: (seen.append(len(items)), task.collate(items))[1])
    feed = Feed(counted, task.evaluate, batch_size=4, keep=2 * 4 * 8)  # two batches of four pairs of float32
    for _ in range(3):
        assert torch.equal(logits_from(nn.Identity(), task, feed, torch.device("cpu")), X)
    assert seen == [4, 4, 2, 2, 2]


def test_large_inputs_come_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    assert task.evaluate is not None
    monkeypatch.setattr(inference, "ELEMENTS", 6)
    assert [len(batch) for batch in Feed(task, task.evaluate).batches] == [3, 3, 3, 1]


def test_logits_can_be_worked_with_afterwards() -> None:
    task = make_task()
    assert task.evaluate is not None
    found = logits_of(nn.Identity(), task, task.evaluate)
    found.requires_grad_(True).sum().backward()
    assert found.grad is not None


def test_every_text_is_tokenised_once(models) -> None:
    base, expert = open_weights(models / "base"), open_weights(models / "films")
    task = text_task("films", evaluate=models / "films_test.jsonl")
    task.skeleton(expert, base)
    assert task.evaluate is not None
    texts = task.collate.__self__
    asked: list[str] = []
    tokenizer = texts._tokenizer
    texts._tokenizer = Spy(tokenizer, asked)
    Feed(task, task.evaluate, keep=1 << 20)
    module = task.skeleton(expert, base)
    others = replace(task.evaluate, inputs=[f"{text} word1" for text in task.evaluate.inputs])
    for samples in (task.evaluate, others):  # the second are more than are remembered for good
        logits_of(module, task, samples)
    assert sorted(asked) == sorted({*task.evaluate.inputs, *others.inputs})


class Spy:
    """A tokenizer that notes what it is asked."""

    def __init__(self, tokenizer, asked: list[str]) -> None:
        self.tokenizer, self.asked = tokenizer, asked

    def __call__(self, texts: list[str], **options):
        self.asked += texts
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)
