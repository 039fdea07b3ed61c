"""The parts of the loop: order of the samples, rates, keys, prompts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adamerging.errors import UsageError
from adamerging.finetuning.batches import batch_count, interleaved, shuffled
from adamerging.finetuning.heads import prompts_of, zero_shot_head
from adamerging.finetuning.loop import _schedule
from adamerging.finetuning.record import content_key, differences
from adamerging.finetuning.settings import FinetuneSettings, over
from adamerging.finetuning.train import identify


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 300), size=st.integers(1, 40), seed=st.integers(0, 99), sort=st.booleans())
def test_an_epoch_sees_every_sample_once(count: int, size: int, seed: int, sort: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = [1 + (7 * index) % 13 for index in range(count)] if sort else None
    batches = shuffled(costs, count, size, generator)
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert len(batches) == -(-count // size) and max(map(len, batches)) <= size


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 300), size=st.integers(1, 40), least=st.integers(1, 2), sort=st.booleans())
def test_a_last_batch_that_is_too_small_joins_the_one_before(
    count: int, size: int, least: int, sort: bool
) -> None:
    costs = [1 + (7 * index) % 13 for index in range(count)] if sort else None
    batches = shuffled(costs, count, size, torch.Generator().manual_seed(0), least)
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert len(batches) == batch_count(count, size, least)
    assert min(map(len, batches)) >= min(count, size, least) and max(map(len, batches)) <= size + least - 1


def test_batches_hold_texts_of_like_length_in_random_order() -> None:
    costs = list(range(400))
    batches = shuffled(costs, 400, 8, torch.Generator().manual_seed(0))
    spread = [int(batch.max() - batch.min()) for batch in batches]
    assert max(spread) == 7  # 400 texts are one stretch of 50 batches: sorted through and through
    starts = [int(batch.min()) for batch in batches]
    assert starts != sorted(starts)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_tasks_take_turns_at_random_and_none_is_left_out(sizes: list[int], seed: int) -> None:
    epochs = [[torch.tensor([task, batch]) for batch in range(size)] for task, size in enumerate(sizes)]
    seen = [
        (number, batch.tolist()) for number, batch in interleaved(epochs, torch.Generator().manual_seed(seed))
    ]
    assert sorted(seen) == [(t, [t, b]) for t, size in enumerate(sizes) for b in range(size)]
    for task in range(len(sizes)):
        own = [batch[1] for number, batch in seen if number == task]
        assert own == sorted(own)


@pytest.mark.parametrize(("total", "warmup"), [(10, 0.1), (100, 0.25), (3, 0.0), (1, 0.1)])
def test_rates_rise_linearly_and_fall_to_nothing(total: int, warmup: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = _schedule(optimizer, total, warmup)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rising = max(1, round(warmup * total))
    for step, rate in enumerate(rates):
        up, down = (step + 1) / rising, (total - step) / max(1, total - rising)
        assert rate == pytest.approx(2.0 * min(up, down, 1.0) if total > rising else 2.0 * min(up, down))
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] <= rates[rising - 1]


def test_a_key_changes_with_what_decides_and_not_with_what_is_default() -> None:
    plain = FinetuneSettings.model_validate({})
    spelled = FinetuneSettings.model_validate({"epochs": 2.0})
    other = FinetuneSettings.model_validate({"epochs": 3.0})
    data = {"train": "abc"}
    assert identify(plain, data)[1] == identify(spelled, data)[1]
    assert identify(plain, data)[1] != identify(other, data)[1]
    assert identify(plain, data)[1] != identify(plain, {"train": "abd"})[1]
    assert identify(plain, data)[0]["epochs"] == 2.0
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})


def test_differences_name_what_changed() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == ["b was 2, now 3"]


def test_special_settings_win_over_general_ones_even_when_they_are_defaults() -> None:
    general = FinetuneSettings.model_validate({"epochs": 5.0, "seed": 3})
    special = FinetuneSettings.model_validate({"epochs": 2.0})
    assert (over(general, special).epochs, over(general, special).seed) == (2.0, 3)


def test_making_a_zero_shot_head_draws_nothing(tmp_path: Path, text_base: Path) -> None:
    """A pooler that the base lacks is drawn on loading; a run that goes on makes the head at another time."""
    base = Path(shutil.copytree(text_base, tmp_path / "bare"))
    tensors = load_file(base / "model.safetensors")
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    save_file(body, base / "model.safetensors", {"format": "pt"})
    before = torch.random.get_rng_state()
    zero_shot_head(base, [["word1"], ["word2"]])
    assert len(body) < len(tensors) and torch.equal(torch.random.get_rng_state(), before)


def test_prompts_are_templates_filled_with_readable_names() -> None:
    found = prompts_of(["card_arrival", "why?"], ["a question about {}", "{}"])
    assert found == [["a question about card arrival", "card arrival"], ["a question about why", "why"]]
    with pytest.raises(UsageError, match="where the class's name goes"):
        prompts_of(["a"], ["no place", "{}"])
