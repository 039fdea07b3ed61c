"""Corrupted samples: lazy, the same whatever is read first, of the kind they were; refused where unfit."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adamerging.errors import UsageError
from adamerging.evaluation.corruptions import CORRUPTIONS, corrupt, fits
from adamerging.evaluation.corruptions.table import names_for
from adamerging.tasks.data import read_samples
from adamerging.tasks.task import Samples

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
TEXTS = ["a first plain sentence here", "and the second one is longer than that", "third"]


def samples(inputs: object, labels: object = None) -> Samples:
    return Samples(inputs, labels, "data", "0" * 64)


def counted(inputs: list) -> tuple[Samples, list[int]]:
    """Samples that note which places are read."""
    read: list[int] = []

    class Noted(list):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    return samples(Noted(inputs)), read


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_order_and_batches_do_not_matter(name: str) -> None:
    clean = samples(IMAGES if CORRUPTIONS[name].kind == "image" else TEXTS * 4, [0] * 5)
    first = corrupt(clean, name, 5, seed=1)
    forwards = [np.array(value) for value in first.inputs]
    again = corrupt(clean, name, 5, seed=1)
    for place in reversed(range(len(again))):
        assert np.array_equal(np.array(again.inputs[place]), forwards[place])
    assert np.array_equal(np.array(again.inputs[1:3][1]), forwards[2])
    assert np.array_equal(np.array(again.inputs[-1]), forwards[-1])
    with pytest.raises(IndexError):
        again.inputs[len(again)]


@pytest.mark.parametrize("change", [{"seed": 2}, {"severity": 4}, {"name": "impulse_noise"}, {"stream": "b"}])
def test_other_parameters_give_other_noise_and_another_fingerprint(change: dict) -> None:
    clean = samples(IMAGES)
    usual = {"name": "gaussian_noise", "severity": 5, "seed": 1}
    one, two = corrupt(clean, **usual), corrupt(clean, **{**usual, **change})
    assert one.fingerprint != two.fingerprint != clean.fingerprint
    assert one.fingerprint == corrupt(clean, **usual).fingerprint
    noise = [np.asarray(x.inputs[0]).astype(int) - IMAGES[0] for x in (one, two)]
    assert abs(np.corrcoef(noise[0].reshape(-1), noise[1].reshape(-1))[0, 1]) < 0.3


def test_equal_images_get_different_noise() -> None:
    noisy = corrupt(samples(np.full((2, 16, 16, 3), 100, np.uint8)), "gaussian_noise", 3)
    assert not np.array_equal(noisy.inputs[0], noisy.inputs[1])


def test_inputs_are_computed_as_they_are_read() -> None:
    clean, read = counted(list(np.repeat(IMAGES, 20, 0)))
    shifted = corrupt(clean, "contrast", 3)
    assert len(set(read)) <= 17
    read.clear()
    shifted.inputs[50]
    assert read == [50]


def test_labels_and_length_stay_and_the_source_says_what_was_done() -> None:
    shifted = corrupt(samples(TEXTS, [2, 0, 1]), "swap", 3)
    assert shifted.labels == [2, 0, 1] and len(shifted) == 3
    assert shifted.source == "data (swap:3)"


def test_pairs_of_texts_are_edited_on_both_sides() -> None:
    pair = (" ".join(["words"] * 50), " ".join(["others"] * 50))
    one, two = corrupt(samples([pair]), "deletion", 5).inputs[0]
    assert one != pair[0] and two != pair[1]


LAYOUTS = {
    "HWC": IMAGES, "HW": IMAGES[:, :, :, 0], "CHW": IMAGES.transpose(0, 3, 1, 2),
    "1HW": IMAGES[:, None, :, :, 0],
    "HW1": IMAGES[:, :, :, :1], "tensor": torch.from_numpy(IMAGES).permute(0, 3, 1, 2),
    "list": list(IMAGES),
}  # fmt: skip


@pytest.mark.parametrize("name", names_for("image"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_given_back_as_it_came(name: str, layout: str) -> None:
    inputs = LAYOUTS[layout]
    value = corrupt(samples(inputs), name, 5).inputs[3]
    assert type(value) is type(inputs[3])
    assert value.shape == inputs[3].shape and value.dtype == inputs[3].dtype
    assert not np.array_equal(np.asarray(value), np.asarray(inputs[3]))


def test_layouts_agree() -> None:
    def of(layout: str) -> np.ndarray:
        return np.asarray(corrupt(samples(LAYOUTS[layout]), "motion_blur", 3).inputs[0])

    assert np.array_equal(of("HWC").transpose(2, 0, 1), of("CHW"))
    assert np.array_equal(of("HW"), of("1HW")[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floats_from_0_to_1_are_corrupted_as_8_bit_images(dtype: type) -> None:
    value = corrupt(samples((IMAGES / 255).astype(dtype)), "pixelate", 4).inputs[2]
    assert value.dtype == dtype
    wanted = corrupt(samples(IMAGES), "pixelate", 4).inputs[2]
    assert np.abs(value.astype(float) * 255 - wanted).max() < 0.2


def test_a_fourth_channel_stays() -> None:
    images = np.concatenate([IMAGES, IMAGES[:, :, :, :1]], -1)
    value = corrupt(samples(images), "contrast", 5).inputs[0]
    assert np.array_equal(value[:, :, 3], images[0, :, :, 3])
    assert np.array_equal(value[:, :, :3], corrupt(samples(IMAGES), "contrast", 5).inputs[0])


def test_files_encoded_bytes_and_pil_images_give_pil_images(tmp_path: Path) -> None:
    image = Image.fromarray(IMAGES[0])
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    wanted = corrupt(samples(IMAGES), "jpeg", 2).inputs[0]
    for value in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        image,
        {"bytes": buffer.getvalue(), "path": None},
    ):
        assert fits(samples([value])) == names_for("image")
        found = corrupt(samples([value]), "jpeg", 2).inputs[0]
        assert isinstance(found, Image.Image) and np.array_equal(np.asarray(found), wanted)
    assert corrupt(samples([image.convert("L")]), "jpeg", 2).inputs[0].mode == "L"


def test_large_images_are_corrupted_at_256_pixels_and_arrays_keep_their_shape() -> None:
    large = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    assert corrupt(samples([Image.fromarray(large)]), "contrast", 1).inputs[0].size == (512, 256)
    assert corrupt(samples([large]), "contrast", 1).inputs[0].shape == large.shape


def test_what_fits() -> None:
    assert fits(samples(IMAGES)) == names_for("image") and len(names_for("image")) == 7
    assert fits(samples(TEXTS)) == ("typos", "swap", "casing", "deletion", "keyboard")
    assert fits(samples([("a", "b")])) == names_for("text")
    for inputs in (torch.randn(4, 16, 16), np.zeros((4, 3)), np.zeros((4, 4, 4), np.uint8), [1, 2], []):
        assert fits(samples(inputs)) == ()


@pytest.mark.parametrize(
    ("inputs", "name", "severity", "message"),
    [
        (IMAGES, "gausian_noise", 3, "no corruption 'gausian_noise', did you mean 'gaussian_noise'"),
        (IMAGES, "zzz", 3, "for images: motion_blur.*for texts: typos"),
        (IMAGES, "contrast", 0, r"severity \(=0\) must be a whole number from 1 to 5"),
        (IMAGES, "contrast", 6, "severity"),
        (IMAGES, "contrast", 2.5, "severity"),
        (IMAGES, "contrast", True, "severity"),
        (IMAGES, "typos", 1, "'typos' is for texts; the inputs of data are images.*motion_blur"),
        (TEXTS, "contrast", 1, "'contrast' is for images; the inputs of data are texts.*typos"),
        (torch.full((4, 16, 16), 3.0), "contrast", 1, r"must lie in \[0, 1\].*normalise them in collate"),
        (np.full((4, 16, 16), np.nan), "contrast", 1, "floats must lie in"),
        (np.zeros((4, 5)), "contrast", 1, r"has the shape \[5\]"),
        (np.zeros((4, 16, 16), np.int64), "contrast", 1, "holds int64"),
        (np.zeros((4, 4, 4), np.uint8), "contrast", 1, "at least 8 pixels"),
        ([IMAGES[0], "text"], "contrast", 1, "sample 1 is a str, not an image|cannot be opened"),
        ([{"a": IMAGES[0]}], "contrast", 1, "neither images nor texts"),
        ([], "contrast", 1, "has no samples"),
        ([None], "typos", 1, "a NoneType"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(inputs: object, name: str, severity: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        corrupt(samples(inputs), name, severity)


def test_a_bad_sample_among_good_ones_is_named_when_it_is_read() -> None:
    images = [*np.repeat(IMAGES, 10, 0)]
    images[17] = np.zeros((3, 3), np.uint8)
    shifted = corrupt(samples(images), "contrast", 1)
    with pytest.raises(UsageError, match="data: sample 17 has the shape"):
        list(shifted.inputs)
    texts = ["some words"] * 64
    texts[33] = 4  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="sample 33 is a int, not a text"):
        list(corrupt(samples(texts), "typos", 1).inputs)


def test_samples_of_tasks_come_through() -> None:
    read = read_samples([("one two three", 0), ("four five six", 1)], "text")
    shifted = corrupt(read, "casing", 5)
    assert list(shifted.labels or ()) == [0, 1] and [len(text) for text in shifted.inputs] == [13, 13]
