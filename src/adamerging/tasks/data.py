"""Columns → `Samples`: which column is the input and which the label, and what no sample may be."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .labels import NamedLabels, SpareLabels
from .readers import INPUT, LABEL, PAIR, Columns, Names, folder_of, read_columns
from .task import Samples, Task

DataKind = Literal["text", "image", "array"]

# What the input of each kind is usually called; first match wins.
INPUT_NAMES: Mapping[str, tuple[str, ...]] = {
    "text": (INPUT, "text", "sentence", "content", "utterance", "query", "title", "review", "document"),
    "image": (INPUT, "image", "images", "img", "x", "path", "file"),
    "array": (INPUT, "x", "inputs", "features", "data", "image", "images"),
}
PAIR_NAMES = (
    (INPUT, PAIR),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
LABEL_NAMES = (LABEL, "labels", "y", "class", "target", "category", "intent", "label_text")
_SHOWN = 80
UNLABELLED = -1
"""By convention of the hub's benchmarks a split whose labels are secret has -1 everywhere."""


@dataclass(frozen=True)
class Fields:
    """Names of the columns to use; guessed from common names where None.

    Attributes:
        input: the text, image or array.
        label: the class.
        pair: the second text, for pairs of texts.
    """

    input: str | None = None
    label: str | None = None
    pair: str | None = None


@dataclass(frozen=True)
class Joined:
    """Several sources that are one split, one after the other.

    Attributes:
        sources: each as `read_samples` takes it.
    """

    sources: tuple[Any, ...]


def read_samples(
    source: Any,
    kind: DataKind,
    fields: Fields | None = None,
    label_names: Sequence[str] | None = None,
    *,
    spare: bool = False,
) -> Samples:
    """One split, read and checked.

    Args:
        source: whatever `read_columns` takes, samples already read, or several of these as `Joined`.
        kind: what the inputs are.
        fields: names of the columns.
        label_names: class names by number, for labels that are stored by name; else the model names them.
        spare: the labels may never be used, so that those that are none are refused when one is used.

    Raises:
        UsageError: no such field, no samples, inputs that are none (labels in their place, NaN), labels
            that are none.
        MissingExtraError: a package of the ``data`` extra is needed.
    """
    if isinstance(source, Samples):
        return source
    if isinstance(source, Joined):
        parts = [read_samples(each, kind, fields, label_names, spare=spare) for each in source.sources]
        return _joined(parts)
    columns, name = read_columns(source)
    fields = fields or Fields()
    _refuse_no_columns([field for field, column in columns.items() if not _has_length(column)], name)
    if not columns or all(len(column) == 0 for column in columns.values()):
        raise UsageError(f"{name} is empty: it has no samples")
    first, pair, label = _choose(columns, kind, fields, name)
    used = {field: columns[field] for field in (first, pair, label) if field is not None}
    _refuse_no_columns([f for f, column in used.items() if isinstance(column, str | bytes | Mapping)], name)
    if len({len(column) for column in used.values()}) > 1:
        raise UsageError(
            f"{name}: "
            + ", ".join(f"'{field}' has {len(column)}" for field, column in used.items())
            + " values"
        )
    inputs: Any = columns[first]
    if kind == "image":
        inputs = _image_files(inputs, folder_of(source), f"{name}, '{first}'")
    check_inputs(inputs, kind, f"{name}, '{first}'")
    if pair is not None:
        check_inputs(columns[pair], kind, f"{name}, '{pair}'")
        inputs = list(zip(inputs, columns[pair], strict=True))
    read = _spare_labels if spare else _settled_labels
    labels = None if label is None else read(columns[label], f"{name}, '{label}'", label_names)
    return Samples(inputs, labels, name, _fingerprint(inputs, labels))


def _joined(parts: Sequence[Samples]) -> Samples:
    """One split of several; labelled where all of them are, by number."""
    inputs = [item for part in parts for item in part.inputs]
    known = [part.labels for part in parts if not isinstance(part.labels, NamedLabels | None)]
    refused = [each for each in known if isinstance(each, SpareLabels)]
    labels: Sequence[int] | None = None
    if len(known) == len(parts):
        labels = (
            SpareLabels(inputs, refused[0].problem)
            if refused
            else [label for each in known for label in each]
        )
    source = " and ".join(part.source for part in parts)
    digest = hashlib.sha256("\n".join(part.fingerprint for part in parts).encode()).hexdigest()
    return Samples(inputs, labels, source, digest)


