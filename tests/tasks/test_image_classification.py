"""Image tasks: any picture becomes what the expert's processor makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from adamerging.errors import UsageError, WeightsError
from adamerging.tasks import image_task
from adamerging.weights import open_weights
from models import save_expert
from tiny_tasks import save_text_base, save_vit, save_vit_expert

PIL_Image = pytest.importorskip("PIL.Image")
IMAGES = np.random.default_rng(0).integers(0, 255, (3, 12, 12, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("image") / "base")


@pytest.fixture(scope="module")
def expert(base: Path) -> Path:
    return save_vit_expert(base.parent / "animals", base, seed=1, labels=["cat", "dog"])


def opened(expert: Path, base: Path):
    own = open_weights(base)
    return open_weights(expert, base=own), own


def test_the_skeleton_is_the_expert_as_transformers_loads_it(expert: Path, base: Path) -> None:
    from transformers import AutoImageProcessor, ViTForImageClassification

    task = image_task("animals", IMAGES)
    weights, own = opened(expert, base)
    module = task.skeleton(weights, own)
    assert set(module.state_dict()) == set(weights.specs)
    with torch.no_grad():
        batch = AutoImageProcessor.from_pretrained(base)(list(IMAGES), return_tensors="pt")
        wanted = ViTForImageClassification.from_pretrained(expert).eval()(**batch).logits
        assert torch.allclose(task.forward(module, task.collate(IMAGES)), wanted, atol=1e-5)


def test_every_form_of_a_picture_is_the_same_picture(expert: Path, base: Path, tmp_path: Path) -> None:
    import io

    task = image_task("animals")
    task.skeleton(*opened(expert, base))
    picture = PIL_Image.fromarray(IMAGES[0])
    picture.save(tmp_path / "a.png")
    stored = io.BytesIO()
    picture.save(stored, "png")
    forms = [
        IMAGES[0], IMAGES[0].transpose(2, 0, 1), torch.from_numpy(IMAGES[0]), picture, tmp_path / "a.png",
        str(tmp_path / "a.png"), {"bytes": stored.getvalue(), "path": None},
    ]  # fmt: skip
    pixels = task.collate(forms)["pixel_values"]
    assert pixels.shape == (len(forms), 3, 8, 8)
    assert (pixels == pixels[0]).all()


def test_the_module_speaks_of_its_tensors_as_the_file_does(expert: Path, base: Path) -> None:
    """Also where transformers names them otherwise: whoever fills the body goes by the expert's names."""
    weights, own = opened(expert, base)
    module = image_task("animals").skeleton(weights, own)
    stored = module.state_dict(keep_vars=True)
    assert all(torch.equal(stored[name], weights.read(name)) for name in weights.specs)
    assert {id(tensor) for tensor in stored.values()} == {id(tensor) for tensor in module.parameters()}


def test_grey_pictures_get_the_channels_of_the_model(expert: Path, base: Path) -> None:
    task = image_task("animals")
    task.skeleton(*opened(expert, base))
    pixels = task.collate([IMAGES[0, :, :, 0], IMAGES[0, :, :, :1]])["pixel_values"]
    assert pixels.shape == (2, 3, 8, 8)
    assert (pixels == pixels[:, :1]).all()


def test_without_a_processor_images_are_resized_and_scaled_by_the_configuration(tmp_path: Path) -> None:
    base = save_vit(tmp_path / "base", processor=False)
    expert = save_vit_expert(tmp_path / "animals", base, seed=1, labels=["cat", "dog"])
    task = image_task("animals")
    task.skeleton(*opened(expert, base))
    pixels = task.collate([np.full((5, 9), 255, np.uint8), np.zeros((8, 8), np.uint8)])["pixel_values"]
    assert pixels.shape == (2, 3, 8, 8)
    assert (pixels[0] == 1).all()
    assert (pixels[1] == -1).all()


def test_an_image_folder_with_the_classes_of_the_model(expert: Path, base: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog", "dog")):
        (tmp_path / name).mkdir(exist_ok=True)
        PIL_Image.fromarray(IMAGES[number]).save(tmp_path / name / f"{number}.png")
    task = image_task("animals", evaluate=tmp_path)
    module = task.skeleton(*opened(expert, base))
    assert task.evaluate is not None and list(task.evaluate.labels or []) == [0, 1, 1]
    assert task.forward(module, task.collate(task.evaluate.inputs)).shape == (3, 2)


def test_pictures_that_are_none_are_refused(expert: Path, base: Path, tmp_path: Path) -> None:
    task = image_task("animals")
    with pytest.raises(UsageError, match="no image processor yet"):
        task.collate([IMAGES[0]])
    task.skeleton(*opened(expert, base))
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"a\.png cannot be opened"):
        task.collate([tmp_path / "a.png"])
    with pytest.raises(UsageError, match="neither 1, 3 nor 4 channels"):
        task.collate([np.zeros((8, 8, 5), np.uint8)])
    with pytest.raises(UsageError) as refused:
        task.collate(["a long text " * 400])
    text = ("a long text " * 400)[:80]
    assert str(refused.value).startswith(f"task 'animals': the image file '{text}...' cannot be opened: ")
    assert len(str(refused.value)) < 200
    with pytest.raises(UsageError, match="task 'animals': the image file 'nul.*' cannot be opened"):
        task.collate(["nul\0"])
    with pytest.raises(WeightsError, match="has no head"):
        task.skeleton(*opened(base, base))


def test_an_expert_of_another_kind_is_told_of_the_key(tmp_path: Path) -> None:
    base = save_text_base(tmp_path / "base")
    texts = opened(save_expert(tmp_path / "topics", base, 1, labels=2), base)
    with pytest.raises(WeightsError, match=r"task 'topics': transformers has no AutoModel.*the key kind"):
        image_task("topics").skeleton(*texts)


def test_real_digits_go_through_a_tiny_expert(
    data_set: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    path = data_set("vision/usps") / "usps.npz"
    expert = save_vit_expert(tmp_path / "usps", base, seed=1, labels=[str(digit) for digit in range(10)])
    task = image_task("usps", f"{path}:val", f"{path}:test")
    module = task.skeleton(*opened(expert, base))
    assert task.adapt is not None
    assert task.forward(module, task.collate(task.adapt.inputs[:16])).shape == (16, 10)
