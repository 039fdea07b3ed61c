"""Corrupted tasks: which conditions there are, and what is corrupted in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from adamerging.errors import UsageError
from adamerging.evaluation.limit import first
from adamerging.evaluation.settings import Shift
from adamerging.evaluation.shift import check_shift, conditions, same_data, shifted_task
from adamerging.tasks import Task, module_task

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)


def image_task(name: str = "pictures") -> Task:
    evaluate = list(zip(IMAGES[:3], [0, 1, 0], strict=True))
    return module_task(name, IMAGES[3:], evaluate, model=nn.Flatten)


def text_task(name: str = "texts") -> Task:
    import hashlib

    from adamerging.tasks.task import Samples

    texts = ["some words that are here", "and some others"]
    samples = Samples(texts, [0, 1], "texts", hashlib.sha256(b"t").hexdigest())
    return replace(image_task(name), adapt=None, evaluate=samples)


def test_conditions_come_by_corruption_then_severity() -> None:
    shift = Shift(corruptions=["contrast", "jpeg"], severities=[5, 1])
    found = dict(conditions(image_task(), shift))
    assert list(found) == ["contrast:5", "contrast:1", "jpeg:5", "jpeg:1"]
    assert all(list(samples.labels or ()) == [0, 1, 0] for samples in found.values())
    assert len({samples.fingerprint for samples in found.values()}) == 4


def test_by_default_every_corruption_that_fits_at_every_severity() -> None:
    assert len(list(conditions(image_task(), Shift()))) == 7 * 5
    assert len(list(conditions(text_task(), Shift()))) == 5 * 5


def test_one_list_serves_texts_and_images() -> None:
    shift = Shift(corruptions=["typos", "jpeg"], severities=[2])
    assert [name for name, _ in conditions(image_task(), shift)] == ["jpeg:2"]
    assert [name for name, _ in conditions(text_task(), shift)] == ["typos:2"]
    check_shift(shift, [image_task(), text_task()])


def test_tasks_that_are_not_named_or_not_scored_have_no_conditions() -> None:
    assert list(conditions(image_task("a"), Shift(tasks=["b"]))) == []
    assert list(conditions(replace(image_task(), evaluate=None), Shift())) == []


def test_both_splits_are_corrupted_with_noise_of_their_own() -> None:
    task = image_task()
    assert task.adapt is not None and task.evaluate is not None
    grey = np.full((3, 16, 16, 3), 128, np.uint8)
    task = replace(task, adapt=replace(task.adapt, inputs=grey), evaluate=replace(task.evaluate, inputs=grey))
    shifted = shifted_task(task, "gaussian_noise", 3, seed=1)
    assert shifted.adapt is not None and shifted.evaluate is not None
    noise = [np.asarray(x.inputs[0]) - 128.0 for x in (shifted.adapt, shifted.evaluate)]
    assert noise[0].std() > 5 and abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.3
    [(_, same)] = conditions(task, Shift(corruptions=["gaussian_noise"], severities=[3], seed=1))
    assert same.fingerprint == shifted.evaluate.fingerprint


def test_a_transductive_run_adapts_to_what_it_is_scored_on() -> None:
    task = image_task()
    shifted = shifted_task(replace(task, adapt=task.evaluate), "spatter", 2)
    assert shifted.adapt is not None and shifted.evaluate is not None
    assert shifted.adapt.fingerprint == shifted.evaluate.fingerprint
    assert np.array_equal(shifted.adapt.inputs[1], shifted.evaluate.inputs[1])
    assert shifted_task(replace(task, adapt=None), "spatter", 2).adapt is None


def test_a_transductive_run_that_is_scored_on_the_first_samples_adapts_to_these_too() -> None:
    task = image_task()
    assert task.evaluate is not None
    shifted = shifted_task(replace(task, adapt=task.evaluate, evaluate=first(task.evaluate, 2)), "spatter", 2)
    assert shifted.adapt is not None and shifted.evaluate is not None
    assert len(shifted.evaluate) == 2 and len(shifted.adapt) == 3
    for place in range(2):
        assert np.array_equal(shifted.adapt.inputs[place], shifted.evaluate.inputs[place])
    other = replace(task, evaluate=first(task.evaluate, 2))
    assert not same_data(other)


def test_everything_wrong_is_said_at_once() -> None:
    shift = Shift(corruptions=["gausian_noise", "jpeg"], severities=[0, 3, 9], tasks=["pictures", "nowhere"])
    with pytest.raises(UsageError) as caught:
        check_shift(shift, [image_task()])
    for part in ("did you mean 'gaussian_noise'", "severity (=0)", "severity (=9)", "no task 'nowhere'"):
        assert part in str(caught.value)
    with pytest.raises(UsageError, match="did you mean 'gaussian_noise'"):
        list(conditions(image_task(), Shift(corruptions=["gausian_noise"])))


def test_corruptions_that_fit_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="no corruption fits the evaluation data of any task"):
        check_shift(Shift(corruptions=["typos"]), [image_task()])
    with pytest.raises(UsageError, match="'pictures': none of the corruptions fits.*motion_blur, impulse"):
        check_shift(Shift(corruptions=["typos"], tasks=["pictures", "texts"]), [image_task(), text_task()])