def read_task_data(
    task: str,
    adapt: Any,
    evaluate: Any,
    kind: DataKind,
    fields: Fields | None = None,
    label_names: Sequence[str] | None = None,
) -> tuple[Samples | None, Samples | None]:
    """Both splits of a task. What is wrong with the labels of the adaptation data is said when one is used.

    Raises:
        UsageError: as `read_samples`; adaptation data of one sample; evaluation data without labels.
    """
    found: list[Samples | None] = []
    for which, source in (("adapt", adapt), ("evaluate", evaluate)):
        spare = which == "adapt"
        try:
            found.append(
                None if source is None else read_samples(source, kind, fields, label_names, spare=spare)
            )
        except UsageError as error:
            error.args = (f"task '{task}', {which}: {error}",)
            raise
    unlabeled, labelled = found
    if unlabeled is not None and len(unlabeled) == 1:
        raise UsageError(
            f"task '{task}', adapt: {unlabeled.source} has one sample. Coefficients learned from a single "
            "input fit that input alone; give a few dozen or more, none needs a label"
        )
    if labelled is not None and labelled.labels is None:
        raise UsageError(
            f"task '{task}', evaluate: {labelled.source} has no labels to score with (no column named "
            f"{', '.join(LABEL_NAMES)}, or all are {UNLABELLED}, as in secret test splits); name the column "
            "with label_field"
        )
    return None if unlabeled is None else _with_spare_labels(task, unlabeled), labelled


def _with_spare_labels(task: str, samples: Samples) -> Samples:
    """Adaptation data whose labels are looked at when one is used, and not before."""
    labels = samples.labels
    if isinstance(labels, SpareLabels):
        labels = SpareLabels(labels.found, labels.problem and f"task '{task}', adapt: {labels.problem}")
    elif labels is not None:
        labels = SpareLabels(labels)
    return replace(samples, labels=labels)


def refuse_overlap(tasks: Iterable[Task], *, transductive: bool = False) -> None:
    """Scores on what was adapted to say nothing about new data, so the two splits must be disjoint.

    Args:
        tasks: with both splits or one.
        transductive: the run is meant to be scored on the very inputs it adapts to.

    Raises:
        UsageError: some input is in both splits of a task; all such tasks are listed with counts.
    """
    if transductive:
        return
    problems = []
    for task in tasks:
        if task.adapt is None or task.evaluate is None:
            continue
        if shared := count_shared(task.evaluate, task.adapt):
            problems.append(
                f"task '{task.name}': {shared} of {len(task.evaluate)} evaluation samples "
                f"({task.evaluate.source}) are also adaptation samples ({task.adapt.source})"
            )
    if problems:
        raise UsageError(
            "adaptation and evaluation data overlap:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nGive disjoint splits, or say that scores on adaptation data are meant: transductive: true"
        )


def count_shared(samples: Samples, others: Samples) -> int:
    """How many of some samples are also among others, by the content of their inputs."""
    if samples.fingerprint == others.fingerprint:
        return len(samples)
    seen = {sample_digest(value) for value in others.inputs}
    return sum(sample_digest(value) in seen for value in samples.inputs)


def sample_digest(value: Any) -> bytes:
    """sha256 of one input's content: of a text, an array, an image, a file, or a combination of these."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.digest()


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """An array or tensor on any device, or nested numbers, as numpy."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
        value = value.numpy()
    array: np.ndarray[Any, Any] = np.asarray(value)
    return array


# --- columns


def _has_length(column: Any) -> bool:
    return hasattr(column, "__len__") and getattr(column, "ndim", 1) > 0


def _refuse_no_columns(fields: Sequence[str], name: str) -> None:
    if fields:
        raise UsageError(
            f"{name}: {', '.join(map(repr, fields))} must hold a list, one value a sample. Where one key of "
            "a JSON file holds all samples, name it: FILE.json:KEY"
        )


def _image_files(inputs: Any, folder: Path | None, where: str) -> Any:
    """Inputs with a path for each name of an image file: beside the file that names it, else as it is."""
    if not isinstance(inputs, list | tuple) and not isinstance(inputs[0], str):
        return inputs  # an array, or a column of a data set, whose images would be decoded to look at them
    found = [_image_file(value, folder) if isinstance(value, str) else value for value in inputs]
    files = [index for index, value in enumerate(found) if isinstance(value, Path)]
    missing = [index for index in files if not os.path.isfile(found[index])]
    if missing:
        places = "the working directory" if folder is None else f"{folder} and the working directory"
        raise UsageError(
            f"{where}: {len(missing)} of {len(files)} image files do not exist in {places}, "
            f"the first is '{beginning(inputs[missing[0]])}' of sample {missing[0]}. "
            "Is this a column of texts? Name that of the images: input_field (image_field in Python)"
        )
    return found if files else inputs


