"""Reading samples from every kind of source, and refusing what cannot be samples."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adamerging.errors import UsageError
from adamerging.finetuning.learner import classes_of
from adamerging.tasks.data import (
    Fields,
    Joined,
    read_samples,
    read_task_data,
    refuse_overlap,
    sample_digest,
)
from adamerging.tasks.labels import NamedLabels, usable
from adamerging.tasks.module import module_task
from adamerging.tasks.task import Samples

ZIPPED = gzip.compress(b"".join(b'{"text": "text %d"}\n' % number for number in range(99)))
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


def labels_by_folder(root: Path, folders: list[str], label_names: list[str] | None = None) -> Any:
    for name in folders:
        (root / name).mkdir(parents=True)
        (root / name / "a.png").write_bytes(name.encode())
    return read_samples(root, "image", label_names=label_names).labels


def test_folders_that_count_from_zero_keep_their_number_and_others_are_names(tmp_path: Path) -> None:
    by_text = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert labels_by_folder(tmp_path / "a", [str(number) for number in range(12)]) == by_text
    assert labels_by_folder(tmp_path / "b", [f"{number:05}" for number in range(12)]) == list(range(12))
    limits = labels_by_folder(tmp_path / "c", ["100", "20", "50"])
    assert isinstance(limits, NamedLabels)
    assert classes_of(Samples([], limits, "", "")) == ["100", "20", "50"]
    limits.settle(["20", "50", "100"])
    assert list(limits) == [2, 0, 1]
    assert labels_by_folder(tmp_path / "d", ["100", "20"], ["20", "50", "100"]) == [2, 0]
    assert labels_by_folder(tmp_path / "e", ["1", "3"], ["cat", "dog", "ant", "bee"]) == [1, 3]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["20", "50", "30"], ["20", "30", "50"], [0, 2, 1]),
        (["2", "1"], ["1", "2", "3"], [1, 0]),
        (["2", "0"], ["a", "b", "c"], [2, 0]),
        (["2", "0"], None, [2, 0]),
        ([2, 0], ["2", "0", "1"], [2, 0]),
    ],
)
def test_numbers_written_as_text_are_names_where_all_are_among_the_names(
    labels: list[Any], names: list[str] | None, numbers: list[int]
) -> None:
    rows = {"text": ["x"] * len(labels), "label": labels}
    assert read_samples(rows, "text", label_names=names).labels == numbers


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "label,text\n2,hello\n"),
        ("a.jsonl", '{"label": 2, "text": "hello"}\n'),
        ("a.json", '[{"label": 2, "text": "hello"}]'),
        ("a.jsonl.gz", '{"label": 2, "text": "hello"}\n'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_name(name: str, content: str, tmp_path: Path) -> None:
    data = content.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    samples = read_samples(tmp_path / name, "text")
    assert (samples.inputs, samples.labels) == (["hello"], [2])


def test_a_long_text_in_a_table_is_read_whole(tmp_path: Path) -> None:
    text, limit = "word " * 30_000, csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text,label\n{text},1\n", encoding="utf-8")
    assert read_samples(tmp_path / "a.csv", "text").inputs == [text]
    assert csv.field_size_limit() == limit


def write_pictures(folder: Path, shade: int) -> None:
    image = pytest.importorskip("PIL.Image")
    (folder / "pics").mkdir(exist_ok=True)
    for name in ("a", "b"):
        image.new("L", (4, 4), shade + ord(name)).save(folder / "pics" / f"{name}.png")


def test_image_files_named_in_a_table_lie_beside_it_and_count_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path, 0)
    table = tmp_path / "set.csv"
    table.write_text("path,label\npics/a.png,0\npics/b.png,1\n", encoding="utf-8")
    read = read_samples(table, "image")
    paths = [tmp_path / "pics" / "a.png", tmp_path / "pics" / "b.png"]
    assert read.inputs == paths
    assert read.fingerprint == read_samples({"image": paths, "label": [0, 1]}, "image").fingerprint
    write_pictures(tmp_path, 1)
    assert read_samples(table, "image").fingerprint != read.fingerprint
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tables").mkdir()
    moved = table.rename(tmp_path / "tables" / "set.csv")
    assert read_samples(moved, "image").inputs == [Path("pics/a.png"), Path("pics/b.png")]


@pytest.mark.parametrize("name", ["pics/gone.png", "/pics/gone.png", "", "x" * 5000])
def test_image_files_that_are_not_there_are_counted(name: str, tmp_path: Path) -> None:
    write_pictures(tmp_path, 0)
    (tmp_path / "set.csv").write_text(f"path,label\npics/a.png,0\n{name},1\n", encoding="utf-8")
    with pytest.raises(
        UsageError, match="1 of 2 image files do not exist in .* of sample 1. Is this"
    ) as refused:
        read_samples(tmp_path / "set.csv", "image")
    assert len(str(refused.value)) < 500 + len(str(tmp_path)) * 2
    with pytest.raises(UsageError, match="1 of 1 image files do not exist in the working directory"):
        read_samples([Path("no/such.png")], "image")


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
        ({"body": ["a"], "head": ["b"]}, "text", "name one of those it has: 'body', 'head'. "
            "The key is input_field in a recipe, text_field in Python"),
        (np.array([[0.0, 1.0], [np.nan, 1.0]]), "array", "1 samples hold NaN or infinity, the first is 1"),
        ([torch.ones(2), torch.tensor([1.0, float("inf")])], "array", "NaN or infinity in sample 1"),
        (np.zeros((2, 4, 4)), "image", "images must be uint8"),
        ({"text": ["a", "b"], "label": [0]}, "text", "'text' has 2, 'label' has 1 values"),
        ({"text": ["a", "b"], "label": [0, None]}, "text", "labels are missing, the first of sample 1"),
        ({"text": ["a", "b"], "label": [0, -1]}, "text", "classes count from 0"),
        ({"text": ["a"], "label": [0.5]}, "text", "a label is one class number or name"),
        ({"text": ["a"], "label": [[0, 1]]}, "text", "a label is one class number or name"),
        ({"text": ["a"], "label": [np.array([0, 1])]}, "text", "a label is one class number or name"),
        ({"text": ["a"], "label": [float("inf")]}, "text", "a label is one class number or name"),
        ({"text": np.zeros((2, 4, 4), np.uint8)}, "text", "'text': sample 0 is a ndarray, not a text"),
        ({"text": [float("nan")]}, "text", "'text': sample 0 is missing, not a text"),
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
        ("a.jsonl.gz", ZIPPED[:-12], "cannot read .*ended before"),
        ("a.jsonl.gz", ZIPPED[:20] + bytes(20) + ZIPPED[40:], "cannot read .*decompressing"),
        ("a.json", b'{"version": 1, "data": [{"text": "a"}]}', "'version' must hold a list.*FILE.json:KEY"),
        ("a.json", b'{"text": "a"}', "'text' must hold a list"),
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


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["news", "sport"], "'news', 'sport' are none of the model's classes"),
        ([0, None], "labels are missing, the first of sample 1"),
        ([0, 0.5], "the label of sample 1 is 0.5"),
        ([0, -3], "classes count from 0"),
    ],
)
def test_labels_of_adaptation_data_are_refused_when_one_is_used(labels: list[Any], message: str) -> None:
    rows = {"text": ["a", "b"], "label": labels}
    for source in (rows, Joined((rows, rows))):
        adapt, _ = read_task_data("t", source, None, "text", label_names=["no", "yes"])
        assert adapt is not None and adapt.labels is not None
        assert len(adapt.labels) == len(adapt) and usable(adapt.labels) is None
        with pytest.raises(UsageError, match=f"^task 't', adapt: .*{message}"):
            adapt.labels[0]
    with pytest.raises(UsageError, match=f"^task 't', evaluate: .*{message}"):
        read_task_data("t", None, rows, "text", label_names=["no", "yes"])
    other, _ = read_task_data("t", {"text": ["a", "b"], "label": [0, 1]}, None, "text")
    assert other is not None and other.labels == [0, 1] == usable(other.labels)
    assert other.fingerprint != adapt.fingerprint


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
