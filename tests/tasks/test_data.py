"""Reading samples from every kind of source, and refusing what cannot be samples."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adamerging.errors import UsageError
from adamerging.tasks.data import Fields, read_samples, read_task_data, refuse_overlap, sample_digest
from adamerging.tasks.labels import NamedLabels
from adamerging.tasks.module import module_task

TEXTS = ["how far is the moon", "who wrote it", 'a "quoted", text', "Grüße\nto all"]
LABELS = [2, 0, 1, 1]


def write_jsonl(folder: Path) -> Path:
    path = folder / "data.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"text": t, "label": n}) + "\n" for t, n in zip(TEXTS, LABELS, strict=True)
        )
    return path


def write_json(folder: Path) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps([{"text": t, "label": n} for t, n in zip(TEXTS, LABELS, strict=True)]))
    return path


def write_csv(folder: Path) -> Path:
    import csv

    path = folder / "data.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *zip(LABELS, TEXTS, strict=True)])
    return path


def write_parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = folder / "data.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS, "label": LABELS}), path)
    return path


def write_saved(folder: Path) -> Path:
    make_dataset(folder).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def make_dataset(folder: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS, "label": LABELS})


SOURCES: dict[str, Callable[[Path], Any]] = {
    "jsonl.gz": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
    "saved data set": write_saved,
    "data set": make_dataset,
    "pairs": lambda _: list(zip(TEXTS, LABELS, strict=True)),
    "generator": lambda _: iter(zip(TEXTS, LABELS, strict=True)),
    "dicts": lambda _: [{"text": t, "label": n} for t, n in zip(TEXTS, LABELS, strict=True)],
    "columns": lambda _: {"text": TEXTS, "label": np.array(LABELS)},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_samples(kind: str, tmp_path: Path) -> None:
    samples = read_samples(SOURCES[kind](tmp_path), "text")
    assert list(samples.inputs) == TEXTS
    assert samples.labels == LABELS
    assert samples.fingerprint == read_samples(list(zip(TEXTS, LABELS, strict=True)), "text").fingerprint


def test_bare_texts_and_lines_have_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n\n", encoding="utf-8")
    assert read_samples(path, "text").inputs == ["one", "two"]
    assert read_samples(["one", "two"], "text").labels is None


def test_splits_of_a_data_set_are_named_behind_a_colon(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({"train": make_dataset(tmp_path), "test": make_dataset(tmp_path)})
    both.save_to_disk(str(tmp_path / "both"))
    assert len(read_samples(f"{tmp_path}/both:test", "text")) == 4
    with pytest.raises(UsageError, match="several splits; name one of train, test"):
        read_samples(tmp_path / "both", "text")
    with pytest.raises(UsageError, match="no split 'dev'"):
        read_samples(f"{tmp_path}/both:dev", "text")


def test_npz_arrays_by_split_and_by_name(tmp_path: Path) -> None:
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    path = tmp_path / "set.npz"
    np.savez(path, val_x=images, val_y=np.array([0, 1, 1]), test_x=images[:2], test_y=np.array([5, 6]))
    val = read_samples(f"{path}:val", "image")
    assert np.array_equal(val.inputs[2], images[2])
    assert val.labels == [0, 1, 1]
    test = read_samples(path, "image", Fields("test_x", "test_y"))
    assert test.labels == [5, 6]
    with pytest.raises(UsageError, match="no split 'dev'; its arrays are val_x, val_y, test_x, test_y"):
        read_samples(f"{path}:dev", "image")
    with pytest.raises(UsageError, match="name one of those it has"):
        read_samples(path, "image")


def test_an_npz_with_pickled_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "trap.npz", x=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="not a readable npz file of plain arrays"):
        read_samples(tmp_path / "trap.npz", "array")


def test_image_folders_flat_and_by_class(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("cat/a", "cat/b", "dog/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    by_class = read_samples(tmp_path, "image")
    assert isinstance(by_class.labels, NamedLabels)
    assert by_class.labels.names == ["cat", "cat", "dog"]
    assert [path.name for path in by_class.inputs] == ["a.png", "b.png", "c.png"]
    assert read_samples(tmp_path, "image", label_names=["dog", "cat"]).labels == [1, 1, 0]
    flat = read_samples(tmp_path / "cat", "image")
    assert flat.labels is None
    assert len(flat) == 2


def test_pairs_of_texts() -> None:
    rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 1]}
    assert read_samples(rows, "text").inputs == [("a", "c"), ("b", "d")]
    assert read_samples(rows, "text", Fields(input="premise")).inputs == ["a", "b"]
    assert read_samples([("a", "c", 0)], "text").inputs == [("a", "c")]


@pytest.mark.parametrize("column", ["text", "sentence", "utterance", "tweet_nobody_guesses"])
def test_the_text_is_found_by_common_names_or_by_being_alone(column: str) -> None:
    assert read_samples({column: ["a"], "label": [0]}, "text").inputs == ["a"]


def test_secret_labels_count_as_none() -> None:
    assert read_samples({"text": ["a", "b"], "label": [-1, -1]}, "text").labels is None


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ([], "text", "is empty"),
        ({"text": [], "label": []}, "text", "is empty"),
        ([1, 2, 0], "text", "sample 0 is the number 1 where a text belongs. Were labels passed"),
        ([("a", 1), (2, 0)], "text", "sample 1 is the number 2"),
        (np.array([1, 2, 0]), "array", "Were labels passed"),
        (np.array([1, 2, 0]), "image", "Were labels passed"),
        ([1, 2], "image", "Were labels passed"),
        (["a", None], "text", "sample 1 is missing"),
        ([{"text": "a"}, {"label": 1}], "text", "sample 1 is missing, not a text"),
        ({"body": ["a"], "head": ["b"]}, "text", "name one of those it has: 'body', 'head'"),
        (np.array([[0.0, 1.0], [np.nan, 1.0]]), "array", "1 samples hold NaN or infinity, the first is 1"),
        ([torch.ones(2), torch.tensor([1.0, float("inf")])], "array", "NaN or infinity in sample 1"),
        (np.zeros((2, 4, 4)), "image", "images must be uint8"),
        ({"text": ["a", "b"], "label": [0]}, "text", "'text' has 2, 'label' has 1 values"),
        ({"text": ["a", "b"], "label": [0, None]}, "text", "labels are missing, the first of sample 1"),
        ({"text": ["a", "b"], "label": [0, -1]}, "text", "classes count from 0"),
        ({"text": ["a"], "label": [0.5]}, "text", "a label is one class number or name"),
        ({"text": ["a"], "label": [[0, 1]]}, "text", "a label is one class number or name"),
        (["a", ("b", 1)], "text", "not all alike"),
        ("no/such/file.jsonl", "text", "does not exist"),
        (3, "text", "cannot be read from a int"),
    ],
)  # fmt: skip
def test_what_cannot_be_samples_is_refused(source: Any, kind: Any, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_samples(source, kind)
    assert message in str(refused.value)


def test_a_missing_field_is_named_with_those_present() -> None:
    with pytest.raises(UsageError, match=r"no field 'tweet' for the text; it has 'text', 'label'"):
        read_samples({"text": ["a"], "label": [0]}, "text", Fields(input="tweet"))
    with pytest.raises(UsageError, match="no field 'gold' for the label"):
        read_samples({"text": ["a"], "label": [0]}, "text", Fields(label="gold"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.csv", b"text,label\na,1\nb\n", "line 3: 1 values under a header of 2 columns"),
        ("a.json", b'{"text": ', "not valid JSON"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.npz", b"nothing", "not a readable npz"),
        ("a.jsonl.gz", b"not gzip", "cannot read"),
        ("a.xml", b"<a/>", "no known format"),
    ],
)
def test_damaged_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_samples(tmp_path / name, "text")


def test_one_sample_scores_but_does_not_adapt() -> None:
    assert read_task_data("t", None, [("a", 0)], "text")[1] is not None
    with pytest.raises(UsageError, match="task 't', adapt: list has one sample"):
        read_task_data("t", ["a"], None, "text")


def test_evaluation_needs_labels() -> None:
    with pytest.raises(UsageError, match="no labels to score with"):
        read_task_data("t", None, ["a", "b"], "text")


def test_named_labels_follow_the_models_classes_without_regard_to_case() -> None:
    labels = NamedLabels(["Positive", "negative", "VERY_good"], "here")
    with pytest.raises(UsageError, match="no model has said yet"):
        labels[0]
    labels.settle(["negative", "positive", "very good"])
    assert list(labels) == [1, 0, 2]
    labels.settle(["a", "b"])
    with pytest.raises(
        UsageError, match="'Positive', 'VERY_good', 'negative' are none of the model's classes"
    ):
        labels.check()
    labels.settle(None)
    with pytest.raises(UsageError, match="Give label_names"):
        labels.check()


def test_the_digest_tells_content_apart() -> None:
    values = ["ab", ("a", "b"), ("ab", ""), np.zeros(2), np.zeros((1, 2)), torch.zeros(2), b"ab"]
    assert len({sample_digest(value) for value in values}) == len(values)
    assert sample_digest(np.zeros(2, np.float32)) == sample_digest(torch.zeros(2))


def overlapping(adapt: list[list[float]], evaluate: list[list[float]]) -> Any:
    x, y = torch.tensor(adapt), torch.tensor(evaluate)
    return module_task("t", x, {"x": y, "y": [0] * len(y)}, model=torch.nn.Identity())


def test_overlapping_splits_are_refused_unless_asked_for() -> None:
    disjoint = overlapping([[1.0], [2.0]], [[3.0], [4.0]])
    refuse_overlap([disjoint])
    shared = overlapping([[1.0], [2.0]], [[2.0], [4.0], [1.0]])
    with pytest.raises(UsageError, match="task 't': 2 of 3 evaluation samples"):
        refuse_overlap([disjoint, shared])
    refuse_overlap([shared], transductive=True)


def test_a_real_set_reads_as_its_meta_says(data_set: Callable[[str], Path]) -> None:
    folder = data_set("text/trec")
    val, test = read_task_data("trec", folder / "val.jsonl.gz", folder / "test.jsonl.gz", "text")
    assert val is not None and test is not None
    assert (len(val), len(test)) == (536, 500)
    assert set(test.labels or []) == set(range(6))


def test_a_real_npz_reads_by_split(data_set: Callable[[str], Path]) -> None:
    samples = read_samples(f"{data_set('vision/usps')}/usps.npz:val", "image")
    assert len(samples) == 729
    assert samples.inputs[0].shape == (32, 32)