def beginning(text: object) -> str:
    """So much of a text as a message has room for."""
    whole = str(text)
    return whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]}..."


def _image_file(name: str, folder: Path | None) -> Path:
    path = Path(name).expanduser()
    beside = path if folder is None else folder / path
    # os.path takes any text, as an encoded image in the place of a name, where Path raises
    return beside if os.path.isfile(beside) else path


def _choose(
    columns: Columns, kind: DataKind, fields: Fields, name: str
) -> tuple[str, str | None, str | None]:
    present = ", ".join(f"'{column}'" for column in columns)
    for option, field in (("text", fields.input), ("label", fields.label), ("pair", fields.pair)):
        if field is not None and field not in columns:
            what = kind if option == "text" else option
            raise UsageError(f"{name} has no field '{field}' for the {what}; it has {present}")
    label = fields.label or next((each for each in LABEL_NAMES if each in columns), None)
    first, pair = fields.input, fields.pair
    if kind == "text" and first is None and pair is None:
        first, pair = next((p for p in PAIR_NAMES if p[0] in columns and p[1] in columns), (None, None))
    if first is None:
        candidates = [each for each in INPUT_NAMES[kind] if each in columns and each not in (pair, label)]
        rest = [each for each in columns if each not in (pair, label)]
        if not candidates and len(rest) != 1:
            raise UsageError(
                f"{name} has no field that is surely the {kind}; name one of those it has: {present}. "
                f"The key is {_input_key(kind)}"
            )
        first = (candidates or rest)[0]
    return first, pair, label


def _input_key(kind: DataKind) -> str:
    """What names the column of the inputs."""
    return "input_field" if kind == "array" else f"input_field in a recipe, {kind}_field in Python"


def check_inputs(inputs: Sequence[Any], kind: DataKind, where: str) -> None:
    """Refuse what cannot be inputs of a kind. Raises `UsageError`, naming the sample."""
    if kind == "text":
        wrong = next((i for i, value in enumerate(inputs) if not isinstance(value, str)), None)
        if wrong is not None:
            _refuse(inputs[wrong], wrong, where, "a text")
    elif hasattr(inputs, "shape") and hasattr(inputs, "dtype"):
        _check_stack(inputs, kind, where)
    else:
        for index, value in enumerate(inputs):
            _check_array(value, index, kind, where)


def _refuse(value: Any, index: int, where: str, wanted: str) -> None:
    if isinstance(value, int | np.integer):
        raise UsageError(
            f"{where}: sample {index} is the number {value} where {wanted} belongs. "
            "Were labels passed in the place of inputs?"
        )
    shown = "missing" if _is_missing(value) else f"a {type(value).__name__}"
    raise UsageError(f"{where}: sample {index} is {shown}, not {wanted}")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def _check_stack(inputs: Any, kind: DataKind, where: str) -> None:
    """One array of all samples."""
    array = as_array(inputs)
    least = 3 if kind == "image" else 1
    if array.ndim < least or (array.ndim == 1 and array.dtype.kind in "iub"):
        hint = " Were labels passed in the place of inputs?" if array.ndim == 1 else ""
        raise UsageError(
            f"{where}: an array of shape {list(array.shape)} and dtype {array.dtype} holds no {kind}s.{hint}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
        raise UsageError(f"{where}: {_nonfinite(len(bad), int(bad[0]))}")
    if kind == "image":
        _check_pixels(array.dtype, where)


def _check_array(value: Any, index: int, kind: DataKind, where: str) -> None:
    if kind == "image" and (isinstance(value, Path | str) or _is_image(value) or _is_encoded(value)):
        return
    if isinstance(value, Mapping):
        for part in value.values():
            _check_array(part, index, kind, where)
        return
    wanted = "an image" if kind == "image" else "an array"
    if value is None or isinstance(value, str | int | np.integer):
        _refuse(value, index, where, wanted)
    array = as_array(value)
    if array.dtype.kind not in "fiub" or (kind == "image" and array.ndim not in (2, 3)):
        raise UsageError(
            f"{where}: sample {index} is of shape {list(array.shape)}, {array.dtype}: not {wanted}"
        )
    if array.ndim == 0 and array.dtype.kind in "iub":
        _refuse(int(array), index, where, wanted)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UsageError(f"{where}: {_nonfinite(None, index)}")
    if kind == "image":
        _check_pixels(array.dtype, where)


def _nonfinite(count: int | None, first: int) -> str:
    many = f"{count} samples hold NaN or infinity, the first is" if count else "NaN or infinity in sample"
    return f"{many} {first}; remove or mend them"


def _check_pixels(dtype: np.dtype[Any], where: str) -> None:
    if dtype != np.uint8:
        raise UsageError(
            f"{where}: images must be uint8 (0 to 255), got {dtype}; for inputs that are prepared already "
            "use a module task"
        )


def _is_image(value: Any) -> bool:
    return type(value).__module__.startswith("PIL.")


def _is_encoded(value: Any) -> bool:
    """An image as Parquet files of the hub hold it: ``{"bytes": ..., "path": ...}``."""
    return isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)


