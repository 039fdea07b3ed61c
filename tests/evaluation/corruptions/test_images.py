"""Image corruptions against their definitions, written anew."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from adamerging.evaluation.corruptions.blur import motion_blur
from adamerging.evaluation.corruptions.digital import contrast, jpeg, pixelate
from adamerging.evaluation.corruptions.edges import canny
from adamerging.evaluation.corruptions.noise import gaussian_noise, impulse_noise
from adamerging.evaluation.corruptions.severities import TABLES, setting, table_size
from adamerging.evaluation.corruptions.spatter import spatter

FUNCTIONS = {
    "motion_blur": motion_blur, "impulse_noise": impulse_noise, "gaussian_noise": gaussian_noise,
    "pixelate": pixelate, "spatter": spatter, "contrast": contrast, "jpeg": jpeg,
}  # fmt: skip


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photograph(height: int = 64, width: int = 64) -> np.ndarray:
    """Large shapes and fine grain."""
    coarse = rng(1).integers(40, 215, (-(-height // 8), -(-width // 8), 3))
    fine = rng(2).integers(-20, 21, (height, width, 3))
    return (coarse.repeat(8, 0).repeat(8, 1)[:height, :width] + fine).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 72)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_colour_and_grey_keep_shape_and_type_and_change(name: str, size: tuple[int, int]) -> None:
    for image in (photograph(*size), photograph(*size)[:, :, 0]):
        before = image.copy()
        for severity in (1, 5):
            numbers = setting(name, severity, min(size))
            changed = FUNCTIONS[name](image, numbers, rng())
            assert changed.shape == image.shape and changed.dtype == np.uint8
            assert not np.array_equal(changed, image)
            assert np.array_equal(FUNCTIONS[name](image, numbers, rng()), changed)
        assert np.array_equal(image, before)


@pytest.mark.parametrize("size", TABLES)
@pytest.mark.parametrize("name", ["impulse_noise", "gaussian_noise", "contrast", "jpeg", "motion_blur"])
def test_higher_severities_change_more(name: str, size: int) -> None:
    image = photograph(size, size)
    moved = [
        np.abs(FUNCTIONS[name](image, numbers, rng()).astype(int) - image).mean()
        for numbers in TABLES[size][name]
    ]
    assert moved == sorted(moved)


def test_the_table_of_the_nearest_size_is_used() -> None:
    assert [table_size(side) for side in (8, 28, 45, 46, 64, 119, 120, 224, 1000)] == [
        32, 32, 32, 64, 64, 64, 224, 224, 224,
    ]  # fmt: skip
    assert setting("jpeg", 1, 32) == 80 and setting("jpeg", 5, 224) == 7


def test_gaussian_noise_has_the_deviation_it_states() -> None:
    image = np.full((200, 200, 3), 128, np.uint8)
    noise = gaussian_noise(image, 0.06, rng()).astype(float) + 0.5 - image  # values are cut off, not rounded
    assert abs(noise.mean()) < 0.2
    assert noise.std() == pytest.approx(0.06 * 255, rel=0.01)
    channels = noise.reshape(-1, 3).T
    assert np.abs(np.corrcoef(channels) - np.eye(3)).max() < 0.02


@pytest.mark.parametrize("share", [0.01, 0.27])
def test_impulse_noise_hits_its_share_of_values_evenly(share: float) -> None:
    image = np.full((300, 300, 3), 128, np.uint8)
    noisy = impulse_noise(image, share, rng())
    assert set(np.unique(noisy)) == {0, 128, 255}
    four = 4 * math.sqrt(share / 2 / image.size)  # deviations
    assert (noisy == 0).mean() == pytest.approx(share / 2, abs=four)
    assert (noisy == 255).mean() == pytest.approx(share / 2, abs=four)


@pytest.mark.parametrize("left", [0.75, 0.05])
def test_contrast_draws_values_to_their_channels_mean(left: float) -> None:
    image = photograph()
    values = image / 255.0
    for channel in range(3):
        mean = values[:, :, channel].mean()
        wanted = (np.clip((values[:, :, channel] - mean) * left + mean, 0, 1) * 255).astype(np.uint8)
        assert np.abs(contrast(image, left, rng())[:, :, channel].astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("quality", [80, 7])
def test_jpeg_is_pillows_at_that_quality(quality: int) -> None:
    image = photograph()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    assert np.array_equal(jpeg(image, quality, rng()), np.asarray(Image.open(buffer)))


def test_pixelate_averages_boxes_and_repeats_them() -> None:
    image = photograph(64, 32)
    boxes = image.reshape(32, 2, 16, 2, 3).astype(float).mean((1, 3))
    wanted = boxes.repeat(2, 0).repeat(2, 1)
    assert np.abs(pixelate(image, 0.5, rng()).astype(float) - wanted).max() <= 1


def test_motion_blur_is_a_line_of_falling_weights() -> None:
    """Of a single bright pixel the blur leaves the kernel, turned around."""
    image = np.zeros((41, 41), np.uint8)
    image[20, 20] = 255
    blurred = motion_blur(image, (8, 2.0), rng(3))
    angle = math.radians(rng(3).uniform(-45, 45))
    weights = np.exp(-(np.arange(17) ** 2) / 8)
    weights /= weights.sum()
    wanted = np.zeros((41, 41))
    for place, weight in enumerate(weights):
        down, right = (math.ceil(place * turn(angle) - 0.5) for turn in (math.sin, math.cos))
        wanted[20 - down, 20 - right] += 255 * weight
    assert np.abs(blurred - wanted).max() <= 0.6
    assert motion_blur(np.full((20, 20, 3), 77, np.uint8), (20, 15), rng()).tolist() == [[[77] * 3] * 20] * 20


def test_edges_of_a_bright_square_are_its_rim() -> None:
    image = np.zeros((30, 30), np.uint8)
    image[10:20, 8:22] = 200
    edges = canny(image, 50, 150)
    square = np.zeros((30, 30), bool)
    square[10:20, 8:22] = True
    near_rim = ndimage.binary_dilation(square) & ~ndimage.binary_erosion(square)
    assert edges.any() and not (edges & ~near_rim).any()
    assert ndimage.label(edges, np.ones((3, 3)))[1] == 1
    rows, columns = np.nonzero(edges)
    assert rows.max() - rows.min() >= 9 and columns.max() - columns.min() >= 13
    assert not canny(np.full((9, 9), 100, np.uint8), 50, 150).any()


def test_weak_edges_stay_only_where_they_touch_a_strong_one() -> None:
    image = np.zeros((20, 40), np.uint8)
    image[:, 10:] += 100  # an edge of 400
    image[:, 30:] += 20  # one of 80: above 50, below 150
    edges = canny(image, 50, 150)
    assert edges[:, 8:12].any() and not edges[:, 25:].any()
    assert canny(image, 50, 79)[:, 28:32].any()


@pytest.mark.parametrize(("severity", "brighter"), [(3, True), (5, False)])
def test_spatter_is_water_that_brightens_or_mud_that_darkens(severity: int, brighter: bool) -> None:
    image = np.full((64, 64, 3), 150, np.uint8)
    wet = spatter(image, setting("spatter", severity, 64), rng()).astype(int)
    untouched = (wet == 150).all(-1) | (wet == 149).all(-1)
    assert 0.05 < untouched.mean() < 0.95
    drops = wet[~untouched]
    if brighter:
        assert (drops >= 150).all() and drops[:, 1].mean() > drops[:, 0].mean()
    else:
        assert (drops <= 150).all() and drops[:, 0].mean() > drops[:, 2].mean()


def test_noise_that_makes_no_drop_leaves_the_image_alone() -> None:
    image = photograph()
    dry = spatter(image, (0.1, 0.01, 1, 0.9, 0.6, "water"), rng())
    assert np.abs(dry.astype(int) - image).max() <= 1