# --- labels


def _labels(values: Any, where: str, label_names: Sequence[str] | None) -> list[int] | NamedLabels | None:
    are_names = isinstance(values, Names) and label_names is None
    values = as_array(values).tolist() if hasattr(values, "dtype") else [_plain(value) for value in values]
    missing = [_is_missing(value) for value in values]
    if all(missing):
        return None
    if any(missing):
        first = next(compress(range(len(values)), missing))
        raise UsageError(
            f"{where}: {sum(missing)} of {len(values)} labels are missing, the first of sample {first}"
        )
    if all(isinstance(value, str) for value in values):
        known = label_names is not None and set(values) <= set(label_names)
        if are_names or known or not all(value.strip().lstrip("-").isdecimal() for value in values):
            return NamedLabels(values, where)
        values = [int(value) for value in values]
    wrong = next((i for i, v in enumerate(values) if not _is_whole(v)), None)
    if wrong is not None:
        raise UsageError(
            f"{where}: the label of sample {wrong} is {values[wrong]!r}; a label is one class number or name"
        )
    numbers = [int(value) for value in values]
    if all(number == UNLABELLED for number in numbers):
        return None
    if min(numbers) < 0:
        raise UsageError(
            f"{where}: sample {numbers.index(min(numbers))} has the label {min(numbers)}; "
            "classes count from 0"
        )
    return numbers


def _settled_labels(
    values: Any, where: str, label_names: Sequence[str] | None
) -> list[int] | NamedLabels | None:
    """Class numbers; names where it is the model that knows what they are called."""
    labels = _labels(values, where, label_names)
    if isinstance(labels, NamedLabels) and label_names is not None:
        labels.settle(label_names)
        return labels.check()
    return labels


def _spare_labels(
    values: Any, where: str, label_names: Sequence[str] | None
) -> list[int] | NamedLabels | SpareLabels | None:
    """The same, where labels that are none are refused when one is used."""
    try:
        return _settled_labels(values, where, label_names)
    except UsageError as error:
        return SpareLabels([str(value) for value in values], str(error))


def _plain(value: Any) -> Any:
    return value.item() if getattr(value, "ndim", 1) == 0 else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


# --- content


def _fingerprint(inputs: Sequence[Any], labels: Sequence[int] | None) -> str:
    digest = hashlib.sha256()
    for value in inputs:
        digest.update(sample_digest(value))
    if isinstance(labels, NamedLabels):
        digest.update("\n".join(labels.names).encode())
    elif isinstance(labels, SpareLabels):
        digest.update("\n".join(labels.found).encode())
    elif labels is not None:
        digest.update(np.asarray(labels, np.int64).tobytes())
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        digest.update(b"text %d " % len(data) + data)
    elif isinstance(value, Path):
        digest.update(b"file " + hashlib.sha256(value.read_bytes()).digest())
    elif isinstance(value, tuple):
        digest.update(b"tuple %d " % len(value))
        for part in value:
            _feed(digest, part)
    elif isinstance(value, Mapping):
        for key in sorted(value):
            _feed(digest, str(key))
            _feed(digest, value[key])
    elif isinstance(value, bytes):
        digest.update(b"bytes %d " % len(value) + value)
    elif value is None:
        digest.update(b"none ")
    elif _is_image(value):
        digest.update(f"image {value.mode} {value.size} ".encode() + value.tobytes())
    else:
        array = np.ascontiguousarray(as_array(value))
        digest.update(f"array {array.dtype.str} {array.shape} ".encode() + array.tobytes())
